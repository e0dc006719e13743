"""Means of stored activations: of every cell of a fit's tables, and projections of every stored reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_axis.collect.cells import Row, counts, entries_of
from persona_axis.collect.stored import StoredLayers
from persona_axis.errors import StorageError
from persona_axis.geometry.axis import project

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def cell_means(stored: StoredLayers, tables: Sequence[Sequence[Row]], n_blocks: int) -> list[Tensor]:
    """Mean activation of every cell, for each table, from one pass over the shards.

    Returns:
        Per table ``[n_layers, len(table), n_blocks, d_model]`` float32, 0 where no rollout is.
    """
    totals: list[Tensor] = []
    for shard in stored:
        if not totals:
            totals = [torch.zeros(len(table) * n_blocks, *shard.entries.shape[1:]) for table in tables]
        for table, total in zip(tables, totals, strict=True):
            entries = list(entries_of(shard.cells, table))
            if entries:
                target = torch.tensor([i * n_blocks + block for i, block, _ in entries])
                total.index_add_(0, target, shard.entries[torch.tensor([n for *_, n in entries])])
    if not totals:
        raise StorageError(f"{stored.run.path} holds no finished rollouts yet.")
    means = []
    for table, total in zip(tables, totals, strict=True):
        tally = counts(stored.cells, table, n_blocks).clamp(min=1)[..., None, None]
        mean = total.view(len(table), n_blocks, *total.shape[1:]) / tally
        means.append(mean.permute(2, 0, 1, 3).contiguous())
    return means


def projections(stored: StoredLayers, axes: Tensor) -> Tensor:
    """Mean projection of every stored reply on these layers' axes ``[layers, d_model]``: ``[n_replies, layers]``.

    Roles and the default persona alike, whatever the verdict (the paper's pool, without traits). In sample: the axis
    saw these replies. A reply without a counted token is stored as zeros and is no reply.
    """
    return torch.cat([project(s.replies[s.replies.abs().sum((1, 2)) > 0], axes) for s in stored])


def percentiles(values: Tensor) -> dict[str, Any]:
    """Of projections ``[n_replies, layers]``, toward the Assistant, per layer: what a policy's floors refer to."""
    table = np.percentile(values.numpy(), PERCENTILES, axis=0)  # torch.quantile refuses 16 million numbers
    return {"n": len(values), "percentiles": {str(p): row.tolist() for p, row in zip(PERCENTILES, table, strict=True)}}
