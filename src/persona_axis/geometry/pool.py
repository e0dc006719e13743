"""Where a projection lies among the replies of the run that made an axis: a number that means something."""

from __future__ import annotations

import numpy as np

from persona_axis.geometry.axis import Axis


def pool_size(axis: Axis) -> int | None:
    """Replies in the pool; None for an axis that does not come from a run."""
    pool = axis.metadata.get("pool")
    return None if pool is None else int(pool["n"])


def pool_points(axis: Axis, layer: int | None = None) -> tuple[list[int], list[float]] | None:
    """The percentiles that an axis knows of its pool, ascending, and their projections at a layer; None without."""
    pool = axis.metadata.get("pool")
    if pool is None:
        return None
    axis.at(layer)
    column = axis.layers.index(axis.layer if layer is None else layer)
    percents = sorted(map(int, pool["percentiles"]))
    return percents, [float(pool["percentiles"][str(p)][column]) for p in percents]


def pool_percentile(axis: Axis, projection: float, layer: int | None = None) -> float | None:
    """The percentile of a projection among the pool's, toward the Assistant; None without a pool.

    Between the known points it is interpolated. 0 and 100 say that it lies beyond the outermost of them.
    """
    points = pool_points(axis, layer)
    if points is None:
        return None
    percents, values = points
    return float(np.interp(projection, values, percents, left=0.0, right=100.0))
