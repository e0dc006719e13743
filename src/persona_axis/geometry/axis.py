"""The Assistant Axis (Lu et al. 2026, arXiv 2601.10387, section 3.1): its one formula, and projections on it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_axis.errors import StorageError, UsageError
from persona_axis.files.atomic import write_atomic

FORMAT = "persona-axis/axis/1"


def assistant_axis(assistant: Tensor, role_mean: Tensor) -> Tensor:
    """``assistant - mean of the role vectors``, ``[..., d_model]``: higher is more like the Assistant."""
    return assistant - role_mean


def weighted_mean(vectors: Tensor, weights: Tensor) -> Tensor:
    """Mean over the second-last axis: ``vectors [..., n, d]``, ``weights [..., n]`` -> ``[..., d]``."""
    return (weights[..., None] * vectors).sum(-2) / weights.sum(-1)[..., None]


def leave_one_out_axes(assistant: Tensor, roles: Tensor, weights: Tensor) -> Tensor:
    """For each role the axis fitted without it.

    Args:
        assistant: ``[..., d]``.
        roles: ``[..., n, d]``.
        weights: ``[..., n]``, how often each role counts.

    Returns:
        ``[..., n, d]``.
    """
    total = (weights[..., None] * roles).sum(-2, keepdim=True)
    others = (total - weights[..., None] * roles) / (weights.sum(-1, keepdim=True) - weights)[..., None]
    return assistant_axis(assistant[..., None, :], others)


def project(hidden: Tensor, axis: Tensor) -> Tensor:
    """``<h, axis / |axis|>`` over the last dimension, in residual-stream units, float32."""
    axis = axis.float()
    return (hidden.float() * (axis / axis.norm(dim=-1, keepdim=True))).sum(-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension."""
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis per captured layer, unnormalised; higher projection = more like the Assistant.

    Attributes:
        vectors: ``[n_captured, d_model]`` float32.
        layers: the decoder blocks they belong to (block outputs, zero-based, no embedding row).
        layer: the analysed layer, the default of :meth:`project`.
        metadata: where it came from (model, revision, catalog and run hashes, estimator, filter).
    """

    vectors: Tensor
    layers: tuple[int, ...]
    layer: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.layers) != len(self.vectors):
            raise UsageError(
                f"An axis needs one vector per layer: {tuple(self.vectors.shape)} for {len(self.layers)} layers."
            )
        if self.layer not in self.layers:
            raise UsageError(f"Layer {self.layer} is not among the axis's layers {self.layers}.")

    def at(self, layer: int | None = None) -> Tensor:
        """The axis at one decoder block (default: the analysed one), ``[d_model]`` float32.

        Raises:
            UsageError: that layer was not captured.
        """
        layer = self.layer if layer is None else layer
        if layer not in self.layers:
            raise UsageError(f"This axis has no layer {layer}; it has {', '.join(map(str, self.layers))}.")
        return self.vectors[self.layers.index(layer)]

    def unit(self, layer: int | None = None) -> Tensor:
        """``axis / |axis|`` at a layer, ``[d_model]`` float32."""
        axis = self.at(layer)
        return axis / axis.norm()

    def norm_at(self, layer: int | None = None) -> float:
        """Mean residual norm of the model at a layer, recorded by the run that made the axis.

        Raises:
            UsageError: it was not recorded (an axis from elsewhere), or that layer was not captured.
        """
        layer = self.layer if layer is None else layer
        self.at(layer)
        norms = self.metadata.get("residual_norms")
        if norms is None:
            raise UsageError(
                "This axis does not say the model's residual norms, the unit 'norm'. Give a raw strength, or make the "
                "axis with this version of persona-axis run."
            )
        return float(norms[self.layers.index(layer)])

    def project(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """Projection of residuals ``[..., d_model]`` of one decoder block: ``[...]`` float32.

        In residual-stream units; higher = more like the Assistant.
        """
        axis = self.at(layer).to(hidden.device)
        if hidden.shape[-1] != len(axis):
            raise UsageError(f"Residuals of width {hidden.shape[-1]} on an axis of width {len(axis)}.")
        return project(hidden, axis)

    @property
    def content_hash(self) -> str:
        """SHA-256 over layers and vectors: the same directions, whatever is said about them."""
        layout = json.dumps({"layers": list(self.layers), "shape": list(self.vectors.shape)})
        values = self.vectors.detach().cpu().float().contiguous().numpy().astype("<f4")
        return hashlib.sha256(layout.encode() + values.tobytes()).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write ``path`` (safetensors with JSON metadata), atomically."""
        from safetensors.torch import save

        header = {**self.metadata, "format": FORMAT, "layers": list(self.layers), "layer": self.layer}
        data = save({"axis": self.vectors.float().contiguous()}, {"persona_axis": json.dumps(header)})
        write_atomic(Path(path), data)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Axis:
        """Read what :meth:`save` wrote; a run folder stands for the axis in it.

        Raises:
            StorageError: missing, damaged, or another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path)
        if file.is_dir():
            file = file / "fit" / "axis.safetensors"
        try:
            with safe_open(str(file), "pt") as f:
                header = json.loads((f.metadata() or {}).get("persona_axis", "{}"))
                vectors = f.get_tensor("axis") if "axis" in f.keys() else None  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as e:
            raise StorageError(f"Cannot read an axis from {file}: {e}") from e
        if header.pop("format", None) != FORMAT or vectors is None:
            raise StorageError(f"{file} is not an axis written by this package (expected {FORMAT}).")
        return cls(vectors, tuple(header.pop("layers")), header.pop("layer"), header)
