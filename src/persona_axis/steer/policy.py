"""A policy: which interventions to hold a model with, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.steer import interventions
from persona_axis.steer.interventions import Intervention


@dataclass(frozen=True, eq=False)
class Policy:
    """Interventions by layer, with provenance.

    Attributes:
        interventions: at most one per layer, ascending.
        provenance: model, axis, percentiles, pool: whatever says where the bounds came from.
    """

    interventions: tuple[Intervention, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = [i.layer for i in self.interventions]
        if not layers or layers != sorted(set(layers)):
            raise UsageError(f"A policy needs one intervention per layer, ascending; got layers {layers}.")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(i.layer for i in self.interventions)

    @classmethod
    def cap(cls, axis: Axis, floors: Mapping[int, float], **provenance: Any) -> Policy:
        """Keep the projection toward the Assistant at or above ``floors[layer]``, in residual-stream units."""
        parts = [interventions.cap(layer, axis.at(layer), floors[layer]) for layer in sorted(floors)]
        return cls(tuple(parts), {"kind": "cap", "axis": axis.metadata, **provenance})
