"""The persona maps: personas in the space of the roles' principal components, in sample."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from persona_axis.geometry.fit import Fit, MapPoint
from persona_axis.report.figure_base import WIDE_ONLY, new_figure, padded, shown_name
from persona_axis.report.labels import Dot, label_order, place_labels, require_components
from persona_axis.report.look import ASSISTANT, AXIS_STOPS, INK, MUTED, RULE, spoken
from persona_axis.report.words import percent

# Plot areas in pixels for which labels are placed: a phone's, and the smallest that shows ``WIDE_ONLY``.
NARROW_AREA = (290.0, 380.0)
WIDE_AREA = (540.0, 420.0)
LABEL_SIZE = 12
HALO = "0 0 3px #fff, 0 0 3px #fff, 0 0 3px #fff"  # keeps a label legible over a point


def persona_map(fit: Fit) -> go.Figure:
    """PC1 x PC2 of persona space at the analysed layer, coloured by projection on the axis (in sample)."""
    points = fit.points
    require_components(points, 2)
    x_range, y_range = (padded([p.pcs[i] for p in points]) for i in (0, 1))
    core, extra = _map_labels(points, x_range, y_range)
    roles = [p for p in points if p.name != ASSISTANT]
    figure = new_figure(height=540, top=20)
    figure.add_trace(_map_markers(roles))
    figure.add_trace(_label_trace(points, core))
    figure.add_trace(_label_trace(points, extra, meta=WIDE_ONLY))
    for i, point in enumerate(points):
        if point.name == ASSISTANT:
            figure.add_trace(_assistant_star(point, core.get(i, "middle left")))
    figure.update_xaxes(title_text=_pc_title(fit, 1), range=x_range, zeroline=True)
    figure.update_yaxes(title_text=_pc_title(fit, 2), range=y_range, zeroline=True)
    return figure


def persona_map_3d(fit: Fit) -> go.Figure:
    """The first three components of persona space, to turn with the mouse."""
    require_components(fit.points, 3)
    roles = [p for p in fit.points if p.name != ASSISTANT]
    # Only the far end is named: labels of the Assistant's neighbours would lie under its own.
    named = sorted(roles, key=lambda p: p.projection)[:4]
    figure = new_figure(height=480)
    figure.add_trace(
        go.Scatter3d(
            **_coordinates(roles, "xyz"),
            mode="markers",
            marker={**_axis_marker(roles), "size": 5, "showscale": False},
            **_point_hover(roles),
        )
    )
    figure.add_trace(
        go.Scatter3d(
            **_coordinates(named, "xyz"),
            mode="text",
            text=[shown_name(p.name) for p in named],
            textposition="top center",
            textfont={"size": 11, "color": MUTED},
            hoverinfo="skip",
            meta=WIDE_ONLY,
        )
    )
    assistant = [p for p in fit.points if p.name == ASSISTANT]
    figure.add_trace(
        go.Scatter3d(
            **_coordinates(assistant, "xyz"),
            mode="markers+text",
            text=["★ Assistant"] * len(assistant),
            textposition="top center",
            textfont={"size": 14, "color": INK},
            marker={"symbol": "diamond", "size": 7, "color": INK},
            **_point_hover(assistant),
        )
    )
    axis = {"backgroundcolor": "#fafbfc", "gridcolor": RULE, "zerolinecolor": RULE, "showspikes": False}
    axis["tickfont"] = {"size": 10, "color": MUTED}
    figure.update_layout(
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        scene={
            f"{name}axis": {**axis, "title": {"text": f"PC{i}", "font": {"size": 13, "color": MUTED}}}
            for i, name in enumerate("xyz", start=1)
        },
        scene_camera={"eye": {"x": 0.92, "y": -1.6, "z": 0.64}, "center": {"x": 0, "y": 0, "z": -0.12}},
        scene_aspectmode="manual",
        scene_aspectratio={"x": 1.5, "y": 0.9, "z": 0.8},
        scene_dragmode="turntable",
    )
    return figure


def _map_markers(roles: Sequence[MapPoint]) -> go.Scatter:
    return go.Scatter(
        **_coordinates(roles, "xy"),
        mode="markers",
        marker={
            **_axis_marker(roles),
            "size": 10,
            "line": {"color": "white", "width": 1},
            "colorbar": {
                "orientation": "h",
                "x": 0.5,
                "y": 1.02,
                "yanchor": "bottom",
                "len": 0.9,
                "thickness": 8,
                "outlinewidth": 0,
                "tickfont": {"size": 11, "color": MUTED},
                "title": {
                    "text": "← far from the Assistant · near →",
                    "side": "top",
                    "font": {"size": 12, "color": MUTED},
                },
            },
        },
        **_point_hover(roles),
    )


def _assistant_star(point: MapPoint, label_spot: str) -> go.Scatter:
    return go.Scatter(
        **_coordinates([point], "xy"),
        mode="markers+text",
        marker={"symbol": "star", "size": 20, "color": INK, "line": {"color": "white", "width": 1.5}},
        text=["<b>Assistant</b>"],
        textposition=label_spot,
        textfont={"size": 14, "color": INK, "shadow": HALO},
        cliponaxis=False,
        **_point_hover([point]),
    )


def _label_trace(points: Sequence[MapPoint], spots: dict[int, str], meta: str | None = None) -> go.Scatter:
    """Names beside their points. Plotly sets a text off by its marker's size, hence markers, unseen."""
    shown = [(points[i], spot) for i, spot in spots.items() if points[i].name != ASSISTANT]
    return go.Scatter(
        **_coordinates([point for point, _ in shown], "xy"),
        mode="markers+text",
        marker={"size": 10, "opacity": 0},
        text=[shown_name(point.name) for point, _ in shown],
        textposition=[spot for _, spot in shown],
        textfont={"size": LABEL_SIZE, "color": INK if meta is None else MUTED, "shadow": HALO},
        hoverinfo="skip",
        meta=meta,
    )


def _map_labels(
    points: Sequence[MapPoint], x_range: list[float], y_range: list[float]
) -> tuple[dict[int, str], dict[int, str]]:
    """Label spots: the core ones fit a phone, the extra ones a laptop with the core ones already there."""
    order = label_order(points)
    texts = [spoken(p.name) for p in points]

    def dots(area: tuple[float, float]) -> list[Dot]:
        return [
            Dot(
                (p.pcs[0] - x_range[0]) / (x_range[1] - x_range[0]) * area[0],
                (y_range[1] - p.pcs[1]) / (y_range[1] - y_range[0]) * area[1],
                11.0 if p.name == ASSISTANT else 5.0,
            )
            for p in points
        ]

    narrow = place_labels(dots(NARROW_AREA), texts, order[:11], NARROW_AREA, LABEL_SIZE)
    wide = place_labels(dots(WIDE_AREA), texts, [*narrow, *order[:40]], WIDE_AREA, LABEL_SIZE)
    return narrow, {i: spot for i, spot in wide.items() if i not in narrow}


def _axis_marker(roles: Sequence[MapPoint]) -> dict[str, object]:
    return {
        "color": [p.projection for p in roles],
        "colorscale": [list(stop) for stop in AXIS_STOPS],
        "showscale": True,
    }


def _coordinates(points: Sequence[MapPoint], names: str) -> dict[str, list[float]]:
    return {name: [p.pcs[i] for p in points] for i, name in enumerate(names)}


def _point_hover(points: Sequence[MapPoint]) -> dict[str, object]:
    return {
        "customdata": [[shown_name(p.name), shown_name(p.group), p.projection] for p in points],
        "hovertemplate": (
            "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>projection %{customdata[2]:.2f}<extra></extra>"
        ),
    }


def _pc_title(fit: Fit, component: int) -> str:
    shares = fit.at_layer().pc_shares
    share = f" ({percent(shares[component - 1])} of role variance)" if len(shares) >= component else ""
    return f"PC{component}{share}"
