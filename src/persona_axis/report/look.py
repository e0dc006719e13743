"""Colours and type shared by every figure, the static map and the page: one place, so they agree.

Orange to blue through grey survives the common colour-vision deficiencies and stays legible on white at
both ends. The Assistant is always ink black, never a colour that also means a group or a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

INK = "#16181d"
MUTED = "#5b6270"
RULE = "#e4e7eb"
BAND = "rgba(22, 24, 29, 0.09)"

AXIS_STOPS: list[tuple[float, str]] = [  # position on the axis's range -> colour
    (0.0, "#c2570c"),
    (0.3, "#d99a5b"),
    (0.5, "#a7a3a3"),
    (0.7, "#6f9cc8"),
    (1.0, "#174f91"),
]
FILTERED = "#174f91"
UNFILTERED = "#c2570c"

# Ten hues that stay apart; an eleventh group reuses the first with another marker.
# Blue and amber come late: they look like the ends of the axis.
GROUP_COLOURS = [
    "#2f9c8f",
    "#8a52d6",
    "#d6483f",
    "#8b5e3c",
    "#d9629b",
    "#4d8f2f",
    "#7d828c",
    "#3f66c9",
    "#e0a100",
    "#5aa7dd",
]
GROUP_SYMBOLS = ["circle", "diamond", "square", "triangle-up"]
ASSISTANT = "Assistant"  # the name of its point on the map
DEFAULT = "default"  # the persona that is the Assistant


def spoken(name: str) -> str:
    """A role or group name as a person writes it: ``conspiracy_theorist`` -> ``conspiracy theorist``."""
    return name.replace("_", " ")


def group_styles(groups: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker symbol of each group, the same for a set of groups whatever their order.

    The default persona is ink and takes no colour away, so figures with and without it agree.
    """
    hues = len(GROUP_COLOURS)
    names = set(groups)
    styles = {
        group: (GROUP_COLOURS[i % hues], GROUP_SYMBOLS[(i // hues) % len(GROUP_SYMBOLS)])
        for i, group in enumerate(sorted(names - {DEFAULT}))
    }
    return styles | ({DEFAULT: (INK, "star")} if DEFAULT in names else {})


def axis_colour(value: float, values: Sequence[float]) -> str:
    """The colour of ``value`` on the axis scale that spans ``values``, as ``#rrggbb``."""
    low, high = min(values), max(values)
    share = 0.5 if high == low else min(max((value - low) / (high - low), 0.0), 1.0)
    for (left, start), (right, stop) in pairwise(AXIS_STOPS):
        if share <= right:
            return _mix(start, stop, (share - left) / (right - left))
    return AXIS_STOPS[-1][1]


def _mix(start: str, stop: str, share: float) -> str:
    channels = (round(int(start[i : i + 2], 16) * (1 - share) + int(stop[i : i + 2], 16) * share) for i in (1, 3, 5))
    return "#" + "".join(f"{channel:02x}" for channel in channels)
