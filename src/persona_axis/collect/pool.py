"""Projections of every stored reply: what percentiles, and so the floors of a policy, refer to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.files.shards import is_complete, open_arrays
from persona_axis.geometry.axis import Axis, project

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def projections(run: RunDir, axis: Axis) -> Tensor:
    """Mean projection of every stored reply on the axis, ``[n_replies, n_captured]``, whatever its verdict.

    Roles and the default persona alike (the paper's pool, without traits). In sample: the axis saw these replies.
    """
    parts = []
    for shard in range(run.plan.n_shards):
        name = shard_name(shard)
        folded = is_complete(run.folded, name, run.config_hash)
        if not folded and not run.has_rollouts(shard):
            continue
        folder, array = (run.folded, "kept_activations") if folded else (run.rollouts, "activations")
        with open_arrays(folder, name, config_hash=run.config_hash, log=run.log) as arrays:
            values = torch.from_numpy(arrays.read(array))
        # A reply without a counted token is stored as zeros and is no reply.
        parts.append(project(values[values.abs().sum((1, 2)) > 0], axis.vectors))
    return torch.cat(parts)


def pool_percentiles(run: RunDir, axis: Axis) -> dict[str, Any]:
    """Percentiles toward the Assistant per captured layer, for the axis's metadata."""
    values = projections(run, axis).double()
    points = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)
    table = torch.quantile(values, points, dim=0)
    return {"n": len(values), "percentiles": {str(p): row.tolist() for p, row in zip(PERCENTILES, table, strict=True)}}
