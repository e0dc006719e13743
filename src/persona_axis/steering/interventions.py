"""The one intervention formula. Cap, band, ablate, mean-ablate and add are settings of it, not code paths.

With V orthonormal rows, in float32: ``p = h V^T; h <- h + (clamp(p, lo, hi) - p + shift) V``. Rows with no change are
returned bit for bit. Capping is the paper's section 5.1 (there on the negated axis, clamped from above).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_axis.errors import UsageError


@dataclass(frozen=True, eq=False)
class Intervention:
    """What happens at one decoder block's output.

    Attributes:
        layer: the decoder block.
        V: ``[k, d_model]`` float32 orthonormal rows.
        lo, hi: ``[k]`` float32 bounds of the projections; -inf and inf are no bound.
        shift: ``[k]`` float32, added to the projections.
    """

    layer: int
    V: Tensor
    lo: Tensor
    hi: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        k = len(self.V)
        if self.V.ndim != 2 or any(t.shape != (k,) for t in (self.lo, self.hi, self.shift)):
            raise UsageError("An intervention needs V [k, d_model] and lo, hi, shift of length k.")
        if not bool((self.lo <= self.hi).all() and self.shift.isfinite().all()):
            raise UsageError(
                f"Layer {self.layer}: a lower bound lies above its upper bound, a bound is NaN or a shift not finite."
            )
        if not bool(torch.allclose(self.V @ self.V.T, torch.eye(k, device=self.V.device), atol=1e-4)):
            raise UsageError(f"Layer {self.layer}: the rows of V are not orthonormal.")

    def to(self, device: torch.device) -> Intervention:
        return Intervention(
            self.layer, self.V.to(device), self.lo.to(device), self.hi.to(device), self.shift.to(device)
        )


def apply(hidden: Tensor, intervention: Intervention) -> Tensor:
    """``hidden [..., d_model]`` of any float dtype -> same shape and dtype.

    Rows that nothing changes come back bit for bit.
    """
    V = intervention.V
    p = hidden.float() @ V.T  # [..., k]
    change = p.clamp(intervention.lo, intervention.hi) - p + intervention.shift
    rows = (change != 0).any(-1, keepdim=True)
    moved = (hidden.float() + change @ V).to(hidden.dtype)
    return torch.where(rows, moved, hidden)


def orthonormal(directions: Tensor) -> Tensor:
    """Rows ``[k, d_model]`` orthonormalised in the order given (Gram-Schmidt by QR), signs kept, float32.

    Raises:
        UsageError: no rows, or zero or linearly dependent ones.
    """
    rows = directions.float()
    rows = rows[None] if rows.ndim == 1 else rows
    if not 0 < len(rows) <= rows.shape[1]:
        raise UsageError(f"{len(rows)} directions of width {rows.shape[1]} cannot be made orthonormal.")
    q, r = torch.linalg.qr(rows.T)
    scale = r.diagonal()
    if bool((scale.abs() <= 1e-6 * rows.norm(dim=-1).clamp(min=1e-30)).any()):
        raise UsageError("The directions of an intervention are zero or linearly dependent.")
    return (q * scale.sign()).T.contiguous()


def _full(value: float, k: int) -> Tensor:
    return torch.full((k,), float(value))


def cap(layer: int, directions: Tensor, floor: float) -> Intervention:
    """Hold the projection at ``floor`` or above (activation capping)."""
    return band(layer, directions, floor, math.inf)


def band(layer: int, directions: Tensor, lo: float, hi: float) -> Intervention:
    """Hold the projection between ``lo`` and ``hi``."""
    V = orthonormal(directions)
    return Intervention(layer, V, _full(lo, len(V)), _full(hi, len(V)), _full(0, len(V)))


def ablate(layer: int, directions: Tensor) -> Intervention:
    """Remove the component along the directions."""
    return band(layer, directions, 0, 0)


def mean_ablate(layer: int, directions: Tensor, mean: float) -> Intervention:
    """Set the component to a mean value."""
    return band(layer, directions, mean, mean)


def add(layer: int, directions: Tensor, strength: float) -> Intervention:
    """Shift the projection by ``strength`` (residual-stream units; negative = away)."""
    V = orthonormal(directions)
    return Intervention(layer, V, _full(-math.inf, len(V)), _full(math.inf, len(V)), _full(strength, len(V)))
