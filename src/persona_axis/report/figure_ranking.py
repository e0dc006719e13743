"""The held-out ranking of roles with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from persona_axis.geometry.fit import Fit, Interval, RankedRole
from persona_axis.report.figure_base import axis_style, new_figure, padded, shown_name
from persona_axis.report.look import BAND, INK, group_styles

TALL_RANKING = 60  # roles; above it rows are tighter and the axis is repeated at the top


def role_ranking(fit: Fit) -> go.Figure:
    """Held-out projections with bootstrap intervals, rising upwards; the Assistant on top with its band."""
    roles = fit.ranking
    tall = len(roles) > TALL_RANKING
    row = 16 if tall else 20
    figure = new_figure(height=110 + row * (len(roles) + 2), top=30 if tall else 8, legend=True)
    for group, (colour, symbol) in group_styles(role.group for role in roles).items():
        rows = [(i, role) for i, role in enumerate(roles) if role.group == group]
        _add_ranked_group(figure, fit, group, rows, colour, symbol)
    _add_assistant_row(figure, fit, len(roles) + 0.5)
    names = [shown_name(role.name) for role in roles]
    figure.update_yaxes(
        tickvals=[*range(len(roles)), len(roles) + 0.5],
        ticktext=[*names, "<b>Assistant</b>"],
        tickfont={"size": 11 if tall else 12, "color": INK},
        range=[-0.8, len(roles) + 1.3],
        showgrid=True,
        gridcolor="#f1f3f5",
        ticklabelstandoff=4,
        automargin=True,
    )
    ends = [x for role in roles for x in (role.projection.low, role.projection.high, role.projection.value)]
    ends += [fit.assistant.low, fit.assistant.high, fit.assistant.value]
    figure.update_xaxes(
        title_text="projection on the axis, held out", range=padded([x for x in ends if math.isfinite(x)])
    )
    if tall:
        figure.update_layout(
            xaxis2={**axis_style(), "overlaying": "x", "matches": "x", "side": "top", "showgrid": False}
        )
        # Plotly draws an axis only when a trace uses it.
        figure.add_trace(go.Scatter(x=[None], y=[None], xaxis="x2", showlegend=False, hoverinfo="skip"))
    figure.update_layout(legend={"y": -70 / figure.layout.height, "yanchor": "top"})
    return figure


def _add_ranked_group(
    figure: go.Figure, fit: Fit, group: str, rows: list[tuple[int, RankedRole]], colour: str, symbol: str
) -> None:
    """Segments are drawn as a trace of their own: error bars cannot show an interval beside its estimate."""
    intervals = [(i, role.projection) for i, role in rows]
    figure.add_trace(_segments(intervals, colour, legendgroup=group))
    figure.add_trace(
        go.Scatter(
            x=[role.projection.value for _, role in rows],
            y=[i for i, _ in rows],
            mode="markers",
            name=shown_name(group),
            legendgroup=group,
            marker={"color": colour, "symbol": symbol, "size": 8},
            customdata=[
                [
                    shown_name(role.name),
                    shown_name(role.group),
                    role.projection.low,
                    role.projection.high,
                    role.kept,
                    role.total,
                    i + 1,
                ]
                for i, role in rows
            ],
            hovertemplate=(
                "<b>%{customdata[0]}</b> · %{customdata[1]}<br>%{x:.2f} "
                "[%{customdata[2]:.2f}, %{customdata[3]:.2f}]<br>%{customdata[4]} of %{customdata[5]} "
                f"rollouts kept<br>rank %{{customdata[6]}} of {len(fit.ranking)}<extra></extra>"
            ),
        )
    )


def _add_assistant_row(figure: go.Figure, fit: Fit, y: float) -> None:
    own = fit.assistant
    if not math.isnan(own.low + own.high):
        figure.add_vrect(x0=own.low, x1=own.high, fillcolor=BAND, line_width=0, layer="below")
    figure.add_vline(x=own.value, line={"color": INK, "width": 1, "dash": "dot"}, layer="below")
    figure.add_trace(_segments([(y, own)], INK))
    figure.add_trace(
        go.Scatter(
            x=[own.value],
            y=[y],
            mode="markers",
            showlegend=False,
            marker={"symbol": "star", "size": 15, "color": INK},
            customdata=[[own.low, own.high]],
            hovertemplate=("<b>Assistant</b><br>%{x:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<extra></extra>"),
        )
    )


def _segments(rows: Sequence[tuple[float, Interval]], colour: str, legendgroup: str | None = None) -> go.Scatter:
    return go.Scatter(
        x=[x for _, interval in rows for x in (interval.low, interval.high, None)],
        y=[y for i, _ in rows for y in (i, i, None)],
        mode="lines",
        line={"color": colour, "width": 2},
        opacity=0.55,
        legendgroup=legendgroup,
        showlegend=False,
        hoverinfo="skip",
    )
