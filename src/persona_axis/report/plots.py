"""Every figure of the report, one function per figure: each takes its data and returns a Plotly figure.

``static_map_svg`` is the exception: it returns the text of an SVG, for places that run no script.
"""

from persona_axis.report.figure_base import WIDE_ONLY
from persona_axis.report.figure_evidence import evidence_by_group
from persona_axis.report.figure_layers import by_layer, explained_variance, layer_cosines
from persona_axis.report.figure_maps import persona_map, persona_map_3d
from persona_axis.report.figure_ranking import TALL_RANKING, role_ranking
from persona_axis.report.static_map import static_map_svg

__all__ = [
    "TALL_RANKING",
    "WIDE_ONLY",
    "by_layer",
    "evidence_by_group",
    "explained_variance",
    "layer_cosines",
    "persona_map",
    "persona_map_3d",
    "role_ranking",
    "static_map_svg",
]
