"""Planted personas, and the slow and plain computations that the batched ones are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class World:
    """``means[p, q] = personas[p] + questions[q] + noise``; row 0 is the Assistant."""

    means: Tensor  # [P, Q, d]
    personas: Tensor  # [P, d]
    questions: Tensor  # [Q, d], sums to zero


def world(
    n_personas: int,
    n_questions: int,
    width: int,
    *,
    seed: int,
    spread: float = 1.0,
    question_spread: float = 1.0,
    noise: float = 0.0,
    assistant: Tensor | None = None,
) -> World:
    """Gaussian personas and questions; ``assistant`` is added to row 0."""
    random = torch.Generator().manual_seed(seed)
    personas = spread * torch.randn(n_personas, width, generator=random)
    if assistant is not None:
        personas[0] += assistant
    questions = question_spread * torch.randn(n_questions, width, generator=random)
    questions -= questions.mean(0)
    cells = noise * torch.randn(n_personas, n_questions, width, generator=random)
    return World(personas[:, None] + questions + cells, personas, questions)


def random_weights(shape: tuple[int, ...], *, seed: int, kept: float) -> Tensor:
    """Rollouts per cell: 1 to 3, or 0 with probability ``1 - kept``."""
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 4, shape, generator=random)
    return (counts * (torch.rand(shape, generator=random) < kept)).float()


def parts(weights: Tensor) -> list[set[int]]:
    """Personas ``[P, Q]`` with data, grouped by the questions that link them."""
    groups: list[set[int]] = []
    for persona in range(len(weights)):
        if not weights[persona].any():
            continue
        linked = [g for g in groups if any((weights[persona] * weights[other]).any() for other in g)]
        groups = [g for g in groups if g not in linked] + [{persona}.union(*linked)]
    return groups


def least_squares(weights: Tensor, means: Tensor) -> np.ndarray:
    """``[P, d]`` float64: the additive model with its whole design matrix; NaN for personas without data.

    Columns are the personas and the questions that were asked but the last, whose effect is minus the others' sum.
    """
    w, m = weights.double().numpy(), means.double().numpy()
    n_personas = len(w)
    asked = np.flatnonzero(w.sum(0))
    column = {q: n_personas + i for i, q in enumerate(asked[:-1])}
    rows, targets = [], []
    for persona, question in zip(*np.nonzero(w), strict=True):
        row = np.zeros(n_personas + len(asked) - 1)
        row[persona] = 1
        if question in column:
            row[column[question]] = 1
        else:
            row[n_personas:] = -1
        scale = np.sqrt(w[persona, question])
        rows.append(scale * row)
        targets.append(scale * m[persona, question])
    solution, *_ = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)
    vectors = solution[:n_personas]
    vectors[w.sum(1) == 0] = np.nan
    return vectors


def plain_means(weights: Tensor, means: Tensor) -> np.ndarray:
    """``[P, d]`` float64: the mean over rollouts, persona by persona."""
    w, m = weights.double().numpy(), means.double().numpy()
    vectors = np.full((len(w), m.shape[-1]), np.nan)
    for persona in range(len(w)):
        if w[persona].any():
            vectors[persona] = np.average(m[persona], axis=0, weights=w[persona])
    return vectors


def vectors_of(weights: Tensor, means: Tensor, paired: bool) -> np.ndarray:
    return least_squares(weights, means) if paired else plain_means(weights, means)


def repeated(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows as often as they were drawn; those without a vector left out."""
    there = np.isfinite(rows).all(1)
    return np.repeat(rows[there], counts[there].astype(int), axis=0)


def slow_axis(vectors: np.ndarray, counts: np.ndarray, without: int | None = None) -> np.ndarray:
    """``[d]``: the Assistant minus the mean of the roles, one role left out."""
    counts = counts.copy()
    if without is not None:
        counts[without] = 0
    return vectors[0] - repeated(vectors[1:], counts).mean(0)


def slow_pc1(vectors: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and first component ``[d]`` of the roles as drawn, the Assistant on its positive side."""
    from sklearn.decomposition import PCA

    pca = PCA(1, svd_solver="full").fit(repeated(vectors[1:], counts))
    direction = pca.components_[0]
    return pca.mean_, direction if (vectors[0] - pca.mean_) @ direction >= 0 else -direction


def slow_cross_fit(
    weights: Tensor, means: Tensor, folds: Tensor, in_axis: Tensor, in_space: Tensor, paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """One draw, fold by fold and persona by persona: ``[P]`` on the axis and ``[P]`` on PC1."""
    counts, space_counts = in_axis.numpy(), in_space.numpy()
    on_axis, on_pc1 = [], []
    for fold in sorted(set(folds.tolist())):
        here = folds == fold
        train = vectors_of(weights * ~here, means, paired)
        held = vectors_of(weights * here, means, paired)
        mean, direction = slow_pc1(train, space_counts)
        whole, centre = slow_axis(train, counts), np.nanmean(held[1:], 0)
        projections = []
        for persona in range(len(held)):
            axis = slow_axis(train, counts, persona - 1 if persona else None)
            beyond_centre = (held[persona] - centre) @ axis / np.linalg.norm(axis)
            projections.append(beyond_centre + centre @ whole / np.linalg.norm(whole))
        on_axis.append(projections)
        on_pc1.append((held - mean) @ direction)
    return _over_folds(np.array(on_axis)), _over_folds(np.array(on_pc1))


def _over_folds(values: np.ndarray) -> np.ndarray:
    """``[folds, P]``: relative to the roles' mean of each fold, averaged, the mean of the means added back."""
    centres = [row[1:][np.isfinite(row[1:])].mean() for row in values]
    places = []
    for persona in values.T:
        relative = [value - centre for value, centre in zip(persona, centres, strict=True) if np.isfinite(value)]
        places.append(np.mean(relative) + np.mean(centres))
    return np.array(places)
