"""A reply's figures as lines of text: projection, its place among the run's replies, and sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from persona_axis.geometry.axis import Axis
from persona_axis.geometry.pool import pool_percentile, pool_points, pool_size
from persona_axis.model.streaming import StreamedReply
from persona_axis.report.words import percent

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-:=+*#"  # where the output cannot show the others
TOKEN_CELLS = 32
TURN_CELLS = 16


def sparkline(values: Sequence[float], low: float, high: float, cells: int, blocks: str = BLOCKS) -> str:
    """Heights of values between ``low`` and ``high``; what lies outside is drawn at the edge.

    More values than cells are averaged, so that all of them are in it.
    """
    n = min(cells, len(values))
    edges = [len(values) * i // n for i in range(n + 1)] if n else []
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = len(blocks) - 1
    if high <= low:
        return blocks[top // 2] * n
    return "".join(blocks[round(top * min(1.0, max(0.0, (mean - low) / (high - low))))] for mean in means)


def place(axis: Axis, layer: int, projection: float) -> str:
    """``percentile 63 of 136 replies``: among the replies of the run, toward the Assistant; "" without a pool."""
    found = pool_percentile(axis, projection, layer)
    points = pool_points(axis, layer)
    if found is None or points is None:
        return ""
    percents, _ = points
    beyond = {0.0: f"below percentile {percents[0]}", 100.0: f"above percentile {percents[-1]}"}
    return f"{beyond.get(found, f'percentile {found:.0f}')} of {pool_size(axis):,} replies"


def figures(axis: Axis, layer: int, reply: StreamedReply, shares: bool) -> str:
    """``+3.21, percentile 63 of 136 replies, 42 tokens, 12 % corrected``.

    Args:
        axis: what the reply was read on.
        layer: the block it was read at.
        reply: to describe.
        shares: whether the share of corrected tokens says anything (it does for bounds, not for a shift).
    """
    if reply.projection is None:
        return "no projection: no token of this reply counts"
    share = reply.share_corrected() if shares else None
    parts = [
        f"{reply.projection:+.2f}",
        place(axis, layer, reply.projection),
        f"{reply.n_counted} token{'s' if reply.n_counted > 1 else ''}",
        "" if share is None else f"{percent(share)} corrected",
    ]
    return ", ".join(part for part in parts if part)


def curves(axis: Axis, layer: int, reply: StreamedReply, turns: Sequence[float], blocks: str) -> str:
    """The reply token by token, between its own extremes, and the turns so far, between those of the run's replies."""
    values = reply.projections
    low, high = min(values), max(values)
    tokens = f"tokens {sparkline(values, low, high, TOKEN_CELLS, blocks)} {low:+.1f} to {high:+.1f}"
    shown = turns[-TURN_CELLS:]
    points = pool_points(axis, layer)
    ends = (min(shown), max(shown)) if points is None else (points[1][0], points[1][-1])
    return f"{tokens}  turns {sparkline(shown, *ends, TURN_CELLS, blocks)}"
