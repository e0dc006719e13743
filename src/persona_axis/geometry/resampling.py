"""How sure the figures are: split-half reliability of the axis, and bootstrap draws of questions and roles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_axis.errors import FitError
from persona_axis.geometry.axis import assistant_axis, cosine, weighted_mean
from persona_axis.geometry.crossfit import cross_fit
from persona_axis.geometry.fit import Interval
from persona_axis.geometry.space import first_component
from persona_axis.geometry.vectors import persona_vectors

SPLITS = 24
DRAWS = 1000
FOLDS = 5
THIN = (
    "After filtering, the kept rollouts lie on too few questions for figures on held-out ones. Use a looser --filter, "
    "more --questions, or a larger --min-count."
)
DRAW_ELEMENTS = 1 << 20  # float32 numbers of [draws, personas, d_model] worked on at once: what stays in cache


def axes_of(vectors: Tensor, in_axis: Tensor) -> Tensor:
    """``[N, P, d]`` persona vectors (Assistant first) and role counts ``[N, P - 1]`` -> axes ``[N, d]``."""
    roles = vectors[:, 1:]
    weights = in_axis * roles[..., 0].isfinite()
    return assistant_axis(vectors[:, 0], weighted_mean(roles.nan_to_num(), weights))


def reliability(weights: Tensor, means: Tensor, in_axis: Tensor, paired: bool, seed: int) -> float:
    """Spearman-Brown stepped-up cosine between axes from random halves of the questions.

    Args:
        weights: ``[P, Q]``; means: ``[P, Q, d]``; in_axis: ``[P - 1]`` 0/1.

    Returns:
        ``2 r / (1 + r)`` with r the mean cosine over :data:`SPLITS` splits.
    """
    n_questions = weights.shape[1]
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(SPLITS, n_questions)
    for row in first:
        row[torch.randperm(n_questions, generator=generator)[: n_questions // 2]] = 1
    halves = torch.cat([first, 1 - first])  # [2 * SPLITS, Q]
    axes = axes_of(persona_vectors(weights * halves[:, None], means, paired), in_axis.expand(2 * SPLITS, -1))
    r = float(cosine(axes[:SPLITS], axes[SPLITS:]).nanmean())  # NaN: a half of the questions without any role
    if not math.isfinite(r):
        raise FitError(THIN)
    return 2 * r / (1 + r)


@dataclass(frozen=True, eq=False)
class Draws:
    """Bootstrap draws: how often each question ``[N, Q]`` and each role row ``[N, P - 1]`` was drawn."""

    questions: Tensor
    roles: Tensor

    @classmethod
    def make(cls, n_questions: int, roles: list[str], seed: int, draws: int = DRAWS) -> Draws:
        """Questions once per draw for all personas; a role's rows (several vectors) are drawn together."""
        generator = torch.Generator().manual_seed(seed)
        names = sorted(set(roles))
        counts = _multinomial(draws, len(names), generator)
        column = torch.tensor([names.index(r) for r in roles])
        return cls(_multinomial(draws, n_questions, generator), counts[:, column])

    def chunks(self, elements_per_draw: int) -> Iterator[Draws]:
        """Parts whose persona vectors fit in memory."""
        step = max(1, DRAW_ELEMENTS // max(1, elements_per_draw))
        for i in range(0, len(self.questions), step):
            yield Draws(self.questions[i : i + step], self.roles[i : i + step])


def _multinomial(draws: int, n: int, generator: torch.Generator) -> Tensor:
    picks = torch.randint(n, (draws, n), generator=generator)
    return torch.zeros(draws, n).scatter_add_(1, picks, torch.ones(draws, n))


def interval(value: float, draws: Tensor) -> Interval:
    """The estimate with the 2.5th and 97.5th percentile of its finite draws ``[N]``; FitError when there is none."""
    finite = draws[draws.isfinite()]
    if not len(finite) or not math.isfinite(value):
        raise FitError(THIN)
    low, high = torch.quantile(finite.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, low, high)


def cos_axis_pc1_draws(
    weights: Tensor, means: Tensor, in_axis: Tensor, in_space: Tensor, paired: bool, draws: Draws
) -> Tensor:
    """``cos(axis, PC1)`` of every draw, ``[N]``, at one layer."""
    parts = []
    for part in draws.chunks(means.shape[0] * means.shape[2]):
        vectors = persona_vectors(weights * part.questions[:, None], means, paired)
        space_weights = in_space * part.roles * vectors[:, 1:, 0].isfinite()
        direction, _ = first_component(vectors[:, 1:].nan_to_num(), vectors[:, 0], space_weights)
        parts.append(cosine(axes_of(vectors, in_axis * part.roles), direction))
    return torch.cat(parts)


def cross_fit_draws(
    weights: Tensor,
    means: Tensor,
    folds: Tensor,
    in_axis: Tensor,
    in_space: Tensor,
    paired: bool,
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """Cross-fitted projections ``[N, P]`` and edge distances ``[N]`` of every draw.

    A question drawn twice stays in its one fold. Projections are relative to the roles' mean of their draw: what a
    draw of questions adds to every persona alike is no uncertainty about their order.
    """
    projections, distances = [], []
    for part in draws.chunks(means.shape[0] * means.shape[2]):
        held = cross_fit(
            weights * part.questions[:, None],
            means,
            folds,
            in_axis * part.roles,
            in_space * part.roles,
            paired,
        )
        projections.append(held.projection - held.projection[:, 1:].nanmean(-1, keepdim=True))
        distances.append(held.edge_distance())
    return torch.cat(projections), torch.cat(distances)


def question_folds(n_questions: int, seed: int, folds: int = FOLDS) -> Tensor:
    """``[Q]`` fold of each question, balanced, shuffled by seed."""
    order = torch.randperm(n_questions, generator=torch.Generator().manual_seed(seed))
    fold = torch.empty(n_questions, dtype=torch.long)
    fold[order] = torch.arange(n_questions) % folds
    return fold
