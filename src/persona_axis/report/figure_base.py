"""What every figure of the report shares: frame, axes, names.

Contract, because the figures are shown from 360 to 1,040 pixels wide:

1. Figures have a height and no width; titles and captions belong to the page.
2. A trace whose ``meta`` is ``WIDE_ONLY`` may be hidden by the page where there is no room for it.
3. Names come from files: everything shown passes through ``shown_name``, as Plotly reads some HTML.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from persona_axis.report.look import FONT, INK, MUTED, RULE, spoken

WIDE_ONLY = "wide-only"


def new_figure(height: int, top: int = 12, legend: bool = False) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 62, "r": 16, "t": top, "b": 52},
        showlegend=legend,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        hoverlabel={"bgcolor": "white", "bordercolor": MUTED, "font": {"family": FONT, "color": INK}},
        xaxis=axis_style(),
        yaxis=axis_style(),
    )
    return figure


def axis_style(title: str = "") -> dict[str, object]:
    return {
        "gridcolor": RULE,
        "zeroline": False,
        "zerolinecolor": "#cfd4da",
        "tickfont": {"size": 12, "color": MUTED},
        "title": {"text": title, "font": {"size": 13, "color": MUTED}, "standoff": 10},
    }


def padded(values: Sequence[float]) -> list[float]:
    """The range of an axis: the values and room for a marker at either end."""
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 1.0
    return [low - pad, high + pad]


def shown_name(name: str) -> str:
    """A name for Plotly. Quotes stay: Plotly knows no ``&quot;``, and no attribute is built from a name."""
    return html.escape(spoken(name), quote=False)
