"""What a catalog holds, as a table for the terminal and as a page with bars by group."""

from __future__ import annotations

from html import escape
from pathlib import Path

import plotly.graph_objects as go

from persona_axis.catalog.stats import CatalogStats
from persona_axis.files.atomic import write_atomic
from persona_axis.report.figure_base import new_figure, shown_name
from persona_axis.report.html import render_document
from persona_axis.report.look import GROUP_COLOURS, MUTED, spoken

NAME, TRACK = 26, 40  # columns
BAR = GROUP_COLOURS[7]


def render_catalog_stats(stats: CatalogStats) -> str:
    """Plain text of at most 80 columns: totals, then bars by group and category."""
    blocks = ["\n".join(f"{spoken(name):<{NAME}}{value:>8}" for name, value in _totals(stats))]
    for what, groups in stats.by_group.items():
        longest = max(groups.values())
        bars = (f"  {spoken(name):<{NAME - 2}}{n:>8}  {'#' * round(TRACK * n / longest)}" for name, n in groups.items())
        blocks.append("\n".join((f"{what} by group", *bars)))
    return "\n\n".join(blocks)


def write_catalog_page(path: Path, stats: CatalogStats) -> None:
    """One HTML file that needs no network. StorageError if the disk refuses."""
    write_atomic(path, render_catalog_page(stats).encode())


def render_catalog_page(stats: CatalogStats) -> str:
    """The page as text."""
    figures = {f"by-{what}": _bars(groups) for what, groups in stats.by_group.items()}
    tiles = "".join(
        f'<div class="tile"><dt>{escape(spoken(name))}</dt><dd>{value}</dd></div>' for name, value in _totals(stats)
    )
    places = "".join(
        f"<h2>{escape(what.capitalize())}</h2><figure><div id='by-{escape(what)}'></div></figure>"
        for what in stats.by_group
    )
    body = f'<main><h1>Catalog</h1><dl class="tiles">{tiles}</dl>{places}</main>'
    return render_document("Catalog", body, figures)


def _totals(stats: CatalogStats) -> list[tuple[str, str]]:
    table = stats.to_dict()
    del table["by_group"]
    return [(name, f"{value:.1%}" if isinstance(value, float) else f"{value:,}") for name, value in table.items()]


def _bars(groups: dict[str, int]) -> go.Figure:
    names = [shown_name(name) for name in groups]
    figure = new_figure(height=92 + 26 * len(names), top=34)  # room for the buttons above the first bar
    figure.add_bar(
        x=list(groups.values()),
        y=names,
        orientation="h",
        marker_color=BAR,
        text=list(groups.values()),
        textposition="outside",
        cliponaxis=False,
        textfont={"color": MUTED},
        hoverinfo="skip",
    )
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(rangemode="tozero")
    return figure
