"""A reply's figures as text."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_axis.geometry.axis import Axis
from persona_axis.model.streaming import StreamedReply
from persona_axis.report.streamed import BLOCKS, PLAIN_BLOCKS, TOKEN_CELLS, curves, figures, sparkline

POOL = {"n": 1136, "percentiles": {"1": [-40.0], "50": [0.0], "99": [40.0]}}
AXIS = Axis(torch.ones(1, 8), (15,), 15, {"pool": POOL})


def reply(*projections: float, corrected: dict[int, tuple[bool, ...]] | None = None) -> StreamedReply:
    return StreamedReply((1,), "x", "stop", projections, corrected or {}, None, 3, 0)


def test_heights() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7, 8) == BLOCKS
    assert sparkline([-9, 99], 0, 7, 8) == "▁█"
    assert sparkline([1, 1, 3, 3], 1, 3, 2, PLAIN_BLOCKS) == "_#"
    assert (sparkline([], 0, 1, 8), sparkline([2, 2], 2, 2, 8)) == ("", "▄▄")


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=400), st.integers(1, 60))
def test_every_value_is_in_it_and_the_width_is_kept(values: list[float], cells: int) -> None:
    assert len(sparkline(values, min(values), max(values), cells)) == min(cells, len(values))


def test_figures_and_curves_fit_a_terminal() -> None:
    held = reply(-1234.56, 1000.0, corrected={20: (True, False), 21: (False, False)})
    assert figures(AXIS, 15, held, True) == "-117.28, below percentile 1 of 1,136 replies, 2 tokens, 50 % corrected"
    assert "corrected" not in figures(AXIS, 15, held, False)
    assert figures(AXIS, 15, reply(20.0), True) == "+20.00, percentile 74 of 1,136 replies, 1 token"
    assert figures(AXIS, 15, reply(), True) == "no projection: no token of this reply counts"
    assert "percentile" not in figures(Axis(torch.ones(1, 8), (15,), 15), 15, held, True)
    drawn = curves(AXIS, 15, reply(*[float(i % 90) - 45 for i in range(500)]), [0.0] * 30, BLOCKS)
    assert len(drawn) <= 78
    assert drawn.startswith("tokens ")
    assert len(drawn.split()[1]) == TOKEN_CELLS
    assert drawn.endswith("turns " + "▅" * 16)
