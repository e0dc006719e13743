"""One self-contained HTML file: plotly.js inlined once, no request to any network.

The content security policy in the page makes the browser enforce both promises: nothing is fetched, and no
script runs but the two written here (a reply that smuggled one in would be inert even if unescaped).
"""

from __future__ import annotations

import hashlib
import json
import os
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from persona_axis.files.atomic import write_atomic
from persona_axis.report import plots, sections
from persona_axis.report.data import ReportData
from persona_axis.report.page import CSS, SCRIPT


def write_report(path: str | os.PathLike[str], report: ReportData) -> Path:
    """Write the report and return its path; an existing file is replaced whole or not at all."""
    target = Path(path)
    write_atomic(target, render_report(report).encode())
    return target


def render_report(report: ReportData) -> str:
    """The whole document as text."""
    figures = make_figures(report)
    return render_document(report.title, _body(report, figures), figures)


def render_document(title: str, body: str, figures: dict[str, go.Figure]) -> str:
    """A page around `body`, HTML in which each figure's id is that of the element to draw it in."""
    data = _figures_json(figures)
    # Unguessable for the texts in the page, and the same file for the same report.
    nonce = hashlib.sha256((body + data).encode()).hexdigest()[:32]
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="figures">{data}</script>\n'
        f'<script nonce="{nonce}">{get_plotlyjs()}</script>\n'
        f'<script nonce="{nonce}">{SCRIPT}</script>\n</body>\n</html>\n'
    )


def make_figures(report: ReportData) -> dict[str, go.Figure]:
    """The figures this report has data for, by the id of their place in the page."""
    fit = report.fit
    figures = {
        "role-ranking": plots.role_ranking(fit),
        "by-layer": plots.by_layer(fit),
        "explained-variance": plots.explained_variance(fit),
    }
    # The page has its own legend of groups, which stays in sight while the ranking scrolls.
    figures["role-ranking"].update_layout(showlegend=False)
    components = min(len(point.pcs) for point in fit.points)
    if components >= 2:
        figures["persona-map"] = plots.persona_map(fit)
    if components >= 3:
        figures["persona-map-3d"] = plots.persona_map_3d(fit)
    if len(fit.layers) > 1:
        figures["layer-cosines"] = plots.layer_cosines(fit)
    if report.evidence is not None and any(group.values for group in report.evidence.groups):
        figures["evidence-by-group"] = plots.evidence_by_group(report.evidence)
    return figures


def _body(report: ReportData, figures: dict[str, go.Figure]) -> str:
    fit = report.fit
    heights = {name: figure.layout.height for name, figure in figures.items()}
    content = [
        sections.summary_table(report),
        sections.persona_maps(fit, set(figures)),
        sections.ranking(fit, heights["role-ranking"], tall=len(fit.ranking) > plots.TALL_RANKING),
        sections.layers_and_components(fit),
        sections.evidence(report.evidence, heights.get("evidence-by-group", 0)),
        sections.held(report.held),
        sections.dropped_roles(fit.dropped),
        sections.sample_rollouts(report.samples),
    ]
    return (
        f"<main>\n{sections.header(report)}\n{_navigation(content)}\n"
        + "\n".join(part for part in content if part)
        + '\n<footer>Made with persona-axis. Method: Lu et al., "The Assistant Axis", '
        "arXiv 2601.10387.</footer>\n"
        "<noscript>The figures need JavaScript; the texts and tables do not.</noscript>\n</main>"
    )


def _navigation(content: list[str]) -> str:
    names = {
        "run": "The run",
        "map": "Persona map",
        "ranking": "Ranking",
        "layers": "Layers",
        "components": "Components",
        "evidence": "By group",
        "held": "Held",
        "dropped": "Dropped roles",
        "samples": "Sample rollouts",
    }
    whole = "".join(content)
    links = "".join(f'<a href="#{name}">{label}</a>' for name, label in names.items() if f'<h2 id="{name}"' in whole)
    return f"<nav>{links}</nav>"


def _figures_json(figures: dict[str, go.Figure]) -> str:
    """All figures as one JSON block; ``<`` is escaped so that no text can end the script element."""
    parts: dict[str, Any] = {name: json.loads(figure.to_json()) for name, figure in figures.items()}
    return json.dumps(parts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
