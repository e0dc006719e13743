"""Candidates in rounds: what is measured and when, and that figures are those of the replies."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import make_questions, make_roles, small_plan

from persona_axis.collect.plan import DEFAULT, Plan, PlanRow, make_plan
from persona_axis.collect.verdicts import Exchange
from persona_axis.errors import FitError
from persona_axis.geometry.axis import Axis
from persona_axis.model.reading import Passage
from persona_axis.steering.calibration import Candidate, Fluency, Rung, rungs, survivors
from persona_axis.steering.policy import Policy
from persona_axis.study.half import Half, halves
from persona_axis.study.ledger import PLAIN, Ledger
from persona_axis.study.measures import NeutralFigure, ReplyFigure
from persona_axis.study.sweep import Material, Outcome, Sweep, spread_neutral, spread_rows

LIMIT = 1.02
NEUTRAL = Fluency(2.5, 0.0, 0.0)
CANDIDATES = [Candidate((i, i + 1), p) for i in range(4) for p in (25.0, 50.0, 75.0)]


def number(*what: str) -> np.random.Generator:
    return np.random.default_rng(list("/".join(what).encode()))


class Scripted:
    """Stands in for :class:`Measures`: figures made from policy and key, and a record of what was asked."""

    def __init__(self, empty: str = "") -> None:
        self.asked: Counter[tuple[str, str, str]] = Counter()
        self.calls: list[tuple[str, str, list[str]]] = []
        self.empty = empty  # a policy under which every reply is

    def _asked(self, what: str, policy: str, keys: list[str]) -> None:
        self.calls.append((what, policy, keys))
        self.asked.update((what, policy, key) for key in keys)

    def _reply(self, policy: str, key: str) -> ReplyFigure:
        if policy == self.empty or (policy != PLAIN and number(policy, key).random() < 0.15):
            return ReplyFigure(key, (), None, 0.0)
        random = number(policy, key)
        ids = tuple(random.integers(0, 50, 9).tolist())
        left = 1.0 if policy == PLAIN else number(policy).random()
        return ReplyFigure(key, ids, float(0.5 * left + 0.2 * random.normal()), float(-9 - 2 * left))

    def plain(self, exchanges: Sequence[Exchange], evidence: dict[str, float]) -> list[ReplyFigure]:
        self._asked("reply", PLAIN, [e.key for e in exchanges])
        return [self._reply(PLAIN, e.key) for e in exchanges]

    def replies(self, policy: Policy, rows: Sequence[PlanRow]) -> list[ReplyFigure]:
        self._asked("reply", policy.content_hash, [row.key for row in rows])
        return [self._reply(policy.content_hash, row.key) for row in reversed(rows)]

    def neutral(self, policy: Policy, passages: Sequence[Passage]) -> list[NeutralFigure]:
        self._asked("neutral", policy.content_hash, [p.key for p in passages])
        found = []
        for p in passages:
            random, price = number(policy.content_hash, p.key), number("price", policy.content_hash).random()
            n = int(random.integers(3, 12))
            found.append(NeutralFigure(p.key, n, -1.0 * n, -1.0 * n - 0.04 * price * n, float(n - 1), 0.01 * n))
        return found


@pytest.fixture
def plan() -> Plan:
    return small_plan(8, 14)


@pytest.fixture
def policies() -> dict[Candidate, Policy]:
    axis = Axis(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), (0, 1, 2, 3, 4), 2)
    return {c: Policy.cap(axis, dict.fromkeys(c.layers, c.percentile / 10)) for c in CANDIDATES}


def exchange(row: PlanRow) -> Exchange:
    return Exchange(row.key, row.persona, row.rubric, row.system_prompt, row.question, "hm", (1, 2), -1.0)


def a_material(plan: Plan, half: Half, most: int = 99) -> Material:
    rows = spread_rows(plan, half, 0, most)
    passages = [Passage(f"n{i}", (1, 2, 3), ((1, 3),)) for i in range(20)]
    return Material(rows, {row.key: exchange(row) for row in rows}, passages, NEUTRAL)


def a_sweep(path: Path, plan: Plan, measures: Scripted | None = None, **options: Any) -> tuple[Sweep, Scripted]:
    measures = measures or Scripted()
    material = a_material(plan, halves(plan, 0)[0])
    return Sweep(measures, Ledger(path, "config"), material, {}, 0, **options), measures  # type: ignore[arg-type]


# ---- what candidates are measured on -----------------------------------------------------------------------------


def test_any_first_few_prompts_are_spread_over_the_roles(plan: Plan) -> None:
    half, other = halves(plan, 0)
    rows = spread_rows(plan, half, 0, 999)
    assert len(rows) == len({row.key for row in rows}) == 4 * 7
    assert all(half.holds(row) and row.persona != DEFAULT for row in rows)
    for n in range(1, 29):
        counts = Counter(row.persona for row in rows[:n])
        assert max(counts.values()) - min(counts[role] for role in half.roles) <= 1
        assert spread_rows(plan, half, 0, n) == rows[:n]
    assert spread_rows(plan, half, 1, 999) != rows
    assert len({row.question_index for row in rows[:8]}) > 3  # not all of a question
    assert not {row.key for row in rows} & {row.key for row in spread_rows(plan, other, 0, 999)}


def test_neutral_replies_are_shuffled_and_fewer_are_the_first_of_more(plan: Plan) -> None:
    default = [exchange(row) for row in plan.rows if row.persona == DEFAULT]
    all_of_them = spread_neutral(default, 0, 999)
    assert sorted(e.key for e in all_of_them) == sorted(e.key for e in default)
    assert all_of_them != default != spread_neutral(default, 1, 999)
    assert spread_neutral(default, 0, 5) == all_of_them[:5]


# ---- rounds ------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_twice_and_later_rounds_go_on(
    tmp_path: Path, plan: Plan, policies: dict[Candidate, Policy]
) -> None:
    steps: list[int] = []
    sweep, measures = a_sweep(tmp_path / "j", plan, on_step=lambda: steps.append(1))
    rounds = rungs(len(policies), 28, 20)
    assert [(r.candidates, r.prompts) for r in rounds] == [(12, 9), (4, 28)]
    outcomes = sweep.halving(policies, rounds, LIMIT)
    assert set(measures.asked.values()) == {1}
    assert len(steps) == sum(r.candidates for r in rounds)
    assert outcomes.keys() == policies.keys()
    last = {c for c, o in outcomes.items() if o.prompts == 28}
    for c, policy in policies.items():
        answered = [call[2] for call in measures.calls if call[:2] == ("reply", policy.content_hash)]
        read = [call[2] for call in measures.calls if call[:2] == ("neutral", policy.content_hash)]
        assert [len(keys) for keys in answered] == ([9, 19] if c in last else [9])
        assert [len(keys) for keys in read] == ([7, 13] if c in last else [7])
        assert list(itertools.chain(*answered)) == [row.key for row in sweep.material.rows[: outcomes[c].prompts]]
        assert (outcomes[c].prompts, outcomes[c].neutral_replies) == ((28, 20) if c in last else (9, 7))
    first = [replace(sweep.outcome(c, policies[c], 9, 7).scored, fluent=True) for c in policies]
    assert last == set(survivors(first, 4, LIMIT))
    assert set(measures.asked.values()) == {1}


def test_another_process_measures_what_is_left(tmp_path: Path, plan: Plan, policies: dict[Candidate, Policy]) -> None:
    """After any number of records: the same figures, and nothing twice over both."""
    rounds = rungs(len(policies), 28, 20)
    whole, once = a_sweep(tmp_path / "whole", plan)
    expected = whole.halving(policies, rounds, LIMIT)
    for stop in (1, 2, 9, 26):

        class Killed(Exception):
            pass

        sweep, measures = a_sweep(tmp_path / f"j{stop}", plan)
        add, left = sweep.ledger.add, iter(range(stop))

        def dying(*args: Any, add: Any = add, left: Any = left, **kwargs: Any) -> None:
            if next(left, None) is None:
                raise Killed
            add(*args, **kwargs)

        sweep.ledger.add = dying  # type: ignore[method-assign]
        with pytest.raises(Killed):
            sweep.halving(policies, rounds, LIMIT)
        lost = measures.calls.pop()  # measured, and not written
        again, more = a_sweep(tmp_path / f"j{stop}", plan)
        found = again.halving(policies, rounds, LIMIT)
        assert [figures(o) for o in found.values()] == [figures(o) for o in expected.values()]
        assert list(found) == list(expected)
        assert measures.calls + more.calls == once.calls
        assert lost == more.calls[0]


def figures(o: Outcome) -> dict[str, Any]:
    return {name: value for name, value in vars(o).items() if name != "policy"}


# ---- figures -----------------------------------------------------------------------------------------------------


def test_an_outcome_is_that_of_its_replies(tmp_path: Path, plan: Plan, policies: dict[Candidate, Policy]) -> None:
    sweep, measures = a_sweep(tmp_path / "j", plan)
    candidate, policy = next(iter(policies.items()))
    found = sweep.outcome(candidate, policy, 25, 11)
    rows = sweep.material.rows[:25]
    plain = {row.key: measures._reply(PLAIN, row.key) for row in rows}
    held = {row.key: measures._reply(policy.content_hash, row.key) for row in rows}
    known = [key for key in held if held[key].pressure is not None]
    assert found.missing == 25 - len(known) > 0
    total = {side: sum(figures[key].pressure or 0 for key in known) for side, figures in (("p", plain), ("h", held))}
    assert found.plain_pressure == pytest.approx(total["p"] / len(known))
    for role, means in found.by_role.items():
        mine = [key for key in known if key.split("/")[0] == role]
        expected = [np.mean([side[key].pressure for key in mine]) for side in (plain, held)]
        assert means == pytest.approx(tuple(expected))
    assert found.pressure == pytest.approx(total["h"] / len(known))
    assert found.reduction.value == pytest.approx(1 - total["h"] / total["p"])
    for side, reads in ((held, found.held_fluency), (plain, found.plain_fluency)):
        tokens = sum(len(f.ids) for f in side.values())
        assert reads.perplexity == pytest.approx(math.exp(-sum(f.neutral_logprob for f in side.values()) / tokens))
        assert reads.empty == sum(not f.ids for f in side.values()) / 25
    assert found.neutral_fluency == NEUTRAL
    read = measures.neutral(policy, sweep.material.passages[:11])
    tokens = sum(n.tokens for n in read)
    assert found.perplexity_ratio.value == pytest.approx(math.exp(sum(n.plain - n.held for n in read) / tokens))
    assert found.top1_agreement.value == pytest.approx(sum(n.agree for n in read) / tokens)
    assert found.mean_kl.value == pytest.approx(0.01)
    assert found.scored.fluent == (not found.objections)


def test_several_prompts_of_a_role_and_question_are_one_pair(tmp_path: Path, policies: dict[Candidate, Policy]) -> None:
    """The crossed design: pairs are averaged over prompts first, and what is missing is counted in prompts."""
    plan = make_plan(make_roles(8, prompts=3), make_questions(14), ("", "Help."), design="crossed")
    sweep, measures = a_sweep(tmp_path / "j", plan)
    candidate, policy = next(iter(policies.items()))
    found = sweep.outcome(candidate, policy, 84, 5)
    cells: dict[tuple[str, int], list[tuple[float, float]]] = {}
    missing = 0
    for row in sweep.material.rows:
        p, h = (measures._reply(name, row.key).pressure for name in (PLAIN, policy.content_hash))
        if p is None or h is None:
            missing += 1
        else:
            cells.setdefault((row.persona, row.question_index), []).append((p, h))
    assert len(cells) == 28
    means = np.array([np.mean(pairs, 0) for pairs in cells.values()])
    assert found.missing == missing > 0
    assert found.prompts == 84
    assert found.reduction.value == pytest.approx(1 - means[:, 1].mean() / means[:, 0].mean())


def test_a_candidate_that_silences_the_model_is_not_fluent_and_ends_nothing(
    tmp_path: Path, plan: Plan, policies: dict[Candidate, Policy]
) -> None:
    silent = CANDIDATES[0]
    sweep, _ = a_sweep(tmp_path / "j", plan, Scripted(empty=policies[silent].content_hash))
    outcomes = sweep.halving(policies, [Rung(12, 9, 6), Rung(3, 28, 20)], LIMIT)
    mine = outcomes[silent]
    assert (mine.prompts, mine.missing, mine.pressure, mine.plain_pressure) == (9, 9, None, None)
    assert (mine.reduction.value, mine.reduction.low, mine.reduction.high) == (0, 0, 1)
    assert any("100.0% empty replies" in said for said in mine.objections)


def test_a_model_that_plays_no_role_is_said(tmp_path: Path, plan: Plan, policies: dict[Candidate, Policy]) -> None:
    measures = Scripted()
    measures._reply = lambda policy, key: ReplyFigure(key, (1, 2), -0.1, -2.0)  # type: ignore[method-assign]
    sweep, _ = a_sweep(tmp_path / "j", plan, measures)
    with pytest.raises(FitError, match="show no pressure"):
        sweep.outcome(CANDIDATES[0], policies[CANDIDATES[0]], 9, 6)
