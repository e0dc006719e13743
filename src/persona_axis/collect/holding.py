"""Role prompts answered plain, steered away and held: the first look at what capping does.

Replies are scored by the plain model whatever wrote them: evidence says how much the reply looks like the role, not how
surprised the intervened model was. The price is the perplexity of stored neutral replies under the held model over
that under the plain one, which was recorded while they were generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from persona_axis.collect.judging import read_exchanges
from persona_axis.collect.likelihood import LikelihoodJudge, reply_passage, with_logprobs
from persona_axis.collect.plan import DEFAULT, PlanRow
from persona_axis.collect.rollouts import content_ids, shard_requests
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange
from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.geometry.fit import Interval
from persona_axis.model.engine import Engine, Sampling
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import score_passages
from persona_axis.steering.hooks import cap, steer
from persona_axis.steering.policy import Policy

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


def hold_demo(
    run: RunDir,
    chat: ChatModel,
    engine: Engine,
    axis: Axis,
    rows: Sequence[PlanRow],
    sampling: Sampling,
    judge: LikelihoodJudge,
    seed: int,
) -> Held:
    """Answer ``rows`` (role prompts of the plan) plain, steered away from the Assistant, and capped.

    The plain replies are the run's own; the others use the same random streams.
    """
    policy = Policy.at_percentile(axis, middle_late_layers(axis.layers, chat.n_layers), FLOOR_PERCENTILE)
    strength = -float(axis.at().norm())  # one Assistant-to-roles distance away
    plain = _stored(run, {row.key for row in rows})
    ways: dict[str, dict[str, Exchange]] = {"plain": plain}
    contexts: dict[str, AbstractContextManager[None]] = {
        "steered": steer(chat, axis, strength=strength),
        "capped": cap(chat, policy),
    }
    for way, context in contexts.items():
        ways[way] = _answer(chat, engine, rows, sampling, context, plain, judge)
    evidence = {way: _evidence(judge, list(exchanges.values())) for way, exchanges in ways.items()}
    held = [
        HeldReplies(
            row,
            {way: ways[way][row.key].reply for way in WAYS},
            {way: evidence[way].get(row.key) for way in WAYS},
        )
        for row in rows
    ]
    means = {way: _mean_interval(held, way, seed) for way in WAYS}
    return Held(policy, strength, held, means, perplexity_ratio(run, chat, policy))


def _stored(run: RunDir, keys: set[str]) -> dict[str, Exchange]:
    return {e.key: e for e in read_exchanges(run) if e.key in keys}


def _answer(
    chat: ChatModel,
    engine: Engine,
    rows: Sequence[PlanRow],
    sampling: Sampling,
    context: AbstractContextManager[None],
    plain: dict[str, Exchange],
    judge: LikelihoodJudge,
) -> dict[str, Exchange]:
    """The rows' replies inside ``context``, their log-probabilities under the plain model."""
    with context:
        replies = list(engine.generate(shard_requests(chat, list(rows)), sampling))
    exchanges = []
    for reply in replies:
        ids = content_ids(reply.token_ids, reply.content_start, reply.finish_reason).tolist()
        exchanges.append(replace(plain[reply.key], reply=chat.decode(ids), reply_ids=tuple(ids), logprob=None))
    return {e.key: e for e in with_logprobs(chat, exchanges, judge.slots)}


def _evidence(judge: LikelihoodJudge, exchanges: list[Exchange]) -> dict[str, float | None]:
    return {verdict.key: verdict.evidence for verdict in judge.judge(exchanges)}


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


def perplexity_ratio(run: RunDir, chat: ChatModel, policy: Policy) -> float:
    """Token-weighted perplexity of stored neutral replies (:data:`NEUTRAL_REPLIES` at most), held over plain."""
    stored = [e for e in read_exchanges(run) if e.persona == DEFAULT and e.reply_ids and e.logprob is not None]
    stored = stored[:: -(-len(stored) // NEUTRAL_REPLIES)]
    passages = []
    for e in stored:
        prompt = chat.template.prompt_ids(chat.template.messages(e.system_prompt, e.question))
        passages.append(reply_passage(e.key, prompt, e.reply_ids))
    with cap(chat, policy):
        held = np.concatenate([logprobs for _, [logprobs] in score_passages(chat, passages)]).mean()
    plain = np.average([e.logprob for e in stored], weights=[len(e.reply_ids) for e in stored])
    return float(np.exp(plain - held))
