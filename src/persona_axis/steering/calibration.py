"""The maths of choosing a cap: candidates, floors, pressure, price, fluency, the front and the rule. No model.

The paper (section 5.1) caps contiguous layers at percentiles of projections over a pool of replies, and picks by hand
from a plot of harm against capability. Here the same sweep has error bars and a stated rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from persona_axis.errors import FitError, UsageError
from persona_axis.geometry.fit import Interval

DRAWS = 1000
FINALISTS = 4
FAR_TOO_DEAR = 4  # times the price that the rule allows
# A held reply under role prompts may be so much less likely than a neutral one, or a little less than the plain model's
# own under these prompts: those are fluent, and short ones exceed the first limit by being in their role (5.18 against
# 3.74 in half A of the demo's run), so a cap that changes nothing would not be admissible.
NEUTRAL_PERPLEXITY = 1.30
PLAIN_PERPLEXITY = 1.05
REPETITION_POINTS = 0.02  # and repeat this much more of its 4-grams than plain replies do
EMPTY_POINTS = 0.02  # and be empty this much more often
GRAM = 4


def paper_percentile(percentile: float) -> float:
    """A percentile toward the Assistant as the reference counts it: along the negated axis."""
    return 100 - percentile


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A cap to try: contiguous layers, and the percentile of the pool that is their floor."""

    layers: tuple[int, ...]
    percentile: float  # toward the Assistant

    def __str__(self) -> str:
        return f"{self.layers[0]}-{self.layers[-1]} p{self.percentile:g}"


def windows(layers: Sequence[int], widths: Iterable[int], stride: int | None = None) -> list[tuple[int, ...]]:
    """Runs of consecutive layers of each width; the last of a width always ends at the last layer.

    Args:
        layers: ascending; windows do not reach over a gap between them.
        widths: in layers; one wider than all of a run is that run.
        stride: from one start to the next; None is half of the width.
    """
    found: dict[tuple[int, ...], None] = {}
    for width in widths:
        if width < 1 or (stride is not None and stride < 1):
            raise UsageError(f"A window of {width} layers every {stride} is none; both must be at least 1.")
        for run in _runs(layers):
            step = max(1, width // 2) if stride is None else stride
            last = max(0, len(run) - width)
            for start in sorted({*range(0, last, step), last}):
                found[run[start : start + width]] = None
    return list(found)


def _runs(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Maximal stretches of consecutive layers."""
    cuts = [i for i in range(1, len(layers)) if layers[i] != layers[i - 1] + 1]
    return [tuple(layers[a:b]) for a, b in zip([0, *cuts], [*cuts, len(layers)], strict=True)]


def floors(pool: Tensor, layers: Sequence[int], candidate: Candidate) -> dict[int, float]:
    """The candidate's floor at each of its layers.

    Args:
        pool: projections of the pool's replies, ``[n_replies, n_captured]`` float32.
        layers: the captured decoder blocks, in that order.
    """
    columns = [layers.index(layer) for layer in candidate.layers]
    values = np.percentile(pool[:, columns].double().numpy(), candidate.percentile, axis=0)
    return dict(zip(candidate.layers, values.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Paired:
    """One figure per (role, question), plain and held; NaN where a reply is missing or empty.

    Attributes:
        plain, held: ``[roles, questions]`` float64.
    """

    plain: np.ndarray
    held: np.ndarray

    def reduction(self, seed: int, draws: int = DRAWS) -> Interval:
        """``1 - mean held / mean plain``, clipped to [0, 1], over pairs where both are known.

        Bootstrap over roles and questions, drawn independently, a pair counting as often as both were drawn. When
        what was held left no pair to tell by (it makes every reply empty), it is 0, anywhere in [0, 1].

        Raises:
            FitError: the plain mean is not positive: there is no pressure to take away.
        """
        if not np.nansum(self.plain) > 0:
            raise FitError(
                "The plain model's replies under role prompts show no pressure on average, so nothing can be held. "
                "Use more roles or questions, or roles that this model can play."
            )
        both = np.isfinite(self.plain) & np.isfinite(self.held)
        plain, held = np.where(both, self.plain, 0), np.where(both, self.held, 0)
        if not plain.sum() > 0:
            return Interval(0.0, 0.0, 1.0)
        random = np.random.default_rng(seed)
        R, Q = (_counts(random, draws, n) for n in plain.shape)  # [draws, roles], [draws, questions]
        sums = [np.einsum("dr,rq,dq->d", R, cells, Q) for cells in (plain, held)]
        values = reduction(*(s[sums[0] > 0] for s in sums))
        low, high = np.percentile(values, [2.5, 97.5])
        return Interval(float(reduction(plain.sum(), held.sum())), float(low), float(high))


def reduction(plain: np.ndarray, held: np.ndarray) -> np.ndarray:
    """``1 - held / plain``, clipped to [0, 1]."""
    return np.clip(1 - held / plain, 0, 1)


def _counts(random: np.random.Generator, draws: int, n: int) -> np.ndarray:
    return random.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Teacher:
    """Stored neutral replies read by the held model beside the plain one, one entry per reply.

    Attributes:
        tokens: how many.
        plain, held: summed log-probability, nats.
        agree: tokens whose likeliest token is the same.
        kl: summed divergence of the plain distribution from the held one, nats.
    """

    tokens: np.ndarray
    plain: np.ndarray
    held: np.ndarray
    agree: np.ndarray
    kl: np.ndarray

    @classmethod
    def of(cls, figures: Sequence[Any]) -> Teacher:
        """From objects with these names as attributes, one per reply."""
        return cls(*(np.array([getattr(f, part.name) for f in figures], dtype=np.float64) for part in fields(cls)))

    def perplexity_ratio(self, seed: int, draws: int = DRAWS) -> Interval:
        """Token-weighted perplexity, held over plain; bootstrap over replies."""
        return self._mean(self.plain - self.held, seed, draws, np.exp)

    def top1_agreement(self, seed: int, draws: int = DRAWS) -> Interval:
        """Share of tokens at which both find the same token likeliest."""
        return self._mean(self.agree, seed, draws)

    def mean_kl(self, seed: int, draws: int = DRAWS) -> Interval:
        """Mean divergence per token, nats."""
        return self._mean(self.kl, seed, draws)

    def _mean(self, sums: np.ndarray, seed: int, draws: int, as_figure: np.ufunc = np.positive) -> Interval:
        picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
        values = as_figure(sums[picks].sum(1) / self.tokens[picks].sum(1))
        low, high = np.percentile(values, [2.5, 97.5])
        return Interval(float(as_figure(sums.sum() / self.tokens.sum())), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Fluency:
    """How replies read, as one set."""

    perplexity: float  # of the plain model, under the neutral prompt, token-weighted
    repetition: float  # share of 4-grams that occurred before in the same reply
    empty: float  # share of replies without a token


def fluency(replies: Sequence[Sequence[int]], logprob_sums: Sequence[float]) -> Fluency:
    """Of replies as token ids, with each one's log-probability under the plain model and the neutral prompt."""
    tokens = sum(map(len, replies))
    if not tokens:
        return Fluency(math.inf, 0.0, 1.0)
    repeated = [repeated_grams(reply) for reply in replies]
    grams = sum(n for _, n in repeated)
    return Fluency(
        perplexity=math.exp(-sum(logprob_sums) / tokens),
        repetition=sum(r for r, _ in repeated) / grams if grams else 0.0,
        empty=sum(not reply for reply in replies) / len(replies),
    )


def repeated_grams(reply: Sequence[int]) -> tuple[int, int]:
    """4-grams that occurred before in the reply, and all of them."""
    grams = [tuple(reply[i : i + GRAM]) for i in range(len(reply) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


def objections(held: Fluency, plain: Fluency, neutral: Fluency) -> list[str]:
    """Why held replies under role prompts are not fluent; [] when they are.

    Args:
        held: replies of the held model under role prompts.
        plain: replies of the plain model to the same.
        neutral: replies of the plain model under neutral prompts.
    """
    said = []
    if held.perplexity > max(NEUTRAL_PERPLEXITY * neutral.perplexity, PLAIN_PERPLEXITY * plain.perplexity):
        said.append(
            f"perplexity {held.perplexity:.2f} under the neutral prompt, more than {NEUTRAL_PERPLEXITY:g} times the "
            f"neutral replies' {neutral.perplexity:.2f} and than {PLAIN_PERPLEXITY:g} times the plain replies' "
            f"{plain.perplexity:.2f}"
        )
    if held.repetition > plain.repetition + REPETITION_POINTS:
        said.append(f"{held.repetition:.1%} repeated 4-grams, plain replies {plain.repetition:.1%}")
    if held.empty > plain.empty + EMPTY_POINTS:
        said.append(f"{held.empty:.1%} empty replies, plain {plain.empty:.1%}")
    return said


@dataclass(frozen=True, slots=True)
class Scored:
    """What the choice looks at."""

    candidate: Candidate
    reduction: Interval  # of pressure
    perplexity_ratio: Interval
    fluent: bool


RULE = (
    "Among candidates whose replies stay fluent and whose perplexity ratio on neutral replies is at most {limit:g}, "
    "the one with the largest lower 95 % bound of the reduction of pressure; when no fluent candidate is that cheap, "
    "the cheapest fluent one. Half A decides."
)


def preference(scored: Scored, limit: float) -> tuple[float, ...]:
    """Sorts candidates by the rule, best last."""
    if not scored.fluent:
        return (0, scored.reduction.low)
    if scored.perplexity_ratio.value > limit:
        return (1, -scored.perplexity_ratio.value)
    return (2, scored.reduction.low, scored.reduction.value, -scored.perplexity_ratio.value)


def choose(scored: Sequence[Scored], limit: float) -> Scored | None:
    """The rule's choice; None when no candidate is fluent."""
    best = max(scored, key=lambda s: preference(s, limit))
    return best if best.fluent else None


def fronts(scored: Sequence[Scored]) -> list[int]:
    """For each candidate, how many layers of better ones lie before it: 0 is the Pareto front.

    Better is a larger reduction and a smaller perplexity ratio; what is not fluent comes after all that is.
    """
    points = [(s.reduction.value, -s.perplexity_ratio.value) if s.fluent else None for s in scored]
    rank: dict[int, int] = {}
    left = {i for i, point in enumerate(points) if point is not None}
    level = 0
    while left:
        front = {i for i in left if not any(_dominates(points[j], points[i]) for j in left)}
        rank |= dict.fromkeys(front, level)
        left -= front
        level += 1
    return [rank.get(i, level) for i in range(len(scored))]


def _dominates(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    assert a is not None
    assert b is not None
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def survivors(scored: Sequence[Scored], keep: int, limit: float) -> list[Candidate]:
    """The ``keep`` candidates that go on: front by front, within a front those that the rule prefers.

    Those that are surely far too dear (by the lower bound of the perplexity ratio) come after the other fluent ones:
    they would fill the dear end of the front, where nobody looks.
    """
    dearest = 1 + FAR_TOO_DEAR * (limit - 1)
    order = sorted(
        zip(fronts(scored), scored, strict=True),
        key=lambda pair: (
            not pair[1].fluent,
            pair[1].perplexity_ratio.low > dearest,
            pair[0],
            [-part for part in preference(pair[1], limit)],
        ),
    )
    return [s.candidate for _, s in order[:keep]]


@dataclass(frozen=True, slots=True)
class Rung:
    """A round of successive halving."""

    candidates: int
    prompts: int  # role prompts answered by each
    neutral: int  # neutral replies read by each


def rungs(n_candidates: int, prompts: int, neutral: int, first_prompts: int = 9, eta: int = 3) -> list[Rung]:
    """Successive halving: each round a third of the candidates meets three times the prompts.

    Ends with all prompts and neutral replies. At least :data:`FINALISTS` candidates reach the last round, so that there
    is a front.
    """
    found = []
    size = min(first_prompts, prompts)
    while True:
        share = size / prompts
        found.append(Rung(n_candidates, size, max(min(6, neutral), math.ceil(neutral * share))))
        if size == prompts:
            return found
        size = min(prompts, size * eta) if size * eta * 1.5 <= prompts else prompts
        n_candidates = max(min(FINALISTS, n_candidates), math.ceil(n_candidates / eta))
