"""The 2-D persona map as a small hand-made SVG: for READMEs and papers, no browser or renderer needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from persona_axis.geometry.fit import Fit, MapPoint
from persona_axis.report.labels import Box, Dot, label_box, label_order, place_labels, require_components
from persona_axis.report.look import ASSISTANT, AXIS_STOPS, FONT, INK, MUTED, RULE, axis_colour, spoken
from persona_axis.report.words import percent

WIDTH, HEIGHT = 900, 560
FRAME = Box(56, 62, 876, 506)  # the plot area
PAD = 26  # between the outermost points and the frame
LABEL_SIZE = 13
STAR = "0,-12 2.9,-4 11.4,-3.7 4.7,1.5 7.1,9.7 0,4.9 -7.1,9.7 -4.7,1.5 -11.4,-3.7 -2.9,-4"


@dataclass(frozen=True, slots=True)
class _Placed:
    point: MapPoint
    dot: Dot


def static_map_svg(fit: Fit) -> str:
    """PC1 x PC2 at the analysed layer as an SVG of 900 x 560; the same picture as ``persona_map``."""
    require_components(fit.points, 2)
    placed = _place(fit.points)
    projections = [p.projection for p in fit.points if p.name != ASSISTANT]
    body = [
        _frame(),
        _colour_bar(),
        *(_circle(item, projections) for item in placed if item.point.name != ASSISTANT),
        *(_star(item) for item in placed if item.point.name == ASSISTANT),
        *_labels(placed),
        _captions(fit),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" font-family="{escape(FONT)}">\n'
        f"<title>Persona space of the model at layer {fit.layer}</title>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _place(points: Sequence[MapPoint]) -> list[_Placed]:
    xs, ys = ([p.pcs[i] for p in points] for i in (0, 1))
    x_span, y_span = (max(max(v) - min(v), 1e-9) for v in (xs, ys))
    width, height = FRAME.right - FRAME.left - 2 * PAD, FRAME.bottom - FRAME.top - 2 * PAD
    return [
        _Placed(
            p,
            Dot(
                FRAME.left + PAD + (p.pcs[0] - min(xs)) / x_span * width,
                FRAME.bottom - PAD - (p.pcs[1] - min(ys)) / y_span * height,
                12.0 if p.name == ASSISTANT else 6.0,
            ),
        )
        for p in points
    ]


def _circle(item: _Placed, projections: Sequence[float]) -> str:
    colour = axis_colour(item.point.projection, projections)
    return (
        f'<circle cx="{item.dot.x:.1f}" cy="{item.dot.y:.1f}" r="6" fill="{colour}" stroke="#ffffff" '
        f'stroke-width="1.2"><title>{escape(spoken(item.point.name))}</title></circle>'
    )


def _star(item: _Placed) -> str:
    return (
        f'<polygon points="{STAR}" transform="translate({item.dot.x:.1f} {item.dot.y:.1f})" fill="{INK}" '
        'stroke="#ffffff" stroke-width="1.5"><title>Assistant</title></polygon>'
    )


def _labels(placed: Sequence[_Placed]) -> list[str]:
    """Names of the Assistant and of the extremes of the axis and of PC2, where there is room."""
    dots = [Dot(i.dot.x - FRAME.left, i.dot.y - FRAME.top, i.dot.radius) for i in placed]
    texts = [spoken(item.point.name) for item in placed]
    area = (FRAME.right - FRAME.left, FRAME.bottom - FRAME.top)
    spots = place_labels(dots, texts, label_order([item.point for item in placed])[:26], area, LABEL_SIZE)
    return [_label(placed[i], texts[i], spot) for i, spot in spots.items()]


def _label(item: _Placed, text: str, spot: str) -> str:
    box = label_box(item.dot, text, spot, LABEL_SIZE)
    anchor, x = {"right": ("start", box.left), "left": ("end", box.right)}.get(
        spot.split()[1], ("middle", (box.left + box.right) / 2)
    )
    weight = ' font-weight="700"' if item.point.name == ASSISTANT else ""
    baseline = (box.top + box.bottom) / 2 + 0.35 * LABEL_SIZE
    # The white outline keeps a label legible where it crosses a grid line.
    return (
        f'<text x="{x:.1f}" y="{baseline:.1f}" text-anchor="{anchor}" font-size="{LABEL_SIZE}" fill="{INK}"'
        f'{weight} stroke="#ffffff" stroke-width="3" paint-order="stroke">{escape(text)}</text>'
    )


def _frame() -> str:
    return (
        f'<rect x="{FRAME.left}" y="{FRAME.top}" width="{FRAME.right - FRAME.left}" '
        f'height="{FRAME.bottom - FRAME.top}" fill="#fbfcfd" stroke="{RULE}"/>'
    )


def _colour_bar() -> str:
    """The scale of the axis in words: the map is a picture, the report has the values."""
    left, top, width = 330, 30, 240
    stops = "".join(f'<stop offset="{at:.0%}" stop-color="{colour}"/>' for at, colour in AXIS_STOPS)
    words = (
        (left - 12, "end", "less like the Assistant"),
        (left + width + 12, "start", "more like the Assistant"),
    )
    texts = "".join(
        f'<text x="{x}" y="{top + 8}" text-anchor="{anchor}" font-size="13" fill="{MUTED}">{word}</text>'
        for x, anchor, word in words
    )
    return (
        f'<defs><linearGradient id="axis-scale">{stops}</linearGradient></defs>'
        f'<rect x="{left}" y="{top - 1}" width="{width}" height="9" rx="4.5" fill="url(#axis-scale)"/>{texts}'
    )


def _captions(fit: Fit) -> str:
    middle_x, middle_y = (FRAME.left + FRAME.right) / 2, (FRAME.top + FRAME.bottom) / 2
    shares = fit.at_layer().pc_shares
    names = [f"PC{i + 1} ({percent(shares[i])} of role variance)" if len(shares) > i else f"PC{i + 1}" for i in (0, 1)]
    style = f'text-anchor="middle" font-size="13" fill="{MUTED}"'
    return (
        f'<text x="{middle_x}" y="{FRAME.bottom + 32}" {style}>{names[0]}</text>'
        f'<text x="28" y="{middle_y}" transform="rotate(-90 28 {middle_y})" {style}>{names[1]}</text>'
    )
