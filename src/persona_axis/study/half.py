"""A run in two halves: what is fitted and chosen on one is judged on the other.

Roles and questions are dealt in two by the run's seed. Everything that half A knows comes from rollouts of its roles
(and the default persona) on its questions: the axis, the judge's null, the pool of projections.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from persona_axis.collect.cells import Row, ShardCells, counts, layer_chunks, shard_cells
from persona_axis.collect.filters import Kind, apply_filter
from persona_axis.collect.fitting import FitSettings
from persona_axis.collect.judging import null_of
from persona_axis.collect.means import cell_means
from persona_axis.collect.plan import DEFAULT, Plan, PlanRow
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.stored import ShardActivations, StoredLayers
from persona_axis.errors import FitError, UsageError
from persona_axis.geometry.axis import project
from persona_axis.geometry.crossfit import held_out_axes
from persona_axis.geometry.fit import DroppedRole
from persona_axis.geometry.resampling import axes_of, question_folds
from persona_axis.geometry.vectors import check_connected, persona_vectors

Key = TypeVar("Key", str, int)

LEAST_ROLES = 8  # of a whole run, for two halves with an axis each
LEAST_BLOCKS = 10  # questions (or folded blocks of them): five folds within a half


@dataclass(frozen=True)
class Half:
    """Roles, and the blocks of questions (:attr:`PlanRow.block`) they are looked at on."""

    roles: tuple[str, ...]
    blocks: frozenset[int]

    def holds(self, row: PlanRow) -> bool:
        return self.takes(row.persona, row.block)

    def takes(self, persona: str, block: int) -> bool:
        return block in self.blocks and (persona == DEFAULT or persona in self.roles)


def halves(plan: Plan, seed: int) -> tuple[Half, Half]:
    """A and B: every role and every question is in one of them, in proportion from each group and category.

    Raises:
        UsageError: too few to halve.
    """
    groups = {row.persona: row.group for row in plan.rows if row.persona != DEFAULT}
    categories = {row.block: row.category for row in plan.rows}
    if len(groups) < LEAST_ROLES or len(categories) < LEAST_BLOCKS:
        raise UsageError(
            f"This run has {len(groups)} roles and {len(categories)} questions (or blocks of them). Calibration splits "
            f"them in two and needs at least {LEAST_ROLES} and {LEAST_BLOCKS}: run with more."
        )
    roles_a, roles_b = _dealt(groups, f"{seed}/roles")
    blocks_a, blocks_b = _dealt(categories, f"{seed}/questions")
    return Half(tuple(roles_a), frozenset(blocks_a)), Half(tuple(roles_b), frozenset(blocks_b))


def _dealt(kinds: dict[Key, str], seed: str) -> tuple[list[Key], list[Key]]:
    """Keys in two, those of a kind alternating, in their order."""
    keys = list(kinds)
    random.Random(seed).shuffle(keys)
    keys.sort(key=lambda key: kinds[key])  # stable: shuffled within a kind
    first = set(keys[::2])
    return [k for k in kinds if k in first], [k for k in kinds if k not in first]


@dataclass(frozen=True, eq=False)
class HalfFit:
    """What half A knows.

    Attributes:
        axes: ``[n_captured, d_model]`` float32.
        pool: projections of every reply on the axis of the other questions and roles, ``[n_replies, n_captured]``
            float32, whatever its verdict.
        pool_roles, pool_default: how many of those replies are a role's, and the default persona's.
        dropped: roles that the filter left too few replies.
        filter: as applied.
    """

    axes: Tensor
    pool: Tensor
    pool_roles: int
    pool_default: int
    dropped: list[DroppedRole]
    filter: str


def fit_half(
    run: RunDir,
    half: Half,
    judge_name: str | None,
    kind: Kind | None,
    settings: FitSettings,
    layers: tuple[int, ...],
    d_model: int,
) -> HalfFit:
    """Fit the axis on one half of a run, and project that half's replies, cross-fitted.

    A reply is projected on the axis of the other folds of questions, fitted without its own role. All replies have
    much in common that would project differently on each of these axes: what is projected is a reply's difference
    from the mean, and the mean's projection on the whole axis is added.

    Args:
        settings: filter, estimator and seed as in :func:`~persona_axis.collect.fitting.fit_run`; ``min_count`` is
            halved with the questions.

    Raises:
        FitError: too few roles or rollouts pass the filter.
        UsageError: the run kept no single replies' activations.
    """
    paired = settings.estimator == "paired"
    threshold = null_of(run, judge_name, half.blocks).threshold if kind == "evidence" and judge_name else None
    cells = [_restricted(shard, half) for shard in shard_cells(run, judge_name, threshold)]
    n_blocks, least = run.plan.n_blocks, max(1, math.ceil(settings.min_count / 2))
    applied = apply_filter(cells, [DEFAULT, *half.roles], n_blocks, settings.filter, kind, least, not paired)
    table = applied.table
    weights = counts(cells, table, n_blocks)
    if paired:
        check_connected(weights, [row.persona for row in table])
    worker = _Worker(run.plan, half, table, weights, paired, settings.seed)
    axes, pool = [], []
    personas: list[str] = []
    for chunk in layer_chunks(len(layers), len(table), n_blocks, d_model):
        stored = StoredLayers(run, cells, chunk)
        [means] = cell_means(stored, [table], n_blocks)  # [layers, P, Q, d]
        axes.append(torch.stack([worker.axis(m) for m in means]))
        projections, personas = worker.projections(stored, means, axes[-1])
        pool.append(projections)
    n_default = personas.count(DEFAULT)
    if n_default == len(personas):  # --keep none keeps the default persona's all the same
        raise UsageError(
            f"{run.path} kept sums of the roles' activations only, so there is no pool of replies to take floors from. "
            "Run with --keep all, or --keep sample:N."
        )
    return HalfFit(
        torch.cat(axes), torch.cat(pool, 1), len(personas) - n_default, n_default, applied.dropped, applied.name
    )


def _restricted(shard: ShardCells, half: Half) -> ShardCells:
    """The shard as if nothing but the half's rollouts were in it."""
    inside = [half.takes(persona, block) for persona, block in zip(shard.persona, shard.block, strict=True)]
    return replace(shard, count=[n if mine else 0 for n, mine in zip(shard.count, inside, strict=True)])


class _Worker:
    """What is the same for every layer."""

    def __init__(self, plan: Plan, half: Half, table: Sequence[Row], weights: Tensor, paired: bool, seed: int) -> None:
        self.shards = dict(plan.shards())
        self.half = half
        self.weights = weights
        self.paired = paired
        self.in_axis = torch.tensor([float(row.in_axis) for row in table[1:]])
        # Folds over the half's own questions: others have no weight, wherever they are.
        mine = torch.tensor(sorted(half.blocks))
        self.folds = torch.zeros(plan.n_blocks, dtype=torch.long)
        self.folds[mine] = question_folds(len(mine), seed)
        # A persona that is not in the axis is projected on the whole one, like the Assistant (row 0).
        self.row_of = {row.persona: i for i, row in enumerate(table) if row.in_axis}

    def axis(self, means: Tensor) -> Tensor:
        """``[P, Q, d]`` -> ``[d]``."""
        vectors = persona_vectors(self.weights, means, self.paired)
        axis = axes_of(vectors[None], self.in_axis[None])[0]
        if not bool(axis.isfinite().all()):
            raise FitError("Half of this run is too little for an axis. Run with more questions or roles.")
        return axis

    def projections(self, stored: StoredLayers, means: Tensor, axes: Tensor) -> tuple[Tensor, list[str]]:
        """Cross-fitted projections of the half's replies at these layers, ``[n, layers]``, and whose they are.

        Args:
            means: ``[layers, P, Q, d]``.
            axes: ``[layers, d]``, of the whole half.
        """
        args = (self.folds, self.in_axis, self.paired)
        units = torch.stack([held_out_axes(self.weights, m, *args) for m in means], 2)  # [F, P, layers, d]
        units /= units.norm(dim=-1, keepdim=True)
        roles = torch.stack([persona_vectors(self.weights, m, self.paired)[1:] for m in means], 1)
        centre = roles.mean(0)  # [layers, d]
        parts = [torch.zeros(0, len(means))]
        personas: list[str] = []
        for shard in stored:
            chosen = [(i, row) for i, row in self._replies(shard) if self.half.holds(row)]
            personas += [row.persona for _, row in chosen]
            replies = shard.replies[[i for i, _ in chosen]]
            own = units[[int(self.folds[row.block]) for _, row in chosen], [self._place(row) for _, row in chosen]]
            parts.append(((replies - centre) * own).sum(-1) + project(centre, axes))
        return torch.cat(parts), personas

    def _replies(self, shard: ShardActivations) -> list[tuple[int, PlanRow]]:
        """(place among the stored replies, plan row); a reply without a counted token is stored as zeros."""
        rows = self.shards[shard.cells.shard]
        there = (shard.replies != 0).flatten(1).any(1).tolist()
        return [(i, rows[n]) for i, n in enumerate(shard.reply_rows) if there[i]]

    def _place(self, row: PlanRow) -> int:
        return self.row_of.get(row.persona, 0)
