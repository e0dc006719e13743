"""Where direct labels go on a scatter: greedy placement, most important first, never one over another.

Used by the interactive maps and the static one. Sizes are pixels; text width is estimated, because no
font is at hand when the figure is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona_axis.geometry.fit import MapPoint
from persona_axis.report.look import ASSISTANT

CHARACTER_WIDTH = 0.6  # of the font size, what a wide sans-serif needs
LINE_HEIGHT = 1.2

# Spot names are Plotly's ``textposition``; the pair says which way the label's centre lies from the point.
SPOTS: dict[str, tuple[int, int]] = {
    "middle right": (1, 0),
    "middle left": (-1, 0),
    "top center": (0, -1),
    "bottom center": (0, 1),
    "top right": (1, -1),
    "bottom right": (1, 1),
    "top left": (-1, -1),
    "bottom left": (-1, 1),
}


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True, slots=True)
class Dot:
    """A point in pixels, y downwards."""

    x: float
    y: float
    radius: float = 5.0

    def box(self) -> Box:
        return Box(self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


def label_box(dot: Dot, text: str, spot: str, font_size: float, gap: float = 3.0) -> Box:
    """The box a label fills at a spot."""
    width = len(text) * font_size * CHARACTER_WIDTH
    height = font_size * LINE_HEIGHT
    across, down = SPOTS[spot]
    x = dot.x + across * (dot.radius + gap + width / 2)
    # A corner spot hugs the point: its own text already stands clear of it sideways.
    reach = dot.radius / 2 if across else dot.radius + gap
    y = dot.y + down * (reach + height / 2)
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def place_labels(
    dots: Sequence[Dot],
    texts: Sequence[str],
    order: Sequence[int],
    area: tuple[float, float],
    font_size: float = 12.0,
) -> dict[int, str]:
    """Spots for the labels of ``order`` (indices into ``dots``), most important first.

    A label that would leave the area, cover another label or cover any point is left out; the very first
    one is always placed, at the spot that covers the fewest points.
    """
    frame = Box(0, 0, *area)
    points = [dot.box() for dot in dots]
    taken: list[Box] = []
    spots: dict[int, str] = {}
    for index in order:
        options = [(spot, label_box(dots[index], texts[index], spot, font_size)) for spot in SPOTS]
        options = [(s, box) for s, box in options if box.within(frame) and not any(map(box.meets, taken))]
        if not options:
            continue
        covered = {spot: sum(map(box.meets, points)) for spot, box in options}
        spot, box = min(options, key=lambda option: covered[option[0]])
        if covered[spot] and spots:
            continue
        spots[index] = spot
        taken.append(box)
    return spots


def require_components(points: Sequence[MapPoint], needed: int) -> None:
    """Refuse to draw a map of more components than the fit has (few roles span few)."""
    words = {2: "two", 3: "three"}
    if any(len(point.pcs) < needed for point in points):
        raise ValueError(f"this map needs {words[needed]} components, and the fit has fewer")


def label_order(points: Sequence[MapPoint]) -> list[int]:
    """Indices of all points, most worth a label first: the Assistant, the ends of the axis, PC2, PC1."""
    by_axis = sorted(range(len(points)), key=lambda i: points[i].projection)
    by_pc2 = sorted(range(len(points)), key=lambda i: points[i].pcs[1])
    by_pc1 = sorted(range(len(points)), key=lambda i: points[i].pcs[0])
    order = [i for i, point in enumerate(points) if point.name == ASSISTANT]
    steps = ((by_axis, 3), (by_pc2, 3), (by_pc1, 3), (by_axis, 12), (by_pc2, 8), (by_axis, len(points)))
    for ranking, depth in steps:
        for k in range(min(depth, len(ranking))):
            order += [ranking[k], ranking[-1 - k]]
    return list(dict.fromkeys(order))
