"""Rollouts into shards: complete, journalled, resumed without doing or reading anything twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import CONFIG, Interrupted, ScriptedEngine, contents, open_run, small_plan, stub_chat

from persona_axis.collect import rollouts as rollouts_module
from persona_axis.collect.plan import PlanRow
from persona_axis.collect.rollouts import Generated, content_ids, generate_rollouts, shard_requests
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.errors import RunConflict, StorageError, UsageError
from persona_axis.files.journal import Journal
from persona_axis.files.shards import open_arrays, read_rows
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Request, Sampling

pytestmark = pytest.mark.usefixtures("small_shards")

SAMPLING = Sampling(max_tokens=6, seed=3)
PLAN = {"n_roles": 3, "n_questions": 5, "neutral": ("", "Help.")}  # 25 rollouts: shards of 8, 8, 8 and 1


def new_run(folder: Path, **config: Any) -> RunDir:
    return open_run(folder, small_plan(**PLAN), **config)


def journalled(run: RunDir) -> set[str]:
    files = run.rollouts.glob("*.journal")
    return {header["key"] for file in files for header, _ in Journal(file, run.config_hash).read()}


# ---- what a shard holds ------------------------------------------------------------------------------------------


def test_every_rollout_is_stored_as_the_engine_made_it(tmp_path: Path) -> None:
    run, engine, chat = new_run(tmp_path / "run"), ScriptedEngine(), stub_chat()
    heard: list[int] = []
    made = generate_rollouts(run, chat, engine, SAMPLING, on_reply=heard.append)
    assert sorted(engine.asked_keys) == sorted(row.key for row in run.plan.rows)
    tokens = 0
    for shard, rows in run.plan.shards():
        stored = read_rows(run.rollouts, shard_name(shard)).to_pylist()
        with open_arrays(run.rollouts, shard_name(shard)) as arrays:
            activations = arrays.read("activations")
        assert activations.shape == (len(rows), 3, 8)
        assert activations.dtype == np.float32
        assert [row["key"] for row in stored] == [row.key for row in rows]
        for row, found, activation in zip(rows, stored, activations, strict=True):
            reply = engine.reply(Request(row.key, ()))
            prompt = chat.template.prompt_ids((row.system_prompt, row.question))
            assert found["reply_ids"] == reply.token_ids.tolist()
            assert found["logprobs"] == reply.logprobs.tolist()
            assert (found["finish_reason"], found["n_counted"]) == (reply.finish_reason, reply.n_counted)
            assert (found["persona"], found["question_index"], found["block"], found["prompt_tokens"]) == (
                row.persona,
                row.question_index,
                row.block,
                len(prompt),
            )
            ended = reply.finish_reason == "stop"
            assert found["text"] == " ".join(str(i) for i in reply.token_ids[: len(reply.token_ids) - ended])
            assert np.array_equal(activation, reply.activation.numpy())  # type: ignore[union-attr]
            tokens += len(reply.token_ids)
    assert made == Generated(25, tokens)
    assert sum(heard) == tokens
    assert len(heard) == 25
    assert not list(run.rollouts.glob("*.journal"))


def test_a_reply_without_a_counted_token_is_kept_as_zeros(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    lost = run.plan.rows[3].key
    engine = ScriptedEngine(lambda key: None if key == lost else np.ones((3, 8)))
    generate_rollouts(run, stub_chat(), engine, SAMPLING)
    with open_arrays(run.rollouts, shard_name(0)) as arrays:
        values = arrays.read("activations")
    assert [bool(v.any()) for v in values] == [True, True, True, False, True, True, True, True]
    assert read_rows(run.rollouts, shard_name(0))["n_counted"].to_pylist()[3] == 0


def test_the_stop_token_and_the_thinking_are_no_content() -> None:
    ids = np.arange(6)
    assert content_ids(ids, 0, "stop").tolist() == [0, 1, 2, 3, 4]
    assert content_ids(ids, 0, "length").tolist() == [0, 1, 2, 3, 4, 5]
    assert content_ids(ids, 2, "stop").tolist() == [2, 3, 4]
    assert content_ids(ids, 6, "length").tolist() == []  # cut while thinking
    assert content_ids(ids[:1], 0, "stop").tolist() == []


def a_row(persona: str, prompt: int, number: int, system: str, question: str) -> PlanRow:
    return PlanRow(f"{persona}{prompt}{number}", persona, "", prompt, "q", 0, 0, "", system, question, "", 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.sampled_from(["x", "xy", "xyz", "y"])),
        min_size=1,
        max_size=8,
    )
)
def test_the_shared_prefix_is_the_longest_one_and_never_the_whole_prompt(asked: list[tuple[str, int, str]]) -> None:
    rows = [a_row(p, i, n, f"{p}{i}", question) for n, (p, i, question) in enumerate(asked)]
    requests = shard_requests(stub_chat(), rows)
    assert [r.key for r in requests] == [row.key for row in rows]
    for row, request in zip(rows, requests, strict=True):
        others = [r.prompt_ids for r, o in zip(requests, rows, strict=True) if o.system_prompt == row.system_prompt]
        n = request.shared_prefix
        assert 0 <= n < len(request.prompt_ids)
        assert all(o[:n] == request.prompt_ids[:n] for o in others)
        longer = len(others) > 1 and n + 1 < min(map(len, others))
        assert not longer or len({o[: n + 1] for o in others}) > 1


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tiny: Any) -> Any:
    """A model whose sampled replies end by stop and by length."""
    return tiny("llama")


def engine_of(chat: Any, batch_tokens: int = 2048) -> DecodingLoop:
    return DecodingLoop(chat, (0, 2), batch_tokens)


@pytest.fixture(scope="module")
def uninterrupted(sampled: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    run = new_run(tmp_path_factory.mktemp("whole") / "run")
    generate_rollouts(run, sampled, engine_of(sampled), SAMPLING)
    return contents(run.path)


@pytest.mark.parametrize("stops", [(1,), (7, 8), (3, 5, 9), (24,), (0, 0, 12)])
def test_interrupted_runs_end_with_the_same_replies(
    tmp_path: Path, sampled: Any, uninterrupted: dict[str, tuple[Any, ...]], stops: tuple[int, ...]
) -> None:
    assert {row[1] for row in uninterrupted.values()} == {"stop", "length"}
    finished: list[str] = []
    for stop in stops:
        run = new_run(tmp_path / "run")
        engine = Interrupted(engine_of(sampled, batch_tokens=500 + 100 * stop), stop)
        with pytest.raises(KeyboardInterrupt):
            generate_rollouts(run, sampled, engine, SAMPLING)
        finished += engine.handed_out
    run = new_run(tmp_path / "run")
    last = Interrupted(engine_of(sampled), 100)
    made = generate_rollouts(run, sampled, last, SAMPLING)
    assert made.rollouts == 25 - sum(stops)
    assert sorted(finished + last.handed_out) == sorted(uninterrupted)  # each made once
    assert contents(run.path) == uninterrupted


def test_a_resume_reads_no_finished_shard_and_asks_for_what_is_missing_only(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    first = Interrupted(ScriptedEngine(), 18)
    with pytest.raises(KeyboardInterrupt):
        generate_rollouts(run, stub_chat(), first, SAMPLING)
    finished = {row.key for row in run.plan.rows if run.has_rollouts(row.shard)}
    assert 8 <= len(finished) < 18  # some in shards, some in a journal
    assert journalled(run) | finished == set(first.handed_out)

    again, engine = new_run(tmp_path / "run"), ScriptedEngine()
    generate_rollouts(again, stub_chat(), engine, SAMPLING)
    assert sorted(engine.asked_keys) == sorted({row.key for row in run.plan.rows} - set(first.handed_out))
    assert again.log.counts == {}

    third, idle = new_run(tmp_path / "run"), ScriptedEngine()
    assert generate_rollouts(third, stub_chat(), idle, SAMPLING) == Generated(0, 0)
    assert idle.asked == []
    assert third.log.counts == {}


def test_a_shard_whose_journal_is_full_is_written_without_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run = new_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(rollouts_module, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            generate_rollouts(run, stub_chat(), ScriptedEngine(batch=1), SAMPLING)
    assert len(journalled(run)) == 8
    engine = ScriptedEngine()
    generate_rollouts(run, stub_chat(), engine, SAMPLING)
    assert len(engine.asked) == 17
    assert len(contents(run.path)) == 25


def test_a_torn_journal_loses_its_last_record_only(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        generate_rollouts(run, stub_chat(), Interrupted(ScriptedEngine(batch=1), 5), SAMPLING)
    journal = run.rollouts / f"{shard_name(0)}.journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    engine = ScriptedEngine(batch=1)
    generate_rollouts(run, stub_chat(), engine, SAMPLING)
    assert engine.asked_keys == [row.key for row in run.plan.rows[4:]]
    assert len(contents(run.path)) == 25


def test_only_the_shards_asked_for_are_made(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING, range(1, 3))
    assert [run.has_rollouts(shard) for shard in range(4)] == [False, True, True, False]


def test_shards_and_journals_of_another_configuration_are_refused(tmp_path: Path) -> None:
    run, other = new_run(tmp_path / "run"), new_run(tmp_path / "other", seed=1)
    for made, after in ((run, 12), (other, 3)):
        with pytest.raises(KeyboardInterrupt):
            generate_rollouts(made, stub_chat(), Interrupted(ScriptedEngine(), after), SAMPLING)
    for file in run.rollouts.iterdir():
        file.replace(other.rollouts / file.name)
    with pytest.raises(RunConflict, match="another configuration"):
        generate_rollouts(other, stub_chat(), ScriptedEngine(), SAMPLING)


# ---- the folder --------------------------------------------------------------------------------------------------


def test_a_folder_of_another_configuration_shows_the_difference_and_is_left_alone(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", temperature=0.7)
    generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING)
    before = contents(run.path)
    with pytest.raises(RunConflict) as caught:
        new_run(tmp_path / "run", temperature=0.9, model="other")
    message = str(caught.value)
    assert "model: 'tiny' there, 'other' asked for" in message
    assert "temperature: 0.7 there, 0.9 asked for" in message
    assert "seed" not in message
    assert "--out" in message
    with pytest.raises(RunConflict, match="the plan"):
        open_run(tmp_path / "run", small_plan(4, 5), temperature=0.7)
    assert contents(run.path) == before
    assert new_run(tmp_path / "run", temperature=0.7).config_hash == run.config_hash


def test_a_folder_where_nothing_was_made_yet_takes_the_corrected_command(tmp_path: Path) -> None:
    failed = new_run(tmp_path / "run", model="mispelt")
    failed.write_facts("model", {"name": "mispelt"})
    run = new_run(tmp_path / "run", model="right")
    assert run.config_hash != failed.config_hash
    assert run.facts("model") == {}
    loaded = RunDir.load(tmp_path / "run")
    assert loaded.configuration["model"] == "right"
    assert loaded.plan == run.plan
    with pytest.raises(KeyboardInterrupt):  # one reply is work
        generate_rollouts(run, stub_chat(), Interrupted(ScriptedEngine(), 1), SAMPLING)
    with pytest.raises(RunConflict, match="'right' there"):
        new_run(tmp_path / "run", model="mispelt")


def test_somebody_elses_folder_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunConflict, match=r"not empty and holds no run \(it has notes\.txt\)"):
        new_run(tmp_path)
    for out in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "deeper"):
        with pytest.raises(UsageError, match=r"notes\.txt is a file"):
            new_run(out)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_and_one_killed_at_its_first_write_are_used(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / ".run.json.0123abcd.tmp").write_text("{")
    assert new_run(tmp_path).config_hash == run.config_hash
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.parquet", "run.json"]


def test_a_folder_without_a_run_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="persona-axis run"):
        RunDir.load(tmp_path)


def test_facts_and_judges_have_their_own_files(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    assert run.facts("null") == {}
    run.write_facts("null", {"mean": 0.5})
    assert new_run(tmp_path / "run").facts("null") == {"mean": 0.5}
    assert json.loads((run.path / "run.json").read_text())["generation"] == {**CONFIG, "plan": run.plan.digest()}
    assert run.judge("openai/gpt-4.1") != run.judge("openai/gpt-4.0")
    assert run.judge("openai/gpt-4.1").parent == run.path / "judge"


def test_a_damaged_shard_names_the_file_to_delete(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING)
    file = run.rollouts / f"{shard_name(2)}.parquet"
    whole = pq.read_table(file)
    file.write_bytes(b"PAR1" + b"x" * 40)
    with pytest.raises(StorageError, match=r"Delete .*shard-00002\.parquet and run the same command"):
        generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING)
    file.unlink()
    engine = ScriptedEngine()
    generate_rollouts(run, stub_chat(), engine, SAMPLING)
    assert len(engine.asked) == 8
    assert pq.read_table(file).to_pylist() == whole.to_pylist()
