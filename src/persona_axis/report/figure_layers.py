"""The axis layer by layer, and how many components the roles need at the analysed one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from persona_axis.geometry.fit import Fit, LayerFit
from persona_axis.report.figure_base import axis_style, new_figure
from persona_axis.report.look import FILTERED, INK, MUTED, UNFILTERED


def explained_variance(fit: Fit) -> go.Figure:
    """Share of role variance per component and the running total, with 70, 80 and 90 % marked."""
    at = fit.at_layer()
    shown = min(len(at.pc_shares), max(at.components_90 + 2, 8))
    components = list(range(1, shown + 1))
    running = (100 * np.cumsum(at.pc_shares)[:shown]).tolist()
    figure = new_figure(height=420, legend=True)
    figure.add_trace(
        go.Bar(
            x=components,
            y=[100 * share for share in at.pc_shares[:shown]],
            name="each component",
            marker={"color": "#a9c2de", "line_width": 0},
            hovertemplate="PC%{x}: %{y:.1f} %<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=components,
            y=running,
            mode="lines+markers" if shown <= 40 else "lines",
            name="running total",
            line={"color": FILTERED, "width": 2},
            marker={"size": 5},
            hovertemplate="first %{x} components: %{y:.1f} %<extra></extra>",
        )
    )
    _add_variance_marks(figure, at, shown)
    figure.update_xaxes(title_text="principal component", range=[0.4, shown + 0.6], tickformat="d", nticks=12)
    figure.update_yaxes(title_text="share of role variance", ticksuffix=" %", range=[0, 104])
    return figure


def _add_variance_marks(figure: go.Figure, at: LayerFit, shown: int) -> None:
    """A line per mark, from the axis to the running total; its label sits on the line's free left end."""
    marks = ((70, at.components_70), (80, at.components_80), (90, at.components_90))
    for share, needed in marks:
        figure.add_shape(
            type="line",
            x0=0.4,
            x1=shown + 0.6,
            y0=share,
            y1=share,
            line={"color": MUTED, "width": 1, "dash": "dot"},
            layer="below",
        )
        figure.add_annotation(
            x=shown + 0.6,
            y=share,
            text=f"{share} %: {needed} PC{'s' if needed != 1 else ''}",
            showarrow=False,
            xanchor="right",
            yanchor="top",
            font={"size": 11, "color": MUTED},
        )


def by_layer(fit: Fit) -> go.Figure:
    """cos(axis, PC1) with its interval and without the filter; below it, reliability; same layer axis."""
    layers = [f.layer for f in fit.per_layer]
    figure = new_figure(height=480, legend=True)
    _add_cosine_lines(figure, fit, layers)
    reliability = [f.reliability for f in fit.per_layer]
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=reliability,
            yaxis="y2",
            mode="lines+markers",
            line={"color": "#2f9c8f", "width": 2},
            marker={"size": 5},
            showlegend=False,
            hovertemplate="layer %{x}: reliability %{y:.3f}<extra></extra>",
        )
    )
    lowest = _lowest([f.cos_axis_pc1.low for f in fit.per_layer], 0.0)
    floor = _lowest(reliability, 0.9)
    figure.update_layout(
        yaxis={"domain": [0.4, 1], "title": {"text": "cos(axis, PC1)"}, "range": [lowest - 0.03, 1.03]},
        yaxis2={
            **axis_style("reliability"),
            "anchor": "x",
            "domain": [0, 0.32],
            "range": [floor - 0.03, 1.01],
            "nticks": 5,
        },
        xaxis={"anchor": "y2", "title": {"text": "layer"}, "tickformat": "d"},
        hovermode="x",
    )
    _mark_layer(figure, fit, layers)
    return figure


def _add_cosine_lines(figure: go.Figure, fit: Fit, layers: list[int]) -> None:
    cosines = [f.cos_axis_pc1 for f in fit.per_layer]
    figure.add_trace(
        go.Scatter(
            x=[*layers, *reversed(layers)],
            y=[*(c.high for c in cosines), *(c.low for c in reversed(cosines))],
            fill="toself",
            fillcolor="rgba(23, 79, 145, 0.15)",
            line={"width": 0},
            mode="lines",
            name="95 % interval",
            hoverinfo="skip",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=[f.cos_axis_pc1_unfiltered for f in fit.per_layer],
            mode="lines",
            name="every rollout kept",
            line={"color": UNFILTERED, "width": 1.5, "dash": "dash"},
            hovertemplate="unfiltered %{y:.2f}<extra></extra>",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=[c.value for c in cosines],
            mode="lines+markers",
            name="filtered",
            line={"color": FILTERED, "width": 2.5},
            marker={"size": 5},
            customdata=[[c.low, c.high] for c in cosines],
            hovertemplate="%{y:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<extra></extra>",
        )
    )


def _mark_layer(figure: go.Figure, fit: Fit, layers: list[int]) -> None:
    """A dotted line through both panels at the analysed layer; its label turns inwards near the edges."""
    figure.add_shape(
        type="line",
        xref="x",
        yref="paper",
        x0=fit.layer,
        x1=fit.layer,
        y0=0,
        y1=1,
        line={"color": INK, "width": 1, "dash": "dot"},
        layer="below",
    )
    late = fit.layer > (layers[0] + layers[-1]) / 2
    figure.add_annotation(
        x=fit.layer,
        y=0.36,
        yref="paper",
        yanchor="middle",
        xanchor="right" if late else "left",
        xshift=-4 if late else 4,
        text=f"layer {fit.layer}, analysed",
        showarrow=False,
        font={"size": 11, "color": INK},
    )


def layer_cosines(fit: Fit) -> go.Figure:
    """Cosine of the axes of every two captured layers."""
    cosines = np.asarray(fit.layer_cosine)  # [layers, layers]
    lowest = float(cosines.min())
    signed = lowest < -0.05
    names = [str(layer) for layer in fit.layers]
    figure = new_figure(height=420)
    figure.add_trace(
        go.Heatmap(
            z=np.round(cosines, 3).tolist(),
            x=names,
            y=names,
            zmin=-1 if signed else 0,
            zmax=1,
            colorscale=_signed_scale() if signed else _share_scale(),
            colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11, "color": MUTED}, "len": 1},
            hovertemplate="layers %{x} and %{y}: %{z:.2f}<extra></extra>",
        )
    )
    step = max(1, math.ceil(len(names) / 10))
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(
            type="category",
            tickvals=names[::step],
            ticktext=names[::step],
            showgrid=False,
            title_text="layer",
            ticks="",
        )
    figure.update_xaxes(tickangle=0)
    return figure


def _share_scale() -> list[list[object]]:
    return [[0, "#f7f9fb"], [0.35, "#c3d5e8"], [0.7, "#6f9cc8"], [1, "#123f75"]]


def _signed_scale() -> list[list[object]]:
    return [[0, "#b04d0a"], [0.25, "#e6b98a"], [0.5, "#f7f7f7"], [0.75, "#8fb3d6"], [1, "#123f75"]]


def _lowest(values: Sequence[float], ceiling: float) -> float:
    """The lowest measured value, at most ``ceiling``."""
    return min([value for value in values if math.isfinite(value)] + [ceiling])
