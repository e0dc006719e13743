"""The result of a fit: everything the report shows, each number with its interval.

Filled by :func:`persona_axis.collect.fitting.fit_run`; read by the report, the summary and the CLI.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate and the 2.5th and 97.5th percentile of its bootstrap draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RankedRole:
    """One role of the cross-fitted ranking at the analysed layer; higher = more like the Assistant."""

    name: str
    group: str
    projection: Interval  # residual-stream units, on the axis fitted without this role and these questions
    kept: int  # rollouts that passed the filter
    total: int


@dataclass(frozen=True, slots=True)
class DroppedRole:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class LayerFit:
    """One layer's figures."""

    layer: int
    cos_axis_pc1: Interval
    cos_axis_pc1_unfiltered: float  # same, every rollout kept
    pc_shares: list[float]  # share of role-vector variance per principal component, descending
    components_70: int
    components_80: int
    components_90: int
    reliability: float  # step-up of the mean cosine of axes from random halves of the questions
    axis_norm: float


@dataclass(frozen=True, slots=True)
class MapPoint:
    """One persona in persona space at the analysed layer (in-sample coordinates)."""

    name: str  # role name, or "Assistant"
    group: str
    pcs: list[float]  # coordinates on PC1..PC3, Assistant on the positive side of each
    projection: float  # on the axis


@dataclass(frozen=True, slots=True)
class AssistantPlace:
    """Where the Assistant lies on one principal component: distance from the nearer edge of the roles'
    range as a share of that range (0 = at the edge, negative = outside)."""

    component: int  # 1-based
    edge_distance: float


@dataclass(frozen=True)
class Fit:
    """All figures of a fit, JSON-ready; the vectors are in ``axis.safetensors``/``vectors.safetensors``."""

    n_layers: int
    d_model: int
    layers: list[int]  # the captured layers, in the order of every per-layer list
    layer: int  # analysed
    most_reliable_layer: int
    estimator: str
    filter: str  # as applied
    filter_note: str  # why it fell back, or ""
    min_count: int
    assistant: Interval  # the Assistant's cross-fitted projection
    edge_distance: Interval  # cross-fitted, signed; negative = beyond the outermost role
    edge_distance_in_sample: float
    per_layer: list[LayerFit]
    layer_cosine: list[list[float]]  # cosine of axes between captured layers
    ranking: list[RankedRole]  # ascending projection
    dropped: list[DroppedRole]
    points: list[MapPoint]
    assistant_places: list[AssistantPlace]
    bootstrap_draws: int
    notes: list[str] = field(default_factory=list)

    def at_layer(self) -> LayerFit:
        """The figures of the analysed layer."""
        return next(f for f in self.per_layer if f.layer == self.layer)
