"""Candidates against each other on one half of a run: successive halving, each round on more of the same prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from persona_axis.collect.plan import Plan, PlanRow
from persona_axis.collect.verdicts import Exchange
from persona_axis.geometry.fit import Interval
from persona_axis.model.reading import Passage
from persona_axis.steering.calibration import (
    Candidate,
    Fluency,
    Paired,
    Rung,
    Scored,
    Teacher,
    fluency,
    objections,
    survivors,
)
from persona_axis.steering.policy import Policy
from persona_axis.study.half import Half
from persona_axis.study.ledger import PLAIN, Ledger
from persona_axis.study.measures import Measures, ReplyFigure

OnStep = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Material:
    """What candidates are measured on in one half, in the order in which rounds take it.

    Attributes:
        rows: role prompts of the plan; any first few of them are spread over the roles.
        exchanges: the run's own replies to them.
        passages: neutral replies.
        neutral: how the run's own neutral replies of this half read.
    """

    rows: list[PlanRow]
    exchanges: dict[str, Exchange]
    passages: list[Passage]
    neutral: Fluency


def spread_rows(plan: Plan, half: Half, seed: int, most: int) -> list[PlanRow]:
    """The half's role prompts, shuffled, role after role in turn; at most ``most``."""
    dealer = random.Random(f"{seed}/rows")
    queues = []
    for role in half.roles:
        mine = [row for row in plan.rows if row.persona == role and row.block in half.blocks]
        dealer.shuffle(mine)
        queues.append(mine)
    dealer.shuffle(queues)
    longest = max(map(len, queues))
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)][:most]


def spread_neutral(exchanges: Sequence[Exchange], seed: int, most: int) -> list[Exchange]:
    """Neutral replies, shuffled."""
    chosen = list(exchanges)
    random.Random(f"{seed}/neutral").shuffle(chosen)
    return chosen[:most]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything measured of one candidate on one half.

    Attributes:
        prompts, missing: role prompts answered, and those without a pressure on both sides (left out of it).
        reduction: of pressure.
        pressure: its mean, held; plain beside it. None when no pair has one.
        by_role: each role's mean pressure, plain and held. A role that is much like the Assistant keeps its own: it is
            hardly below any floor.
        perplexity_ratio, top1_agreement, mean_kl: on neutral replies.
        objections: why its replies are not fluent, [] when they are.
    """

    candidate: Candidate
    policy: Policy
    prompts: int
    missing: int
    reduction: Interval
    pressure: float | None
    plain_pressure: float | None
    by_role: dict[str, tuple[float, float]]
    neutral_replies: int
    perplexity_ratio: Interval
    top1_agreement: Interval
    mean_kl: Interval
    held_fluency: Fluency
    plain_fluency: Fluency
    neutral_fluency: Fluency
    objections: list[str]

    @property
    def scored(self) -> Scored:
        return Scored(self.candidate, self.reduction, self.perplexity_ratio, not self.objections)


class Sweep:
    """Measures candidates on one half; what the ledger holds is not measured again."""

    def __init__(
        self,
        measures: Measures,
        ledger: Ledger,
        material: Material,
        evidence: dict[str, float],
        seed: int,
        on_step: OnStep = lambda: None,
    ) -> None:
        """
        Args:
            evidence: the likelihood judge's verdicts on the run's own replies, {} when another judge judged.
            on_step: told after each candidate of each round.
        """
        self.measures = measures
        self.ledger = ledger
        self.material = material
        self.evidence = evidence
        self.seed = seed
        self.on_step = on_step

    def halving(
        self, policies: dict[Candidate, Policy], rounds: Sequence[Rung], limit: float
    ) -> dict[Candidate, Outcome]:
        """Every candidate's outcome in the last round that it reached.

        The few replies of the first round say too little of fluency to lose a candidate by it.
        """
        found: dict[Candidate, Outcome] = {}
        left = list(policies)
        for i, rung in enumerate(rounds):
            outcomes = [self.outcome(c, policies[c], rung.prompts, rung.neutral) for c in left]
            found |= {o.candidate: o for o in outcomes}
            scored = [replace(o.scored, fluent=True) if i == 0 else o.scored for o in outcomes]
            if i + 1 < len(rounds):
                left = survivors(scored, rounds[i + 1].candidates, limit)
        return found

    def outcome(self, candidate: Candidate, policy: Policy, prompts: int, neutral: int) -> Outcome:
        """Measure a candidate on the first so many role prompts and neutral replies."""
        rows, passages = self.material.rows[:prompts], self.material.passages[:neutral]
        self._measure_plain(rows)
        self._measure(policy, rows, passages)
        self.on_step()
        name = policy.content_hash
        keys = [row.key for row in rows]
        plain = [self.ledger.replies[PLAIN][key] for key in keys]
        held = [self.ledger.replies[name][key] for key in keys]
        read = [self.ledger.neutral[name][p.key] for p in passages]
        paired = _paired(rows, plain, held)
        both = np.isfinite(paired.plain) & np.isfinite(paired.held)
        teacher = Teacher.of(read)
        held_reads, plain_reads = (
            fluency([r.ids for r in side], [r.neutral_logprob for r in side]) for side in (held, plain)
        )
        return Outcome(
            candidate=candidate,
            policy=policy,
            prompts=len(rows),
            missing=sum(p.pressure is None or h.pressure is None for p, h in zip(plain, held, strict=True)),
            reduction=paired.reduction(self.seed),
            pressure=_mean(paired.held[both]),
            plain_pressure=_mean(paired.plain[both]),
            by_role=_by_role(rows, plain, held),
            neutral_replies=len(read),
            perplexity_ratio=teacher.perplexity_ratio(self.seed),
            top1_agreement=teacher.top1_agreement(self.seed),
            mean_kl=teacher.mean_kl(self.seed),
            held_fluency=held_reads,
            plain_fluency=plain_reads,
            neutral_fluency=self.material.neutral,
            objections=objections(held_reads, plain_reads, self.material.neutral),
        )

    def _measure_plain(self, rows: Sequence[PlanRow]) -> None:
        missing = self.ledger.missing_replies(PLAIN, [row.key for row in rows])
        if missing:
            exchanges = [self.material.exchanges[key] for key in missing]
            self.ledger.add(PLAIN, replies=self.measures.plain(exchanges, self.evidence))

    def _measure(self, policy: Policy, rows: Sequence[PlanRow], passages: Sequence[Passage]) -> None:
        name = policy.content_hash
        answer = set(self.ledger.missing_replies(name, [row.key for row in rows]))
        read = set(self.ledger.missing_neutral(name, [p.key for p in passages]))
        if answer:
            self.ledger.add(name, replies=self.measures.replies(policy, [row for row in rows if row.key in answer]))
        if read:
            self.ledger.add(name, neutral=self.measures.neutral(policy, [p for p in passages if p.key in read]))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _by_role(
    rows: Sequence[PlanRow], plain: Sequence[ReplyFigure], held: Sequence[ReplyFigure]
) -> dict[str, tuple[float, float]]:
    """Mean pressure, plain and held, over the prompts where both have one."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row, p, h in zip(rows, plain, held, strict=True):
        if p.pressure is not None and h.pressure is not None:
            pairs.setdefault(row.persona, []).append((p.pressure, h.pressure))
    means = {role: np.mean(values, 0).tolist() for role, values in pairs.items()}
    return {role: (mean[0], mean[1]) for role, mean in means.items()}


def _paired(rows: Sequence[PlanRow], plain: Sequence[ReplyFigure], held: Sequence[ReplyFigure]) -> Paired:
    """Pressure by role and question; several prompts of one pair are averaged over those where both sides have one."""
    roles = {role: i for i, role in enumerate(dict.fromkeys(row.persona for row in rows))}
    questions = {q: i for i, q in enumerate(dict.fromkeys(row.question_index for row in rows))}
    shape = len(roles), len(questions)
    sums, tally = np.zeros((2, *shape)), np.zeros(shape)
    alone, alone_tally = np.zeros(shape), np.zeros(shape)  # plain pressure without a held one
    for row, p, h in zip(rows, plain, held, strict=True):
        cell = roles[row.persona], questions[row.question_index]
        if p.pressure is not None and h.pressure is not None:
            sums[(slice(None), *cell)] += p.pressure, h.pressure
            tally[cell] += 1
        elif p.pressure is not None:
            alone[cell] += p.pressure
            alone_tally[cell] += 1
    both = np.where(tally > 0, sums / np.maximum(tally, 1), np.nan)
    only_plain = np.where(alone_tally > 0, alone / np.maximum(alone_tally, 1), np.nan)
    return Paired(np.where(tally > 0, both[0], only_plain), both[1])
