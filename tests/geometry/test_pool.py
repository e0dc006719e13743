"""The place of a projection among the replies of a run."""

from __future__ import annotations

import pytest
import torch

from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.geometry.pool import pool_percentile, pool_points, pool_size

POOL = {"n": 40, "percentiles": {"5": [-4.0, 10.0], "50": [0.0, 20.0], "95": [2.0, 40.0]}}
AXIS = Axis(torch.ones(2, 8), (3, 7), 7, {"pool": POOL})


@pytest.mark.parametrize(
    ("projection", "layer", "expected"),
    [(20.0, None, 50), (30.0, 7, 72.5), (40.0, 7, 95), (40.1, 7, 100), (9.9, None, 0), (-2.0, 3, 27.5)],
)
def test_percentiles(projection: float, layer: int | None, expected: float) -> None:
    assert pool_percentile(AXIS, projection, layer) == pytest.approx(expected)


def test_an_axis_of_another_origin_has_no_pool() -> None:
    axis = Axis(torch.ones(1, 8), (3,), 3)
    assert (pool_size(AXIS), pool_size(axis), pool_points(axis), pool_percentile(axis, 1.0)) == (40, None, None, None)
    with pytest.raises(UsageError, match="no layer 5"):
        pool_points(AXIS, 5)
