"""Held-out figures: no persona is projected on an axis that its own rollouts made.

Questions are dealt into folds. For each fold the axis and PC1 come from the other folds, the projections from this
one; a role is projected on the axis of the other roles. What all activations share is far longer than what tells
personas apart, and would project differently on each role's own axis: vectors are centred on the held-out roles' mean
before, and the mean's projection on the whole axis is added after. Folds differ in the questions' common part, so
projections are centred on the roles' mean within a fold, averaged, and put back on the mean of the centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from persona_axis.geometry.axis import assistant_axis, leave_one_out_axes, project, weighted_mean
from persona_axis.geometry.space import first_component
from persona_axis.geometry.vectors import persona_vectors


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Cross-fitted places of the personas, one row per draw.

    Attributes:
        projection: ``[N, 1 + R]`` on the axis; the Assistant first, then the roles.
        pc1: ``[N, 1 + R]`` on the first principal component.
    """

    projection: Tensor
    pc1: Tensor

    def edge_distance(self) -> Tensor:
        """``[N]``: see :func:`edge_distance`, on cross-fitted PC1."""
        return edge_distance(self.pc1[:, 0], self.pc1[:, 1:])


def edge_distance(assistant: Tensor, roles: Tensor) -> Tensor:
    """``(max over roles - Assistant) / (max - min over roles)``: 0 at the outermost role, negative beyond it.

    ``assistant [...]``, ``roles [..., R]`` (NaN = not there) -> ``[...]``.
    """
    high = torch.nan_to_num(roles, nan=-torch.inf).amax(-1)
    low = torch.nan_to_num(roles, nan=torch.inf).amin(-1)
    return (high - assistant) / (high - low)


def cross_fit(
    weights: Tensor, means: Tensor, folds: Tensor, in_axis: Tensor, in_space: Tensor, paired: bool
) -> HeldOut:
    """Cross-fitted projections of every persona.

    Args:
        weights: ``[N, P, Q]``; row 0 is the Assistant.
        means: ``[P, Q, d]``.
        folds: ``[Q]`` int, the fold of each question.
        in_axis: ``[N, P - 1]``, how often each row counts as a role of the axis.
        in_space: ``[N, P - 1]``, how often it counts in the PCA.
        paired: estimator.
    """
    axis_parts, pc_parts = [], []
    for fold in folds.unique():
        train = persona_vectors(weights * (folds != fold), means, paired)  # [N, P, d]
        held = persona_vectors(weights * (folds == fold), means, paired)
        axis_parts.append(_axis_projections(train, held, in_axis))
        pc_parts.append(_pc1_projections(train, held, in_space))
    return HeldOut(_combine(axis_parts), _combine(pc_parts))


def _axis_projections(train: Tensor, held: Tensor, in_axis: Tensor) -> Tensor:
    """``[N, P]`` projections of the held-out vectors on the training axes."""
    axes = _own_axes(train, in_axis)
    centre = held[:, 1:].nanmean(1, keepdim=True)  # [N, 1, d]
    return project(held - centre, axes) + project(centre, axes[:, :1])


def _own_axes(train: Tensor, in_axis: Tensor) -> Tensor:
    """``[N, P, d]``: the Assistant's axis is that of all roles, a role's that of the others."""
    assistant, roles, weights = _present(train, in_axis)
    whole = assistant_axis(assistant, weighted_mean(roles, weights))
    return torch.cat([whole[:, None], leave_one_out_axes(assistant, roles, weights)], 1)


def held_out_axes(weights: Tensor, means: Tensor, folds: Tensor, in_axis: Tensor, paired: bool) -> Tensor:
    """For each fold and persona, the axis fitted without either; the Assistant's is that of all roles.

    Args:
        weights: ``[P, Q]``; means: ``[P, Q, d]``; folds: ``[Q]``; in_axis: ``[P - 1]``; as in :func:`cross_fit`.

    Returns:
        ``[F, P, d]``.
    """
    train = torch.stack([persona_vectors(weights * (folds != fold), means, paired) for fold in folds.unique()])
    return _own_axes(train, in_axis.expand(len(train), -1))


def _pc1_projections(train: Tensor, held: Tensor, in_space: Tensor) -> Tensor:
    assistant, roles, weights = _present(train, in_space)
    direction, _ = first_component(roles, assistant, weights)
    mean = weighted_mean(roles, weights)
    return ((held - mean[:, None]) * direction[:, None]).sum(-1)


def _present(vectors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Assistant, roles, and weights with personas that have no vector in this draw left out."""
    roles = vectors[:, 1:]
    there = roles[..., 0].isfinite()
    return vectors[:, 0], roles.nan_to_num(), weights * there


def _combine(parts: list[Tensor]) -> Tensor:
    """Average over folds of ``[N, P]`` projections, each centred on its fold's roles."""
    stacked = torch.stack(parts)  # [F, N, P]
    centres = stacked[:, :, 1:].nanmean(-1, keepdim=True)
    return (stacked - centres).nanmean(0) + centres.nanmean(0)
