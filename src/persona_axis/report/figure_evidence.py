"""How the judge's numbers spread in each persona group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from persona_axis.report.data import EvidenceGroup, EvidenceSummary
from persona_axis.report.figure_base import new_figure, shown_name
from persona_axis.report.look import INK, MUTED, group_styles
from persona_axis.report.words import count, number, percent


def evidence_by_group(summary: EvidenceSummary) -> go.Figure:
    """How the judge's number is spread in each persona group, and the bar for being kept."""
    groups = [group for group in summary.groups if group.values]
    groups.sort(key=lambda group: float(np.median(group.values)))
    if summary.number_name == "score":
        return _score_shares(groups)
    styles = group_styles(group.name for group in groups)
    figure = new_figure(height=90 + 46 * len(groups), top=26)
    for i, group in enumerate(groups):
        figure.add_trace(_evidence_violin(group, i, styles[group.name][0]))
    figure.update_yaxes(
        # Labels stand beside the shapes, which rise from whole numbers.
        tickvals=[i + 0.28 for i in range(len(groups))],
        ticktext=[_group_tick(group) for group in groups],
        tickfont={"color": INK},
        range=[-0.15, len(groups) - 0.05],
        automargin=True,
        ticklabelstandoff=4,
        showgrid=False,
    )
    figure.update_xaxes(title_text="evidence, nats per reply token", zeroline=True)
    if summary.threshold is not None:
        figure.add_vline(x=summary.threshold, line={"color": INK, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=summary.threshold,
            y=1,
            yref="paper",
            yanchor="bottom",
            xanchor="left",
            xshift=-4,
            text=f"kept above {number(summary.threshold, 3)} →",
            showarrow=False,
            font={"size": 11, "color": INK},
        )
    return figure


def _evidence_violin(group: EvidenceGroup, row: int, colour: str) -> go.Violin:
    """Two hundred quantiles stand for the values: the same shape, and the file does not grow with the run."""
    quantiles = np.quantile(group.values, np.linspace(0.005, 0.995, min(200, max(2, len(group.values)))))
    return go.Violin(
        x=np.round(quantiles, 4).tolist(),
        y0=row,
        orientation="h",
        side="positive",
        width=1.5,
        points=False,
        spanmode="hard",
        line={"color": colour, "width": 1.5},
        box={"visible": True, "width": 0.12},
        hoveron="violins",
        hoverinfo="skip",
        showlegend=False,
    )


def _score_shares(groups: Sequence[EvidenceGroup]) -> go.Figure:
    shades = {0: "#d9dce1", 1: "#c3d5e8", 2: "#6f9cc8", 3: "#174f91"}
    figure = new_figure(height=120 + 32 * len(groups), legend=True)
    for score, colour in shades.items():
        figure.add_trace(
            go.Bar(
                x=[100 * sum(round(v) == score for v in g.values) / len(g.values) for g in groups],
                y=list(range(len(groups))),
                orientation="h",
                name=f"score {score}",
                marker={"color": colour},
                hovertemplate=f"score {score}: %{{x:.0f}} %<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    figure.update_yaxes(
        tickvals=list(range(len(groups))),
        ticktext=[_group_tick(group) for group in groups],
        tickfont={"color": INK},
        automargin=True,
        showgrid=False,
        ticklabelstandoff=4,
    )
    figure.update_xaxes(title_text="share of judged rollouts", ticksuffix=" %", range=[0, 100])
    return figure


def _group_tick(group: EvidenceGroup) -> str:
    share = percent(group.kept / group.total) if group.total else "0 %"
    return (
        f"{shown_name(group.name)}<br><span style='font-size:10px;color:{MUTED}'>"
        f"{share} of {count(group.total)} kept</span>"
    )
