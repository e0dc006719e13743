"""What the user sees at the end of a run: the verdict, the numbers and the ends of the ranking.

Plain text, at most 100 columns, ASCII bars: it must survive a log file and a terminal without UTF-8.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from persona_axis.geometry.fit import Fit, Interval
from persona_axis.report.look import spoken
from persona_axis.report.words import (
    MISSING,
    count,
    duration,
    findings_of_fit,
    findings_of_summary,
    number,
    verdict,
)

COLUMNS = 100
LABEL = 12  # width of the left column of the facts
ENDS = 10  # roles shown at either end of the ranking
NAME = 22
TRACK = 42


def render_summary(summary: Mapping[str, Any], fit: Fit | None, report_path: str | os.PathLike[str] | None) -> str:
    """The text for the terminal; ``fit`` and ``report_path`` are None when a run has not got that far."""
    found = findings_of_summary(summary) if fit is None else findings_of_fit(fit)
    headline = "No axis was fitted." if found is None else verdict(found)
    blocks = ["\n".join(textwrap.wrap(headline, COLUMNS)), _facts(summary, fit)]
    blocks.append(_ranking(fit) if fit is not None else _ends_by_name(summary))
    notes = [*(fit.notes if fit is not None else []), *(summary.get("notes") or [])]
    blocks += ["\n".join(labelled("note", str(note)) for note in dict.fromkeys(notes))]
    if report_path is not None:
        blocks.append(f"{'report':<{LABEL}}{os.fspath(report_path)}")
    return "\n\n".join(block for block in blocks if block) + "\n"


# ----------------------------------------------------------------------- facts


def _facts(summary: Mapping[str, Any], fit: Fit | None) -> str:
    rows = [
        ("model", _model(summary)),
        ("rollouts", _work(summary)),
        ("time", _time(summary.get("seconds") or {})),
        ("judge", _judge(summary.get("judge") or {})),
        ("filter", _filter(summary, fit)),
        ("fit", _settings(summary)),
        ("layers", _layers(fit)),
        ("held", _held(summary.get("held"))),
        ("ignored", ", ".join(map(str, summary.get("ignored_generation_settings") or []))),
        ("dropped", _dropped(fit)),
    ]
    return "\n".join(labelled(label, text) for label, text in rows if text)


def labelled(label: str, text: str) -> str:
    """A labelled line, wrapped under itself; paths and hashes are never broken at their hyphens."""
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=f"{label:<{LABEL}}",
        subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
    )


def _model(summary: Mapping[str, Any]) -> str:
    size = [f"{summary[key]} {word}" for key, word in (("n_layers", "layers"),) if summary.get(key)]
    size += [f"width {summary['d_model']}"] if summary.get("d_model") else []
    return f"{summary.get('model') or MISSING}" + (f" ({', '.join(size)})" if size else "")


def _work(summary: Mapping[str, Any]) -> str:
    parts = [count(summary.get("rollouts"))]
    if summary.get("tokens") is not None:
        parts.append(f"{count(summary['tokens'])} reply tokens")
    if summary.get("tokens_per_second") is not None:
        parts.append(f"{count(summary['tokens_per_second'])} tokens/s")
    if summary.get("engine"):
        parts.append(f"engine {summary['engine']}")
    return ", ".join(parts)


def _time(seconds: Mapping[str, float]) -> str:
    stages = [f"{name} {duration(value)}" for name, value in seconds.items() if name != "total"]
    total = f"{duration(seconds['total'])} in all" if "total" in seconds else ""
    return f"{total}: {', '.join(stages)}" if total and stages else total or ", ".join(stages)


def _judge(judge: Mapping[str, Any]) -> str:
    counts = [f"{count(judge[k])} {k}" for k in ("kept", "dropped", "failed") if judge.get(k) is not None]
    return f"{judge.get('name') or MISSING}: {', '.join(counts)}" if judge else ""


def _filter(summary: Mapping[str, Any], fit: Fit | None) -> str:
    if fit is None:
        return str(summary.get("filter") or "")
    note = f" ({fit.filter_note})" if fit.filter_note else ""
    return f"{fit.filter}{note}, at least {fit.min_count} kept rollouts per role"


def _settings(summary: Mapping[str, Any]) -> str:
    named = (("estimator", "{}"), ("seed", "seed {}"), ("catalog_hash", "catalog {}"))
    return ", ".join(form.format(summary[key]) for key, form in named if summary.get(key) is not None)


def _layers(fit: Fit | None) -> str:
    if fit is None:
        return ""
    best = next(f for f in fit.per_layer if f.layer == fit.most_reliable_layer)
    at = fit.at_layer()
    return (
        f"analysed {at.layer} (reliability {number(at.reliability)}), most reliable {best.layer} "
        f"({number(best.reliability)}), |cos(axis, PC1)| there {number(abs(best.cos_axis_pc1.value))}"
    )


def _held(held: Mapping[str, Any] | None) -> str:
    if not held:
        return ""
    evidence = {way: number(value["value"], 3) for way, value in held["mean_evidence"].items()}
    return (
        f"role prompts answered plain, steered away, capped at layers {held['layers'][0]}-{held['layers'][-1]}: "
        f"evidence {evidence['plain']}, {evidence['steered']}, {evidence['capped']} nats per token; neutral perplexity "
        f"x{number(held['perplexity_ratio'], 3)} when capped"
    )


def _dropped(fit: Fit | None) -> str:
    if fit is None or not fit.dropped:
        return ""
    shown = "; ".join(f"{spoken(role.name)} ({role.reason})" for role in fit.dropped[:5])
    more = f"; {len(fit.dropped) - 5} more in the report" if len(fit.dropped) > 5 else ""
    return f"{len(fit.dropped)} role{'s' if len(fit.dropped) > 1 else ''}: {shown}{more}"


# --------------------------------------------------------------------- ranking


def _ranking(fit: Fit) -> str:
    """The Assistant, the ten highest and the ten lowest roles as intervals on one common scale."""
    rows = [(spoken(role.name), role.projection) for role in reversed(fit.ranking)]
    hidden = max(0, len(rows) - 2 * ENDS)
    shown = rows if not hidden else rows[:ENDS] + rows[-ENDS:]
    scale = _Scale([interval for _, interval in shown] + [fit.assistant])
    lines = [
        f"Ranking at layer {fit.layer}, held out: projection on the axis [95 % interval]; | marks the Assistant",
        _row("Assistant", fit.assistant, scale, fit.assistant, mark="#"),
    ]
    for i, (name, interval) in enumerate(shown):
        if hidden and i == ENDS:
            lines.append(f"  ... {hidden} roles between ...")
        lines.append(_row(name, interval, scale, fit.assistant))
    return "\n".join(lines)


class _Scale:
    """One scale for all rows: the track from the lowest to the highest end, figures equally wide."""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        ends = [x for i in intervals for x in (i.value, i.low, i.high) if math.isfinite(x)]
        self.low, self.high = min(ends), max(ends)
        # Projections grow with the residual stream: two decimals of 3,512.40 would be noise.
        largest = max(abs(self.low), abs(self.high))
        self.digits = 2 if largest < 100 else 1 if largest < 1000 else 0
        self.width = max(len(number(x, self.digits)) for x in (self.low, self.high))

    def figures(self, interval: Interval) -> str:
        """Value and interval, decimal points one under another."""
        value, low, high = (
            f"{number(x, self.digits):>{self.width}}" for x in (interval.value, interval.low, interval.high)
        )
        return f"{value} [{low}, {high}]"

    def column(self, value: float) -> int | None:
        if not math.isfinite(value):
            return None
        span = self.high - self.low
        return round((value - self.low) / span * (TRACK - 1)) if span else 0


def _row(name: str, interval: Interval, scale: _Scale, assistant: Interval, mark: str = "o") -> str:
    label = name if len(name) <= NAME else name[: NAME - 2] + ".."
    return f"  {label:<{NAME}} {scale.figures(interval)}  {_bar(interval, scale, assistant, mark)}".rstrip()


def _bar(interval: Interval, scale: _Scale, assistant: Interval, mark: str) -> str:
    track = [" "] * TRACK
    low, high = scale.column(interval.low), scale.column(interval.high)
    if low is not None and high is not None:
        track[low : high + 1] = "-" * (high - low + 1)
    own = scale.column(assistant.value)
    if own is not None:
        track[own] = "|"
    value = scale.column(interval.value)
    if value is not None:
        track[value] = mark
    return "".join(track)


def _ends_by_name(summary: Mapping[str, Any]) -> str:
    rows = (("least like", summary.get("roles_low")), ("most like", summary.get("roles_high")))
    return "\n".join(labelled(label, ", ".join(spoken(str(n)) for n in names)) for label, names in rows if names)
