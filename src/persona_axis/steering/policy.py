"""A policy: which interventions to hold a model with, and where they came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.steering import interventions
from persona_axis.steering.interventions import Intervention


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

    @classmethod
    def at_percentile(cls, axis: Axis, layers: Iterable[int], percentile: int = 75) -> Policy:
        """Caps whose floors are a percentile of the run's own replies (all roles and the default persona).

        Args:
            axis: of a run; carries the percentiles of its replies' projections.
            layers: decoder blocks to cap.
            percentile: toward the Assistant. The reference clamps the negated axis from above, so its "p0.25" is 75
                here: near the mean of the Assistant's own replies.

        Raises:
            UsageError: the axis carries no percentiles, or not this one, or not these layers.
        """
        table = axis.metadata.get("pool", {}).get("percentiles", {})
        if str(percentile) not in table:
            known = ", ".join(table) or "none: it does not come from a run"
            raise UsageError(f"This axis carries no percentile {percentile} of its replies (it has {known}).")
        wanted = sorted(set(layers))
        for layer in wanted:
            axis.at(layer)
        floors = {layer: table[str(percentile)][axis.layers.index(layer)] for layer in wanted}
        return cls.cap(
            axis,
            floors,
            percentile_assistant=percentile,
            percentile_paper=100 - percentile,
            pool=axis.metadata["pool"]["n"],
        )
