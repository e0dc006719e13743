"""Verdicts: journalled, failures asked again and nothing else, the likelihood judge against a sum by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import ScriptedEngine, ScriptedJudge, evidence_judge, open_run, small_plan, stub_chat

from persona_axis.collect.judging import Judged, judge_rollouts, null_of, read_exchanges, read_verdicts, unjudged
from persona_axis.collect.likelihood import NULL_REPLIES, PLAIN_PROMPT, LikelihoodJudge, Null, with_logprobs
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rollouts import generate_rollouts
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.collect.verdicts import Exchange, Verdict
from persona_axis.errors import JudgeError, RunConflict
from persona_axis.files.journal import Journal
from persona_axis.files.shards import is_complete
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Reply, Request, Sampling

pytestmark = pytest.mark.usefixtures("small_shards")

SAMPLING = Sampling(max_tokens=6)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """25 finished rollouts in shards of 8, 8, 8 and 1."""
    run = open_run(tmp_path / "run", small_plan(3, 5, ("", "Help.")))
    generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING)
    return run


def length(e: Exchange) -> float:
    return float(len(e.key))


def failing(keys: set[str], **options: Any) -> ScriptedJudge:
    """Fails on ``keys``, else evidence."""

    def decide(e: Exchange) -> Verdict:
        if e.key in keys:
            return Verdict(e.key, "failed", detail="rate limited")
        return Verdict(e.key, "ok", evidence=length(e))

    return ScriptedJudge(decide, **options)


def all_verdicts(run: RunDir, judge: str = "likelihood") -> list[Verdict]:
    return [v for shard in range(run.plan.n_shards) for v in read_verdicts(run, judge, shard)]


def test_one_verdict_per_rollout_in_the_order_of_the_plan(run: RunDir) -> None:
    assert unjudged(run, "likelihood") == 25
    heard: list[int] = []
    judge = evidence_judge(length)
    assert judge_rollouts(run, judge, on_verdict=lambda: heard.append(1)) == Judged(25, 0)
    assert sorted(judge.asked) == sorted(row.key for row in run.plan.rows)
    assert all_verdicts(run) == [Verdict(row.key, "ok", evidence=float(len(row.key))) for row in run.plan.rows]
    assert unjudged(run, "likelihood") == 0
    assert len(heard) == 25
    assert not list(run.judge("likelihood").glob("*.journal"))


def test_a_judge_sees_the_rollout_as_it_was_made(run: RunDir) -> None:
    for row, e in zip(run.plan.rows, read_exchanges(run), strict=True):
        reply = ScriptedEngine().reply(Request(row.key, ()))
        content = len(reply.token_ids) - (reply.finish_reason == "stop")
        assert (e.key, e.persona, e.rubric, e.system_prompt, e.question) == (
            row.key,
            row.persona,
            row.rubric,
            row.system_prompt,
            row.question,
        )
        assert e.reply_ids == tuple(reply.token_ids[:content])
        assert e.reply == " ".join(map(str, e.reply_ids))
        assert e.logprob == pytest.approx(float(reply.logprobs[:content].mean()))  # not the end-of-turn token's


@pytest.mark.parametrize("stop_after", [0, 1, 8, 11, 24])
def test_what_a_judge_said_before_it_stopped_is_not_asked_again(run: RunDir, stop_after: int) -> None:
    first = evidence_judge(length, stop_after=stop_after, error=JudgeError)
    with pytest.raises(JudgeError):
        judge_rollouts(run, first)
    second = evidence_judge(length)
    assert judge_rollouts(run, second) == Judged(25, 0)
    assert sorted(first.asked + second.asked) == sorted(row.key for row in run.plan.rows)
    assert len(all_verdicts(run)) == 25


def test_a_torn_journal_asks_for_its_last_verdict_again(run: RunDir) -> None:
    with pytest.raises(KeyboardInterrupt):
        judge_rollouts(run, evidence_judge(length, stop_after=5))
    journal = run.judge("likelihood") / f"{shard_name(0)}.journal"
    journal.write_bytes(journal.read_bytes()[:-3])
    judge = evidence_judge(length)
    judge_rollouts(run, judge)
    assert len(judge.asked) == 25 - 4


def test_failures_are_rows_and_are_asked_again_alone(run: RunDir) -> None:
    keys = {run.plan.rows[i].key for i in (2, 9, 10)}
    assert judge_rollouts(run, failing(keys)) == Judged(22, 3)
    failed = [v for v in all_verdicts(run) if v.status == "failed"]
    assert {v.key for v in failed} == keys
    assert {(v.evidence, v.score, v.detail) for v in failed} == {(None, None, "rate limited")}
    assert unjudged(run, "likelihood") == 3

    still = failing({run.plan.rows[9].key})
    assert judge_rollouts(run, still) == Judged(24, 1)
    assert set(still.asked) == keys

    last = evidence_judge(length)
    assert judge_rollouts(run, last) == Judged(25, 0)
    assert last.asked == [run.plan.rows[9].key]
    assert all_verdicts(run) == [Verdict(row.key, "ok", evidence=float(len(row.key))) for row in run.plan.rows]

    idle = evidence_judge(length)
    assert judge_rollouts(run, idle) == Judged(25, 0)
    assert idle.asked == []


def test_a_retry_that_is_interrupted_goes_on_where_it_stopped(run: RunDir) -> None:
    keys = {row.key for row in run.plan.rows[:8]}
    judge_rollouts(run, failing(keys))
    with pytest.raises(KeyboardInterrupt):
        judge_rollouts(run, evidence_judge(length, stop_after=3))
    last = evidence_judge(length)
    judge_rollouts(run, last)
    assert len(last.asked) == 5
    assert unjudged(run, "likelihood") == 0


def test_a_killed_process_may_leave_the_journal_of_a_finished_shard(run: RunDir) -> None:
    judge_rollouts(run, failing({run.plan.rows[0].key}))
    # Killed after the shard was replaced and before its journal went: the same verdicts are in both.
    with Journal(run.judge("likelihood") / f"{shard_name(0)}.journal", run.config_hash) as journal:
        for row in run.plan.rows[1:8]:
            verdict = {"key": row.key, "status": "ok", "score": None, "evidence": length_of(row.key), "detail": ""}
            journal.append(verdict, {})
    judge = evidence_judge(length)
    assert judge_rollouts(run, judge) == Judged(25, 0)
    assert judge.asked == [run.plan.rows[0].key]
    assert not list(run.judge("likelihood").glob("*.journal"))


def length_of(key: str) -> float:
    return float(len(key))


def test_a_judge_that_skips_rollouts_is_an_error(run: RunDir) -> None:
    class Lazy(ScriptedJudge):
        def judge(self, exchanges: Any) -> Any:
            yield from list(super().judge(exchanges))[1:]

    with pytest.raises(JudgeError, match=f"no verdict for 1 rollouts, e.g. {run.plan.rows[7].key}"):
        judge_rollouts(run, Lazy(lambda e: Verdict(e.key, "ok", evidence=1.0)))


def test_judges_stand_side_by_side(run: RunDir) -> None:
    judge_rollouts(run, evidence_judge(length))
    scores = ScriptedJudge(lambda e: Verdict(e.key, "ok", score=2, detail="Score: 2"), "openai/gpt", "score")
    judge_rollouts(run, scores)
    assert len(scores.asked) == 25
    assert {v.score for v in all_verdicts(run, "openai/gpt")} == {2}
    assert {v.score for v in all_verdicts(run)} == {None}


def test_rollouts_that_are_not_there_yet_wait(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", small_plan(3, 5, ("", "Help.")))
    generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING, range(0, 2))
    judge = evidence_judge(length)
    assert judge_rollouts(run, judge) == Judged(16, 0)
    assert unjudged(run, "likelihood") == 9
    assert judge_rollouts(run, evidence_judge(length), range(0, 1)) == Judged(8, 0)


def test_an_empty_reply_is_put_to_no_judge_and_is_no_failure(tmp_path: Path) -> None:
    class Terse(ScriptedEngine):
        def reply(self, request: Request) -> Reply:
            if not request.key.endswith("q1"):
                return super().reply(request)
            end = np.array([2], dtype=np.int32)
            return Reply(request.key, end, np.array([-1.0], dtype=np.float32), "stop", 0, 0, None)

    run = open_run(tmp_path / "run", small_plan(3, 5, ("", "Help.")))
    generate_rollouts(run, stub_chat(), Terse(), SAMPLING)
    judge = evidence_judge(length)
    assert judge_rollouts(run, judge) == Judged(25, 0)
    assert not any(key.endswith("q1") for key in judge.asked)
    empty = [v for v in all_verdicts(run) if v.key.endswith("q1")]
    assert len(empty) == 5
    assert {(v.status, v.evidence, v.score) for v in empty} == {("ok", None, None)}
    assert unjudged(run, "likelihood") == 0


def test_resuming_reads_each_shard_to_be_judged_once(run: RunDir) -> None:
    judge_rollouts(run, failing({run.plan.rows[9].key}))
    run.log.counts.clear()
    judge_rollouts(run, evidence_judge(length))
    assert dict(run.log.counts) == {run.rollouts / f"{shard_name(1)}.parquet": 1}


# ---- the likelihood judge ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Any]:
    """Rollouts of a tiny model, and the model."""
    chat = tiny("llama")
    run = open_run(tmp_path_factory.mktemp("read") / "run", small_plan(3, 5, ("", "Help.", "Answer me.")))
    generate_rollouts(run, chat, DecodingLoop(chat, (0,), 4096), SAMPLING)
    return run, chat


def direct_logprob(chat: Any, system: str, e: Exchange) -> float:
    """Mean log p of the reply after the question, one plain forward."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": e.question})
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *e.reply_ids]])
    with torch.inference_mode():
        logp = chat.model(ids).logits[0].double().log_softmax(-1)
    return float(np.mean([float(logp[len(prompt) + i - 1, t]) for i, t in enumerate(e.reply_ids)]))


@pytest.mark.parametrize("proven", [True, False])
def test_evidence_is_the_difference_of_two_mean_logprobs(
    read: tuple[RunDir, Any], proven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, chat = read
    monkeypatch.setattr(chat, "loop_proven", proven)
    exchanges = [e for e in read_exchanges(run) if e.reply_ids]
    neutral = ["", "Help.", "Answer me."]
    verdicts = {v.key: v for v in LikelihoodJudge(chat, neutral).judge(exchanges)}
    assert len(verdicts) == len(exchanges) >= 25
    seen = set()
    for e in exchanges:
        if e.persona == DEFAULT:
            other = neutral[(neutral.index(e.system_prompt) + 1) % 3]
        else:
            other = ""
        expected = direct_logprob(chat, e.system_prompt, e) - direct_logprob(chat, other, e)
        assert verdicts[e.key].status == "ok"
        assert verdicts[e.key].score is None
        assert verdicts[e.key].evidence == pytest.approx(expected, abs=2e-4)
        seen.add(round(expected, 3))
    assert len(seen) > 20


def test_stored_logprobs_are_those_of_reading_again(read: tuple[RunDir, Any]) -> None:
    run, chat = read
    exchanges = [e for e in read_exchanges(run) if e.reply_ids]
    for e, again in zip(exchanges, with_logprobs(chat, exchanges), strict=True):
        assert again.logprob == pytest.approx(e.logprob, abs=2e-4)
        assert again.reply_ids == e.reply_ids


def test_one_neutral_prompt_is_compared_with_something_else(read: tuple[RunDir, Any]) -> None:
    _, chat = read
    ids = tuple(range(30, 36))
    for neutral, other in (([""], PLAIN_PROMPT), (["Help."], "")):
        e = Exchange("k", DEFAULT, "", neutral[0], "Why?", "x", ids)
        [e] = with_logprobs(chat, [e])
        [verdict] = LikelihoodJudge(chat, neutral).judge([e])
        expected = direct_logprob(chat, neutral[0], e) - direct_logprob(chat, other, e)
        assert verdict.evidence == pytest.approx(expected, abs=2e-4)
        assert abs(expected) > 1e-3


def test_a_reply_without_tokens_gets_no_number(read: tuple[RunDir, Any]) -> None:
    _, chat = read
    [verdict] = LikelihoodJudge(chat, [""]).judge([Exchange("k", "bard", "", "Sing.", "Why?", "")])
    assert verdict == Verdict("k", "failed", detail="the reply has no content tokens")


# ---- the null ----------------------------------------------------------------------------------------------------


def test_the_null_is_the_95th_percentile_of_default_replies_alone(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", small_plan(3, 8))  # 24 default replies, 24 of roles
    generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING)
    values = {row.key: float(i) for i, row in enumerate(run.plan.rows)}
    judge_rollouts(run, evidence_judge(lambda e: values[e.key] if e.persona == DEFAULT else 1e6))
    null = null_of(run, "likelihood")
    assert null.n == 24
    assert null.mean == pytest.approx(11.5)
    assert null.threshold == pytest.approx(0.95 * 23)
    assert Null(**json.loads(json.dumps(null.to_dict()))) == null


def test_failed_default_replies_are_left_out_of_the_null(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", small_plan(3, 8))
    generate_rollouts(run, stub_chat(), ScriptedEngine(), SAMPLING)
    judge_rollouts(run, failing({row.key for row in run.plan.rows[:4]}))
    assert null_of(run, "likelihood").n == 20


def test_too_few_default_replies_make_no_null() -> None:
    Null.of([0.0] * NULL_REPLIES)
    with pytest.raises(JudgeError, match=r"Only 19 default replies .* at least 20.*more --questions"):
        Null.of([0.0] * (NULL_REPLIES - 1))


def test_verdict_shards_carry_the_configuration(run: RunDir) -> None:
    judge_rollouts(run, evidence_judge(length))
    assert is_complete(run.judge("likelihood"), shard_name(0), run.config_hash)
    with pytest.raises(RunConflict, match="another configuration"):
        is_complete(run.judge("likelihood"), shard_name(0), "other")
