"""Numbers and the verdict in words, the same sentence in the report and in the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persona_axis.geometry.fit import Fit, Interval

# The verdict's questions. Reliability is the cosine expected between this axis and one from as many fresh questions:
# below NOISY the axis depends on what was asked. Below ALIGNED (lower end of the interval), being the Assistant is not
# what the personas mainly differ in. The paper reports |cos| above 0.7 at its models' middle layers.
RELIABLE = 0.9
NOISY = 0.7
ALIGNED = 0.5

MISSING = "n/a"


@dataclass(frozen=True, slots=True)
class Findings:
    """The four figures the verdict speaks of; NaN where one was not measured."""

    layer: int
    n_layers: int
    cos_axis_pc1: Interval  # signed
    reliability: float
    edge_distance: Interval


def findings_of_fit(fit: Fit) -> Findings:
    """The findings at the analysed layer."""
    at = fit.at_layer()
    return Findings(fit.layer, fit.n_layers, at.cos_axis_pc1, at.reliability, fit.edge_distance)


def findings_of_summary(summary: Mapping[str, Any]) -> Findings | None:
    """The findings a ``summary.json`` holds, without intervals; None when nothing was fitted."""
    layer, n_layers = summary.get("layer"), summary.get("n_layers")
    if layer is None or n_layers is None:
        return None
    edge = summary.get("assistant_edge_distance")
    return Findings(
        layer,
        n_layers,
        _point(_at_layer(summary, "cos_axis_pc1")),
        _at_layer(summary, "reliability"),
        _point(math.nan if edge is None else edge),
    )


def verdict(found: Findings) -> str:
    """One sentence: is there an axis, how sure, and where the Assistant lies."""
    cos = magnitude(found.cos_axis_pc1)
    clauses = [_headline(found, cos)]
    if not math.isnan(cos.value):
        clauses.append(f"|cos(axis, PC1)| = {with_interval(cos)}")
    if not math.isnan(found.reliability):
        clauses.append(f"reliability {number(found.reliability)}")
    if not math.isnan(found.edge_distance.value):
        clauses.append(where_assistant_lies(found.edge_distance.value))
    return "; ".join(clauses) + "."


def where_assistant_lies(edge_distance: float) -> str:
    """The Assistant's distance from the outermost role on PC1, in words."""
    share = percent(abs(edge_distance))
    if edge_distance < 0:
        return f"the Assistant lies {share} of the range beyond the outermost role"
    if edge_distance == 0:
        return "the Assistant lies level with the outermost role"
    return f"the Assistant lies inside the roles' range, {share} of it short of the outermost role"


def magnitude(interval: Interval) -> Interval:
    """The interval of the absolute value."""
    ends = sorted((abs(interval.low), abs(interval.high)))
    low = 0.0 if interval.low < 0 < interval.high else ends[0]
    return Interval(abs(interval.value), low, ends[1])


def number(value: float | None, digits: int = 2) -> str:
    """A fixed number of decimals; what was not measured says so."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:,.{digits}f}"


def with_interval(interval: Interval, digits: int = 2) -> str:
    """``0.81 [0.74, 0.86]``; the bracket is left out when there was no bootstrap."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return number(interval.value, digits)
    return f"{number(interval.value, digits)} [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def percent(share: float) -> str:
    """A share in per cent: whole numbers, one decimal below ten per cent where it says more than 0 %."""
    value = 100 * share
    if math.isnan(value):
        return MISSING
    if 0 < abs(value) < 0.95:
        return f"{value:.1f} %"
    return f"{value:.0f} %"


def signed_percent_interval(interval: Interval) -> str:
    """``-4 % [-9 %, 2 %]``, for distances that may lie on either side."""
    if math.isnan(interval.low) or math.isnan(interval.high):
        return percent(interval.value)
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"


def duration(seconds: float) -> str:
    """``8.4 s``, ``3 min 12 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def count(value: Any) -> str:
    """An integer with thousands separators."""
    return MISSING if value is None else f"{value:,.0f}"


def _headline(found: Findings, cos: Interval) -> str:
    place = f"at layer {found.layer} of {found.n_layers}"
    if found.reliability < NOISY:
        return f"No reliable axis {place} (more questions per persona would help)"
    if found.reliability < RELIABLE:
        return f"A noisy Assistant Axis {place} (more questions per persona would sharpen it)"
    lowest = cos.value if math.isnan(cos.low) else cos.low
    if lowest < ALIGNED:
        return f"An axis {place}, but not the main direction in which the personas differ"
    return f"Assistant Axis found {place}"


def _point(value: float) -> Interval:
    return Interval(value, math.nan, math.nan)


def _at_layer(summary: Mapping[str, Any], key: str) -> float:
    """A per-layer list's entry at the analysed layer; NaN when the list covers other layers than all."""
    values = summary.get(key) or []
    if len(values) != summary["n_layers"]:
        return math.nan
    value = values[summary["layer"]]
    return math.nan if value is None else float(value)
