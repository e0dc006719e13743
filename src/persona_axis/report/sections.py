"""The sections of the HTML report, each from its data to a piece of HTML; every text is escaped here.

A section returns "" when there is nothing to show. Figures are referred to by id; ``html.py`` makes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from persona_axis.geometry.fit import DroppedRole, Fit, Interval
from persona_axis.report.data import EvidenceSummary, HeldDemo, ReportData, SampleRollout
from persona_axis.report.look import group_styles, spoken
from persona_axis.report.words import (
    MISSING,
    count,
    duration,
    findings_of_fit,
    magnitude,
    number,
    percent,
    signed_percent_interval,
    verdict,
)

STAGES = ("load", "generate", "judge", "fit", "total")
CONDITIONS = {"plain": "plain", "steered": "steered away", "capped": "capped"}


# ---------------------------------------------------------------------- header


def header(data: ReportData) -> str:
    """Title, model, verdict and the four figures it rests on."""
    model = str(data.summary.get("model") or MISSING)
    return (
        f'<header><p class="eyebrow">persona-axis report · {escape(model)}</p>'
        f"<h1>{escape(data.title)}</h1>"
        f'<p class="verdict">{_typeset(verdict(findings_of_fit(data.fit)))}</p>'
        f"{_tiles(data)}{_callouts(data)}</header>"
    )


def _tiles(data: ReportData) -> str:
    fit = data.fit
    at = fit.at_layer()
    cos = magnitude(at.cos_axis_pc1)
    kept = sum(role.kept for role in fit.ranking)
    total = sum(role.total for role in fit.ranking)
    tiles = [
        (
            "|cos(axis, PC1)|",
            number(cos.value),
            f"95 % interval {_bracket(cos)}; {number(abs(at.cos_axis_pc1_unfiltered))} unfiltered",
        ),
        (
            "reliability of the axis",
            number(at.reliability),
            f"random halves of the questions; best at layer {fit.most_reliable_layer}",
        ),
        ("the Assistant's place on PC1", *_place(fit)),
        (
            "role rollouts kept",
            percent(kept / total) if total else MISSING,
            f"{count(kept)} of {count(total)}, {len(fit.ranking)} roles ranked, {len(fit.dropped)} dropped",
        ),
    ]
    return _tile_row(tiles)


def _place(fit: Fit) -> tuple[str, str]:
    """The edge distance as a word and its small print; the interval keeps the sign."""
    edge = fit.edge_distance
    if math.isnan(edge.value):
        return MISSING, "not measured"
    side = "beyond" if edge.value < 0 else "short"
    return (
        f"{percent(abs(edge.value))} {side}",
        f"of the roles' range, from the outermost role, held out; 95 % interval "
        f"[{percent(edge.low)}, {percent(edge.high)}], negative = beyond",
    )


def _tile_row(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Name, value and small print of a few headline figures."""
    body = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{_typeset(value)}<small>{_typeset(note)}</small></dd></div>'
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{body}</dl>'


def _typeset(text: str) -> str:
    """Our own words and numbers as HTML: a number stays with its unit, and minus is a minus sign."""
    joined = re.sub(r"\[[^\]]*\]|\d %|\b(reliability|layer|PC\d) \d", _unbroken, text)
    return escape(re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", joined))


def _unbroken_units(text: str) -> str:
    return re.sub(r"\d %", _unbroken, text)


def _unbroken(match: re.Match[str]) -> str:
    return match[0].replace(" ", "\N{NO-BREAK SPACE}")


def _bracket(interval: Interval) -> str:
    return f"[{number(interval.low)}, {number(interval.high)}]"


def _callouts(data: ReportData) -> str:
    """What a reader must know before trusting a figure: the filter fell back, and every note."""
    notes = [*data.fit.notes, *(data.summary.get("notes") or [])]
    if data.fit.filter_note:
        notes.insert(0, f"Filter: {data.fit.filter_note}")
    unique = dict.fromkeys(str(note) for note in notes)
    return "".join(f'<p class="callout">{escape(note)}</p>' for note in unique)


# --------------------------------------------------------------------- summary


def summary_table(data: ReportData) -> str:
    """How the figures came about: model, work done, judge, filter, settings."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in _facts(data) if value)
    return f'<h2 id="run">The run</h2><dl class="facts">{rows}</dl>'


def _facts(data: ReportData) -> list[tuple[str, str]]:
    """Label and HTML value of each row, in reading order."""
    summary, fit = data.summary, data.fit
    ignored = summary.get("ignored_generation_settings") or []
    speed = summary.get("tokens_per_second")
    return [
        ("model", _code(summary.get("model"))),
        ("size", f"{fit.n_layers} layers, residual width {count(fit.d_model)}"),
        ("rollouts", count(summary.get("rollouts"))),
        ("engine", escape(str(summary.get("engine") or MISSING))),
        ("reply tokens", count(summary.get("tokens"))),
        ("speed", f"{count(speed)} tokens/s" if speed is not None else MISSING),
        ("time", _seconds(summary.get("seconds") or {})),
        ("judge", _judge(summary.get("judge") or {})),
        ("filter", _filter(fit)),
        ("estimator", f"{escape(fit.estimator)}, {count(fit.bootstrap_draws)} bootstrap draws"),
        ("analysed layer", f"{fit.layer}, zero-based, of {fit.n_layers} ({len(fit.layers)} captured)"),
        (
            "edge distance",
            _typeset(
                f"{signed_percent_interval(fit.edge_distance)} held out, "
                f"{percent(fit.edge_distance_in_sample)} in sample (negative = beyond)"
            ),
        ),
        ("seed", escape(str(summary.get("seed", MISSING)))),
        ("catalog", _code(summary.get("catalog_hash"))),
        ("ignored settings", ", ".join(_code(setting) for setting in ignored) or "none"),
        ("Assistant's place", _places(fit)),
    ]


def _seconds(seconds: Mapping[str, float]) -> str:
    parts = [f"{stage} {duration(seconds[stage])}" for stage in STAGES if stage in seconds and stage != "total"]
    total = f"<b>{duration(seconds['total'])}</b>" if "total" in seconds else ""
    stages = escape(", ".join(parts))
    return f"{total} ({stages})" if total and stages else total or stages or MISSING


def _judge(judge: Mapping[str, Any]) -> str:
    if not judge:
        return MISSING
    counts = ", ".join(
        f"{count(judge[key])} {key}" for key in ("kept", "dropped", "failed") if judge.get(key) is not None
    )
    return f"{_code(judge.get('name'))}: {counts}"


def _filter(fit: Fit) -> str:
    note = f"; {escape(fit.filter_note)}" if fit.filter_note else ""
    return f"{_code(fit.filter)}, at least {fit.min_count} kept rollouts per role{note}"


def _places(fit: Fit) -> str:
    """Where the Assistant lies on each component, from the nearer edge of the roles' range."""
    places = ", ".join(
        f"PC{place.component} {percent(abs(place.edge_distance))} {'outside' if place.edge_distance < 0 else 'inside'}"
        for place in fit.assistant_places[:3]
    )
    return _typeset(f"{places} the roles' range") if places else ""


def _code(value: Any) -> str:
    return MISSING if value is None else f"<code>{escape(str(value))}</code>"


# --------------------------------------------------------------------- figures


def persona_maps(fit: Fit, made: set[str]) -> str:
    """The 2-D and the 3-D map, as far as the fit has two or three components."""
    if "persona-map" not in made:
        return ""
    flat = _figure(
        "persona-map",
        540,
        "Each point is one persona's mean activation, placed by the two directions in which the roles differ "
        "most (PC1 and PC2, principal components). Colour is the projection on the Assistant Axis: blue is "
        "close to the Assistant, orange far from it. Positions and colours are <b>in sample</b>: the "
        "personas shown also made the axis and the components. The ranking below is not.",
    )
    solid = _figure(
        "persona-map-3d",
        480,
        "The same map with PC3 added, in sample. Drag to turn it, hover for role, group and projection.",
        classes="screen-only",
    )
    return f'<h2 id="map">Persona map, layer {fit.layer}</h2>{flat}{solid if "persona-map-3d" in made else ""}'


def ranking(fit: Fit, height: int, tall: bool) -> str:
    """The held-out ranking with a legend of groups that stays in sight while a tall one scrolls."""
    caption = (
        f"Roles by projection on the axis at layer {fit.layer}; the higher a role stands, the more it is "
        "like the Assistant. <b>Held out</b> (cross-fitted): each role is projected on an axis fitted "
        "without that role and without the questions it is projected on. Lines are 95 % bootstrap "
        "intervals, the grey band is the Assistant's own."
    )
    if tall:
        caption += " Scroll inside the frame for all roles."
    return f'<h2 id="ranking">Role ranking</h2>{_legend(fit)}' + _figure(
        "role-ranking", height, caption, classes="tall", scroll=tall
    )


def _legend(fit: Fit) -> str:
    shapes = {
        "circle": '<circle cx="5" cy="5" r="5"/>',
        "diamond": '<path d="M5 0 10 5 5 10 0 5z"/>',
        "square": '<path d="M1 1h8v8h-8z"/>',
        "triangle-up": '<path d="M5 0 10 10H0z"/>',
    }
    styles = group_styles(role.group for role in fit.ranking)
    items = "".join(
        f'<li><svg viewBox="0 0 10 10" fill="{colour}" aria-hidden="true">{shapes[symbol]}</svg>'
        f"{escape(spoken(group))}</li>"
        for group, (colour, symbol) in styles.items()
    )
    return f'<ul class="legend">{items}</ul>'


def layers_and_components(fit: Fit) -> str:
    """How the axis behaves across layers, and how many directions the roles need."""
    at = fit.at_layer()
    by_layer = _figure(
        "by-layer",
        480,
        "Top: how far the axis points along PC1, the roles' main direction (1 = the same direction, 0 = "
        "unrelated), in sample, with the 95 % interval over questions and roles; dashed, the same with "
        "every rollout kept. Bottom: reliability, how well axes fitted on random halves of the questions "
        "agree, corrected for the halved data (1 = other questions would give the same axis).",
    )
    variance = _figure(
        "explained-variance",
        420,
        f"How much of the difference between roles each component carries, in sample: {at.components_70}, "
        f"{at.components_80} and {at.components_90} components reach 70, 80 and 90 %. Few components mean "
        "that the roles vary along few directions.",
    )
    cosines = _figure(
        "layer-cosines",
        420,
        "How alike the axes of two layers are (cosine; dark = the same direction), in sample. A dark block "
        "is a run of layers that share one axis.",
    )
    pair = (
        f'<div class="pair">{variance}{cosines}</div>' if len(fit.layers) > 1 else f'<div class="pair">{variance}</div>'
    )
    return f'<h2 id="layers">Layer by layer</h2>{by_layer}<h2 id="components">Components and layers</h2>{pair}'


def evidence(summary: EvidenceSummary | None, height: int) -> str:
    """How the judge's numbers spread per persona group."""
    if summary is None or not any(group.values for group in summary.groups):
        return ""
    note = f" {escape(summary.threshold_note).rstrip('.')}." if summary.threshold_note else ""
    if summary.number_name == "evidence":
        caption = (
            "Evidence is how much likelier a reply is under its role's prompt than under no system message, "
            "in nats per token; 0 means that the prompt left no trace. The dark strip under each shape spans "
            "the middle half." + _where_kept(summary) + note
        )
    else:
        caption = (
            "Scores say how far a reply expresses its role: 0 refuses as itself, 1 answers as itself, 2 is "
            "itself with some of the role, 3 is fully the role." + note
        )
    name = "Evidence" if summary.number_name == "evidence" else "Scores"
    return f'<h2 id="evidence">{name} by persona group</h2>' + _figure("evidence-by-group", height, caption)


def _where_kept(summary: EvidenceSummary) -> str:
    if summary.threshold is None:
        return ""
    return " Replies right of the dotted line count as expressing their role."


def _figure(name: str, height: int, caption: str, classes: str = "", scroll: bool = False) -> str:
    """A place for a Plotly figure; ``caption`` is HTML written in this file, never data."""
    area = f'<div id="{name}" style="height:{height}px"></div>'
    if scroll:
        area = f'<div class="scroll" tabindex="0">{area}</div>'
    kind = f' class="{classes}"' if classes else ""
    return f"<figure{kind}>{area}<figcaption>{_unbroken_units(caption)}</figcaption></figure>"


# --------------------------------------------------------------------- samples


def dropped_roles(dropped: Sequence[DroppedRole]) -> str:
    """The roles that are in no figure, and why."""
    if not dropped:
        return ""
    rows = "".join(f"<tr><td>{escape(spoken(role.name))}</td><td>{escape(role.reason)}</td></tr>" for role in dropped)
    return (
        '<h2 id="dropped">Dropped roles</h2><p class="muted">In none of the figures above.</p>'
        f"<table><thead><tr><th>role</th><th>reason</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def sample_rollouts(samples: Sequence[SampleRollout]) -> str:
    """Replies to read, per persona, highest number first."""
    if not samples:
        return ""
    personas = dict.fromkeys(sample.persona for sample in samples)
    blocks = "".join(
        _persona_samples(name, [s for s in samples if s.persona == name], opened=i == 0)
        for i, name in enumerate(personas)
    )
    intro = "Strongest, median and weakest replies by the judge's number. Dropped replies are in no vector."
    return f'<h2 id="samples">Sample rollouts</h2><p class="muted">{intro}</p>{blocks}'


def _persona_samples(persona: str, samples: Sequence[SampleRollout], opened: bool) -> str:
    ordered = sorted(samples, key=lambda s: -math.inf if s.number is None else s.number, reverse=True)
    numbers = [s.number for s in ordered if s.number is not None]
    span = f"{ordered[0].number_name} {number(numbers[0])} to {number(numbers[-1])}" if numbers else ""
    kept = sum(sample.kept for sample in ordered)
    cards = "".join(_card(sample, _standing(i, len(numbers))) for i, sample in enumerate(ordered))
    return (
        f"<details{' open' if opened else ''}><summary><b>{escape(spoken(persona))}</b>"
        f'<span class="muted">{len(ordered)} shown, {kept} kept</span>'
        f'<span class="muted">{escape(span)}</span></summary><div class="cards">{cards}</div></details>'
    )


def _standing(index: int, numbered: int) -> str:
    """Strongest, median or weakest among those with a number, which come first."""
    if numbered < 2 or index >= numbered:
        return ""
    if index == 0:
        return "strongest"
    if index == numbered - 1:
        return "weakest"
    return "median" if numbered % 2 and index == numbered // 2 else ""


def _card(sample: SampleRollout, standing: str) -> str:
    verdict_class = "kept" if sample.kept else "dropped"
    digits = 3 if sample.number_name == "evidence" else 0
    value = "not judged" if sample.number is None else f"{sample.number_name} {number(sample.number, digits)}"
    finish = "" if sample.finish_reason == "stop" else f'<span class="muted">{escape(_finish(sample))}</span>'
    title = f"<b>{standing}</b>" if standing else ""
    prompt = f'<span class="said">{escape(sample.prompt)}</span>' if sample.prompt else "none"
    return (
        f'<article class="card {verdict_class}"><header>{title}'
        f'<span class="badge">{escape(value)}</span>'
        f'<span class="badge {verdict_class}">{verdict_class}</span>{finish}</header>'
        f"<dl><dt>system prompt</dt><dd>{prompt}</dd>"
        f'<dt>question</dt><dd class="said">{escape(sample.question)}</dd>'
        f'<dt>reply</dt><dd class="said reply">{escape(sample.reply)}</dd></dl></article>'
    )


def _finish(sample: SampleRollout) -> str:
    return "cut at the token limit" if sample.finish_reason == "length" else f"ended: {sample.finish_reason}"


# ------------------------------------------------------------------------ held


def held(demo: HeldDemo | None) -> str:
    """The same role prompts answered plain, steered away from the Assistant and capped."""
    if demo is None:
        return ""
    rows = "".join(_held_row(row.persona, row.question, _by_condition(row)) for row in demo.rows)
    return (
        f'<h2 id="held">Held on the axis</h2><p>{escape(demo.description)}</p>{_held_tiles(demo)}'
        '<p class="muted" style="margin-top:14px">Each prompt asks for a role. <b>Plain</b> is the model '
        "as it is; <b>steered away</b> is pushed towards the role end of the axis; <b>capped</b> may not "
        "fall below the bound. Lower evidence means that less of the role shows in the reply.</p>"
        f"{rows}"
    )


def _by_condition(row: Any) -> dict[str, str]:
    return {key: getattr(row, key) for key in CONDITIONS}


def _held_tiles(demo: HeldDemo) -> str:
    tiles = [
        (f"mean evidence, {CONDITIONS[key]}", number(mean.value, 3), f"95 % interval {_bracket3(mean)}")
        for key in CONDITIONS
        if (mean := demo.mean_evidence.get(key)) is not None
    ]
    if demo.perplexity_ratio is not None:
        tiles.append(("neutral perplexity ratio", number(demo.perplexity_ratio, 3), "capped over plain; 1 = no cost"))
    return _tile_row(tiles)


def _bracket3(interval: Interval) -> str:
    return f"[{number(interval.low, 3)}, {number(interval.high, 3)}]"


def _held_row(persona: str, question: str, replies: Mapping[str, str]) -> str:
    columns = "".join(
        f'<div><h4>{CONDITIONS[key]}</h4><p class="said">{escape(reply)}</p></div>' for key, reply in replies.items()
    )
    return (
        f'<div class="held-row"><h3>{escape(spoken(persona))}</h3>'
        f'<p class="muted">{escape(question)}</p><div class="replies">{columns}</div></div>'
    )
