"""Role prompts answered plain, steered away and held: the first look at what capping does.

Replies are scored by the plain model whatever wrote them: evidence says how much the reply looks like the role, not how
surprised the intervened model was. The price is the perplexity of stored neutral replies under the held model over
that under the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona_axis.collect.judging import read_exchanges
from persona_axis.collect.plan import DEFAULT, PlanRow
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange
from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.geometry.fit import Interval
from persona_axis.steering import interventions
from persona_axis.steering.calibration import Teacher
from persona_axis.steering.policy import Policy
from persona_axis.study.measures import Measures, neutral_passages

FLOOR_PERCENTILE = 75  # toward the Assistant; the reference's "p0.25" on its negated axis
CAPPED_LAYERS = 8
NEUTRAL_REPLIES = 60
WAYS = ("plain", "steered", "capped")


@dataclass(frozen=True, slots=True)
class HeldReplies:
    """One rollout of the plan answered three ways; evidence in nats per token."""

    row: PlanRow
    replies: dict[str, str]
    evidence: dict[str, float | None]


@dataclass(frozen=True)
class Held:
    """What steering and capping did."""

    policy: Policy
    strength: float  # of the steering, residual-stream units along the axis
    rows: list[HeldReplies]
    mean_evidence: dict[str, Interval]
    perplexity_ratio: float


def middle_late_layers(layers: Sequence[int], n_layers: int, count: int = CAPPED_LAYERS) -> list[int]:
    """Up to ``count`` consecutive captured layers from two thirds of the model's depth on (20-27 of 30)."""
    start = 2 * n_layers // 3
    window = [layer for layer in layers if layer >= start][:count]
    if not window:
        raise UsageError("No captured layer lies in the last third of the model; capture more --layers.")
    return window


def hold_demo(run: RunDir, measures: Measures, axis: Axis, rows: Sequence[PlanRow], seed: int) -> Held:
    """Answer ``rows`` (role prompts of the plan) plain, steered away from the Assistant, and capped.

    The plain replies are the run's own; the others use the same random streams.
    """
    n_layers = measures.chat.n_layers
    policy = Policy.at_percentile(axis, middle_late_layers(axis.layers, n_layers), FLOOR_PERCENTILE)
    strength = -float(axis.at().norm())  # one Assistant-to-roles distance away
    away = Policy((interventions.add(axis.layer, axis.at(), strength),))
    stored = list(read_exchanges(run))
    keys = {row.key for row in rows}
    ways = {
        "plain": [e for e in stored if e.key in keys],
        "steered": measures.answers(away, rows),
        "capped": measures.answers(policy, rows),
    }
    said = {way: {e.key: e.reply for e in exchanges} for way, exchanges in ways.items()}
    evidence = {way: _evidence(measures, exchanges) for way, exchanges in ways.items()}
    held = [
        HeldReplies(row, {way: said[way][row.key] for way in WAYS}, {way: evidence[way].get(row.key) for way in WAYS})
        for row in rows
    ]
    means = {way: _mean_interval(held, way, seed) for way in WAYS}
    return Held(policy, strength, held, means, perplexity_ratio(measures, stored, policy, seed))


def _evidence(measures: Measures, exchanges: list[Exchange]) -> dict[str, float | None]:
    return {verdict.key: verdict.evidence for verdict in measures.judge.judge(exchanges)}


def _mean_interval(rows: list[HeldReplies], way: str, seed: int, draws: int = 1000) -> Interval:
    """Mean evidence with a bootstrap over roles (a role's replies stay together)."""
    by_role: dict[str, list[float]] = {}
    for row in rows:
        value = row.evidence[way]
        if value is not None:
            by_role.setdefault(row.row.persona, []).append(value)
    means = np.array([np.mean(values) for values in by_role.values()])
    picks = np.random.default_rng(seed).integers(len(means), size=(draws, len(means)))
    low, high = np.percentile(means[picks].mean(1), [2.5, 97.5])
    return Interval(float(means.mean()), float(low), float(high))


def perplexity_ratio(measures: Measures, stored: Sequence[Exchange], policy: Policy, seed: int) -> float:
    """Token-weighted perplexity of stored neutral replies (:data:`NEUTRAL_REPLIES` at most), held over plain."""
    neutral = [e for e in stored if e.persona == DEFAULT and e.reply_ids]
    read = measures.neutral(policy, neutral_passages(measures.chat, neutral[:: -(-len(neutral) // NEUTRAL_REPLIES)]))
    return Teacher.of(read).perplexity_ratio(seed).value
