"""A policy: which interventions to hold a model with, and where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering import interventions
from persona_axis.steering.calibration import paper_percentile
from persona_axis.steering.interventions import Intervention

Positions = Literal["all", "reply", "decode"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)


@dataclass(frozen=True, eq=False)
class Policy:
    """Interventions by layer, with provenance.

    Attributes:
        interventions: at most one per layer, ascending.
        provenance: model, axis, percentiles, pool: whatever says where the bounds came from.
        positions: which tokens are meant: ``all``; ``reply``, those of assistant turns, given or generated;
            ``decode``, those that the model generates.
        model: which model it was made for; None claims nothing (made by hand).
    """

    interventions: tuple[Intervention, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    positions: Positions = "all"
    model: ModelIdentity | None = None

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise UsageError(f"Unknown positions {self.positions!r}; choose from {', '.join(POSITIONS)}.")
        layers = [i.layer for i in self.interventions]
        if not layers or layers != sorted(set(layers)):
            raise UsageError(f"A policy needs one intervention per layer, ascending; got layers {layers}.")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(i.layer for i in self.interventions)

    @property
    def content_hash(self) -> str:
        """SHA-256 over what changes what a model says: layers, directions, bounds, shifts and positions."""
        return content_hash(self.positions, ((i.layer, i.V, i.lo, i.hi, i.shift) for i in self.interventions))

    @classmethod
    def cap(cls, axis: Axis, floors: Mapping[int, float], *, positions: Positions = "all", **provenance: Any) -> Policy:
        """Keep the projection toward the Assistant at or above ``floors[layer]``, in residual-stream units."""
        parts = [interventions.cap(layer, axis.at(layer), floors[layer]) for layer in sorted(floors)]
        said = {"kind": "cap", "axis": axis.metadata, "axis_hash": axis.content_hash, **provenance}
        model = ModelIdentity.recorded(axis.metadata, axis.vectors.shape[1])
        return cls(tuple(parts), said, positions, model)

    @classmethod
    def at_percentile(
        cls, axis: Axis, layers: Iterable[int], percentile: int = 75, *, positions: Positions = "all"
    ) -> Policy:
        """Caps whose floors are a percentile of the run's own replies (all roles and the default persona).

        Args:
            axis: of a run; carries the percentiles of its replies' projections.
            layers: decoder blocks to cap.
            percentile: toward the Assistant. The reference clamps the negated axis from above, so its "p0.25" is 75
                here: near the mean of the Assistant's own replies.
            positions: which tokens are meant.

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
            positions=positions,
            percentile_assistant=percentile,
            percentile_paper=paper_percentile(percentile),
            pool=axis.metadata["pool"]["n"],
        )

    def save(self, folder: str | Path) -> Path:
        """Write a policy folder (:func:`persona_axis.steering.artifact.save_policy`)."""
        from persona_axis.steering.artifact import save_policy

        return save_policy(self, folder)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy folder; a run folder stands for the policy in it
        (:func:`persona_axis.steering.artifact.load_policy`)."""
        from persona_axis.steering.artifact import load_policy

        return load_policy(path)


def content_hash(positions: Positions, parts: Iterable[tuple[int, Tensor, Tensor, Tensor, Tensor]]) -> str:
    """SHA-256 over positions, and over layer, shapes and float32 values of each part: (layer, V, lo, hi, shift)."""
    digest = hashlib.sha256(json.dumps(positions).encode())
    for layer, *tensors in parts:
        digest.update(json.dumps([layer, [list(t.shape) for t in tensors]]).encode())
        for tensor in tensors:
            digest.update(tensor.detach().cpu().float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def layer_span(layers: Iterable[int], to: str = " to ") -> str:
    """For people: ``46 to 53``, or the numbers when there are gaps."""
    numbers = sorted(layers)
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}{to}{numbers[-1]}"
    return ", ".join(map(str, numbers)) or "none"
