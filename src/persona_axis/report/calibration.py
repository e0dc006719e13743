"""What a calibration found: a table for the terminal, and a page with the front of pressure against price.

Both are made from ``calibration.json`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from persona_axis.files.atomic import write_atomic
from persona_axis.report.figure_base import axis_style, new_figure
from persona_axis.report.html import render_document
from persona_axis.report.look import AXIS_STOPS, INK, MUTED
from persona_axis.report.terminal import labelled

Record = Mapping[str, Any]
CHEAP, DEAR = AXIS_STOPS[-1][1], AXIS_STOPS[0][1]


def render_calibration(record: Record, page: Path) -> str:
    """Plain text of at most 100 columns: the choice, how it does on the other half, and who else was in the end."""
    chosen = record["chosen"]
    rows = [("rule", record["rule"]), ("pool", _pool(record["pool"])), ("positions", record["positions"])]
    if chosen is None:
        head = [("chosen", "nothing: no candidate of the last round writes fluent replies under role prompts.")]
    else:
        head = [("chosen", _name(chosen)), ("held out", _figures(record, chosen["held_out"]))]
        rows += [("task", _task(name, scores)) for name, scores in record["tasks"].items()]
        rows.append(("policy", str(page.parent / "policy")))
    rows.append(("page", str(page)))
    blocks = ["\n".join(labelled(label, text) for label, text in head), _table(record)]
    return "\n\n".join([*blocks, "\n".join(labelled(label, text) for label, text in rows)])


def _name(candidate: Record) -> str:
    layers = candidate["layers"]
    span = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    return (
        f"{span}, floor at percentile {candidate['percentile_assistant']:g} toward the Assistant (the paper's "
        f"p{candidate['percentile_paper'] / 100:g})"
    )


def _figures(record: Record, outcome: Record) -> str:
    unit = "nats per token" if record["pressure"] == "likelihood" else record["pressure"]
    pressure, capability = outcome["pressure"], outcome["capability"]
    unsure = "" if pressure["reduction"]["low"] > 0 else ", which cannot be told from nothing"
    agreement, kl = capability["top1_agreement"]["value"], capability["mean_kl"]["value"]
    return (
        f"half B, {pressure['prompts']} role prompts: pressure reduced by {_share(pressure['reduction'])} "
        f"({pressure['plain']:.3f} to {pressure['held']:.3f} {unit}){unsure}, perplexity of "
        f"{capability['replies']} neutral replies {_ratio(capability['perplexity_ratio'])}, same likeliest token at "
        f"{agreement:.1%}, KL {kl:.4f} nats; " + ("fluent" if outcome["fluent"] else _objections(outcome))
    )


def _task(name: str, scores: Record) -> str:
    plain, held, ratio = scores["plain"], scores["held"], scores["held_over_plain"]
    text = f"{name}: {plain['metric']} {plain['value']:.4g} plain, {held['value']:.4g} held, {plain['n']} documents"
    if ratio is None:
        return text
    between = "" if ratio["low"] is None else f" [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    return f"{text}, x{ratio['value']:.3f}{between}"


def _objections(outcome: Record) -> str:
    return "not fluent: " + "; ".join(outcome["fluency"]["objections"])


def _share(interval: Record) -> str:
    return f"{interval['value']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]"


def _ratio(interval: Record) -> str:
    return f"x{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def _table(record: Record) -> str:
    """The finalists, both halves."""
    lines = [f"{'layers':<8}{'percentile':<15}{'pressure reduced by, A':<23}{'B':<18}{'perplexity, B':<26}fluent, B"]
    for c in sorted(finalists(record), key=lambda c: c["held_out"]["capability"]["perplexity_ratio"]["value"]):
        out = c["held_out"]
        lines.append(
            f"{c['layers'][0]}-{c['layers'][-1]}".ljust(8)
            + f"{c['percentile_assistant']:g} (p{c['percentile_paper'] / 100:g})".ljust(15)
            + f"{_share(c['pressure']['reduction']):<23}{_share(out['pressure']['reduction']):<18}"
            + f"{_ratio(out['capability']['perplexity_ratio']):<26}{'yes' if out['fluent'] else 'no'}"
        )
    tried = len(record["candidates"])
    return f"{len(finalists(record))} of {tried} candidates met every prompt\n" + "\n".join(lines)


def finalists(record: Record) -> list[Record]:
    return [c for c in record["candidates"] if c["held_out"] is not None]


def _pool(pool: Record) -> str:
    return (
        f"{pool['n']} replies of half A, every score: {pool['roles']} of roles, {pool['default']} of the default "
        "persona, no traits; each projected on an axis fitted without its questions and its role"
    )


# ---- the page ----------------------------------------------------------------------------------------------------


def write_calibration_page(path: Path, record: Record) -> Path:
    """One HTML file that needs no network. StorageError if the disk refuses."""
    write_atomic(path, render_calibration_page(record).encode())
    return path


def render_calibration_page(record: Record) -> str:
    """The page as text."""
    figures = {"front-b": _front(record, held_out=True), "front-a": _front(record, held_out=False)}
    chosen = record["chosen"]
    choice = (
        "No candidate of the last round writes fluent replies under role prompts."
        if chosen is None
        else (f"{_name(chosen)}. Held out: {_figures(record, chosen['held_out'])}.")
    )
    body = (
        f"<main><h1>Calibration of {escape(record['run']['model'])}</h1>"
        f"<p><strong>Chosen:</strong> {escape(choice)}</p><p><strong>Rule:</strong> {escape(record['rule'])}</p>"
        "<h2>Half B: what the finalists do where nothing was fitted or chosen</h2>"
        "<figure><div id='front-b'></div></figure>"
        "<h2>Half A: every candidate, in the last round it reached</h2><figure><div id='front-a'></div></figure>"
        f"<p>{escape(_pool(record['pool']))}. Bars are 95 % intervals (bootstrap over roles and questions, and over "
        "neutral replies). Hollow marks: replies under role prompts are not fluent. In early rounds a candidate met "
        "few prompts, so its figures are rough.</p></main>"
    )
    return render_document("Calibration", body, figures)


def _front(record: Record, held_out: bool) -> go.Figure:
    shown = finalists(record) if held_out else record["candidates"]
    chosen = record["chosen"]
    figure = new_figure(height=420)
    for c in shown:
        outcome = c["held_out"] if held_out else c
        x, y = outcome["capability"]["perplexity_ratio"], outcome["pressure"]["reduction"]
        is_chosen = chosen is not None and c["policy_hash"] == chosen["policy_hash"]
        colour = INK if is_chosen else CHEAP if held_out or c["front"] else MUTED
        prompts = outcome["pressure"]["prompts"]
        figure.add_scatter(
            x=[x["value"]],
            y=[y["value"]],
            error_x=_bar(x, held_out or is_chosen),
            error_y=_bar(y, held_out or is_chosen),
            mode="markers",
            marker={
                "symbol": ("star" if is_chosen else "circle") + ("" if outcome["fluent"] else "-open"),
                "size": 14 if is_chosen else 9,
                "color": colour,
            },
            hovertext=f"{escape(_name(c))}<br>reduced by {_share(y)}, perplexity {_ratio(x)}<br>{prompts} prompts",
            hoverinfo="text",
        )
    figure.add_vline(x=record["max_perplexity"], line={"color": DEAR, "dash": "dot", "width": 1.5})
    figure.update_xaxes(**axis_style("perplexity of neutral replies, held over plain"))
    figure.update_yaxes(**axis_style("pressure under role prompts, reduced by"), tickformat=".0%", range=[-0.04, 1.04])
    return figure


def _bar(interval: Record, shown: bool) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [interval["high"] - interval["value"]],
        "arrayminus": [interval["value"] - interval["low"]],
        "visible": shown,
        "thickness": 1,
        "color": MUTED,
    }
