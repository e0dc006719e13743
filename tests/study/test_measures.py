"""What replies and predictions of a held model are measured to be, on a tiny model against plain forwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_axis.collect.judging import read_exchanges
from persona_axis.collect.plan import DEFAULT, PlanRow
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange
from persona_axis.geometry.axis import Axis
from persona_axis.model.loading import ChatModel
from persona_axis.steering.calibration import Teacher
from persona_axis.steering.hooks import held
from persona_axis.steering.policy import Policy
from persona_axis.study import measures as measures_module
from persona_axis.study.calibrate import evidence_of
from persona_axis.study.measures import Measures, ReplyFigure, neutral_passages

Make = Callable[..., Measures]


@pytest.fixture
def run(halvable_run: Path) -> RunDir:
    return RunDir.load(halvable_run)


@pytest.fixture
def axis(halvable_run: Path) -> Axis:
    return Axis.load(halvable_run)


@pytest.fixture
def rows(run: RunDir) -> list[PlanRow]:
    """A few role prompts of each role."""
    return [row for row in run.plan.rows if row.persona != DEFAULT][::9]


@pytest.fixture
def said(run: RunDir) -> dict[str, Exchange]:
    return {e.key: e for e in read_exchanges(run)}


def never_crossed(axis: Axis) -> Policy:
    return Policy.cap(axis, dict.fromkeys(axis.layers, -1e9))


def by_key(figures: Sequence[ReplyFigure]) -> dict[str, ReplyFigure]:
    return {f.key: f for f in figures}


@torch.inference_mode()
def log_probabilities(chat: ChatModel, system: str, question: str, reply: Sequence[int]) -> np.ndarray:
    """Of the whole vocabulary at every token of the reply, ``[n, vocabulary]`` float64, by one plain forward."""
    prompt = chat.template.prompt_ids(chat.template.messages(system, question))
    logits = chat.model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1).numpy()


def of_tokens(table: np.ndarray, reply: Sequence[int]) -> np.ndarray:
    return table[np.arange(len(reply)), list(reply)]


# ---- replies under role prompts ----------------------------------------------------------------------------------


def test_plain_figures_come_from_stored_verdicts_and_are_those_computed(
    make_measures: Make, run: RunDir, rows: list[PlanRow], said: dict[str, Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = [said[row.key] for row in rows]
    computed = by_key(make_measures().plain(exchanges, {}))
    measures = make_measures()
    asked: list[str] = []
    monkeypatch.setattr(measures.judge, "without_role", lambda es: iter([asked.append(e.key) for e in es] and []))
    evidence = evidence_of(run, "likelihood")
    stored = by_key(measures.plain(exchanges, evidence))
    assert not asked  # nothing is read again
    assert stored.keys() == computed.keys() == {row.key for row in rows}
    for key, mine in stored.items():
        assert mine.ids == computed[key].ids == said[key].reply_ids
        if mine.ids:
            assert mine.pressure == pytest.approx(evidence[key], abs=1e-6)
            assert mine.pressure == pytest.approx(computed[key].pressure, abs=1e-4)
            assert mine.neutral_logprob == pytest.approx(computed[key].neutral_logprob, abs=1e-3)


def test_they_are_the_plain_model_s_log_probabilities(
    make_measures: Make, chat: ChatModel, rows: list[PlanRow], said: dict[str, Exchange]
) -> None:
    """Pressure: nats per token under the role prompt above no system message. Fluency: the sum under the latter."""
    figures = by_key(make_measures().plain([said[row.key] for row in rows], {}))
    for row in rows:
        found, ids = figures[row.key], said[row.key].reply_ids
        if not ids:
            assert (found.pressure, found.neutral_logprob) == (None, 0)
            continue
        own = of_tokens(log_probabilities(chat, row.system_prompt, row.question, ids), ids)
        without = of_tokens(log_probabilities(chat, "", row.question, ids), ids)
        assert found.pressure == pytest.approx((own - without).mean(), abs=1e-4)
        assert found.neutral_logprob == pytest.approx(without.sum(), abs=1e-3)


def test_a_cap_that_changes_nothing_leaves_every_reply_and_figure(
    make_measures: Make, axis: Axis, rows: list[PlanRow], said: dict[str, Exchange]
) -> None:
    """The same prompts, lengths and random streams as the run's own."""
    measures = make_measures()
    plain = by_key(measures.plain([said[row.key] for row in rows], {}))
    held_ = by_key(measures.replies(never_crossed(axis), rows))
    assert held_.keys() == plain.keys()
    for key, mine in held_.items():
        assert mine.ids == plain[key].ids
        assert mine.pressure == pytest.approx(plain[key].pressure, abs=1e-4)
        assert mine.neutral_logprob == pytest.approx(plain[key].neutral_logprob, abs=1e-3)


def test_held_replies_are_scored_by_the_plain_model(
    make_measures: Make, chat: ChatModel, axis: Axis, rows: list[PlanRow], said: dict[str, Exchange]
) -> None:
    policy = Policy.at_percentile(axis, axis.layers, 75)
    measures = make_measures()
    measures.plain([said[row.key] for row in rows], {})  # leaves prompts computed by the plain model behind
    figures = by_key(measures.replies(policy, rows))
    assert figures.keys() == {row.key for row in rows}
    changed = differs = 0
    for row in rows:
        found = figures[row.key]
        changed += found.ids != said[row.key].reply_ids
        if not found.ids:
            continue
        own = of_tokens(log_probabilities(chat, row.system_prompt, row.question, found.ids), found.ids)
        without = of_tokens(log_probabilities(chat, "", row.question, found.ids), found.ids)
        assert found.pressure == pytest.approx((own - without).mean(), abs=1e-4)
        assert found.neutral_logprob == pytest.approx(without.sum(), abs=1e-3)
        with held(chat, policy):
            surprised = of_tokens(log_probabilities(chat, row.system_prompt, row.question, found.ids), found.ids)
        differs += abs(surprised.mean() - own.mean()) > 0.01
    assert changed > len(rows) / 2
    assert differs > len(rows) / 2


def test_an_empty_reply_has_no_pressure(make_measures: Make, said: dict[str, Exchange], rows: list[PlanRow]) -> None:
    [whole, *_] = [said[row.key] for row in rows if said[row.key].reply_ids]
    empty = Exchange("x", "bard", "", "You are a bard.", "Why?", "", (), None)
    found = by_key(make_measures().plain([empty, whole], {}))
    assert found["x"] == ReplyFigure("x", (), None, 0.0)
    assert found[whole.key].pressure is not None


def test_another_measure_is_asked_about_replies_with_their_log_probability(
    make_measures: Make, axis: Axis, rows: list[PlanRow], said: dict[str, Exchange]
) -> None:
    asked: list[Exchange] = []

    def measure(exchanges: Sequence[Exchange]) -> dict[str, np.float32]:
        asked.extend(exchanges)
        return {e.key: np.float32(len(e.reply)) for e in exchanges if e.persona != "bard"}

    figures = make_measures(measure).replies(never_crossed(axis), rows)
    assert {e.key for e in asked} == {row.key for row in rows if said[row.key].reply_ids}
    assert all(e.logprob is not None and e.logprob < 0 and e.system_prompt for e in asked)
    for f in figures:
        whose = said[f.key]
        known = bool(whose.reply_ids) and whose.persona != "bard"
        assert f.pressure == (len(whose.reply) if known else None)
        assert type(f.pressure) in (float, type(None))  # what a ledger can hold
        assert (f.neutral_logprob < 0) == bool(whose.reply_ids)


def test_figures_survive_their_record() -> None:
    for figure in (ReplyFigure("k", (3, 4), 0.1 + 0.2, -1.5), ReplyFigure("e", (), None, 0.0)):
        assert ReplyFigure.from_dict(figure.to_dict()) == figure


# ---- neutral replies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "reply", "decode"])
def test_neutral_figures_are_those_of_whole_softmaxes(
    make_measures: Make, chat: ChatModel, axis: Axis, said: dict[str, Exchange], positions: str
) -> None:
    """Token by token in float64, the held model's logits from a forward over prompt and reply.

    Only a policy for all positions is compared with a bare forward: others must be told what passes.
    """
    policy = Policy.at_percentile(axis, axis.layers, 75, positions=positions)  # type: ignore[arg-type]
    neutral = [e for e in said.values() if e.persona == DEFAULT and e.reply_ids][:9]
    measures = make_measures()
    figures = {f.key: f for f in measures.neutral(policy, neutral_passages(chat, neutral))}
    assert figures.keys() == {e.key for e in neutral}
    for e in neutral:
        found = figures[e.key]
        p = log_probabilities(chat, e.system_prompt, e.question, e.reply_ids)
        assert found.tokens == len(e.reply_ids)
        assert found.plain == pytest.approx(of_tokens(p, e.reply_ids).sum(), abs=1e-3)
        assert e.logprob is not None
        assert found.plain == pytest.approx(e.logprob * found.tokens, abs=1e-3)  # as when it was generated
        assert 0 <= found.agree <= found.tokens
        if positions == "all":
            with held(chat, policy):
                q = log_probabilities(chat, e.system_prompt, e.question, e.reply_ids)
            assert found.held == pytest.approx(of_tokens(q, e.reply_ids).sum(), rel=1e-4, abs=1e-3)
            assert found.agree == (p.argmax(-1) == q.argmax(-1)).sum()
            assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-3, abs=1e-3)
    assert sum(abs(f.held - f.plain) for f in figures.values()) > 1


def test_positions_differ_in_price(make_measures: Make, chat: ChatModel, axis: Axis, said: dict[str, Exchange]) -> None:
    """Holding the reply only leaves its first prediction, which is made from the prompt, as it was."""
    neutral = [e for e in said.values() if e.persona == DEFAULT and len(e.reply_ids) == 1][:3]
    assert neutral
    passages = neutral_passages(chat, neutral)
    for positions, same in (("all", False), ("decode", True)):
        policy = Policy.at_percentile(axis, axis.layers, 75, positions=positions)  # type: ignore[arg-type]
        found = make_measures().neutral(policy, passages)
        assert all((f.held == pytest.approx(f.plain, abs=1e-5)) == same for f in found)


def test_neutral_replies_are_read_under_the_next_neutral_prompt(
    make_measures: Make, chat: ChatModel, said: dict[str, Exchange]
) -> None:
    default = [e for e in said.values() if e.persona == DEFAULT and e.reply_ids][:6]
    found = make_measures().neutral_fluency(default, {})
    total, tokens = 0.0, 0
    for e in default:
        other = make_measures().judge.next_prompt[e.system_prompt]
        assert other != e.system_prompt
        table = log_probabilities(chat, other, e.question, e.reply_ids)
        total, tokens = total + float(of_tokens(table, e.reply_ids).sum()), tokens + len(e.reply_ids)
    assert found.perplexity == pytest.approx(np.exp(-total / tokens), rel=1e-4)
    evidence = {v.key: v.evidence for v in make_measures().judge.judge(default) if v.evidence is not None}
    assert make_measures().neutral_fluency(default, evidence).perplexity == pytest.approx(found.perplexity, rel=1e-4)


def test_a_cap_that_changes_nothing_costs_exactly_nothing(
    make_measures: Make, chat: ChatModel, axis: Axis, said: dict[str, Exchange]
) -> None:
    neutral = [e for e in said.values() if e.persona == DEFAULT][:20]
    figures = make_measures().neutral(never_crossed(axis), neutral_passages(chat, neutral))
    assert len(figures) == sum(bool(e.reply_ids) for e in neutral)
    assert all((f.held, f.agree, f.kl) == (f.plain, f.tokens, 0.0) for f in figures)
    assert Teacher.of(figures).perplexity_ratio(0).value == 1.0


def test_the_plain_side_is_read_once(
    make_measures: Make, chat: ChatModel, axis: Axis, said: dict[str, Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never while the model is held: read twice or in another order, a policy's figures are the same."""
    passages = neutral_passages(chat, [e for e in said.values() if e.persona == DEFAULT and e.reply_ids][:12])
    one, two = (Policy.at_percentile(axis, axis.layers, p) for p in (50, 75))
    alone = {f.key: f for f in make_measures().neutral(two, passages)}
    measures = make_measures()
    measures.neutral(one, passages[:5])
    measures.neutral(one, passages[5:])
    read: list[int] = []
    states = measures_module.predicting_states
    monkeypatch.setattr(measures_module, "predicting_states", lambda c, p: read.append(len(p)) or states(c, p))
    for f in measures.neutral(two, passages):
        assert f.plain == pytest.approx(alone[f.key].plain, abs=1e-4)
        assert f.held == pytest.approx(alone[f.key].held, rel=1e-4, abs=1e-4)
        assert math.isclose(f.kl, alone[f.key].kl, rel_tol=1e-3, abs_tol=1e-4)
    assert read == [0, len(passages)]
