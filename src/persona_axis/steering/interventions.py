"""The one intervention formula. Cap, band, ablate, mean-ablate and add are settings of it, not code paths.

With V orthonormal rows, in float32: ``p = h V^T; h <- h + (clamp(p, lo, hi) - p + shift) V``. Rows with no change are
returned bit for bit. Capping is the paper's section 5.1 (there on the negated axis, clamped from above).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_axis.errors import UsageError

# One number for every direction; one per direction [k]; or one per sequence of a batch and direction [batch, k].
Bound = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class Intervention:
    """What happens at one decoder block's output.

    Attributes:
        layer: the decoder block.
        V: ``[k, d_model]`` float32 orthonormal rows.
        lo, hi: ``[k]`` float32 bounds of the projections, -inf and inf being none; or ``[batch, k]``, a row for each
            sequence of the batch that passes through the model.
        shift: ``[k]`` or ``[batch, k]`` float32, added to the projections.

    Raises:
        UsageError: shapes or dtypes that do not fit, a direction or a shift that is not finite, a bound that is NaN,
            ``lo`` above ``hi``, rows that are not orthonormal.
    """

    layer: int
    V: Tensor
    lo: Tensor
    hi: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        where = f"Layer {self.layer}"
        if self.V.ndim != 2 or not len(self.V):
            raise UsageError(f"{where}: the directions have shape {tuple(self.V.shape)}; [k, d_model] is expected.")
        k = len(self.V)
        shapes = {tuple(t.shape) for t in (self.lo, self.hi, self.shift)}
        batches = {shape[0] for shape in shapes if len(shape) == 2}
        if any(len(shape) not in (1, 2) or shape[-1] != k for shape in shapes) or len(batches) > 1:
            raise UsageError(
                f"{where}: lo, hi and shift need a value for each of the {k} directions, [{k}] or [batch, {k}]; got "
                f"{', '.join(map(str, sorted(shapes)))}."
            )
        if any(t.dtype != torch.float32 for t in (self.V, self.lo, self.hi, self.shift)):
            raise UsageError(f"{where}: V, lo, hi and shift must be float32.")
        if not bool(self.V.isfinite().all()):
            raise UsageError(f"{where}: a direction holds NaN or infinity.")
        if not bool(self.shift.isfinite().all()):
            raise UsageError(f"{where}: a shift is not finite.")
        if bool(self.lo.isnan().any() or self.hi.isnan().any()):
            raise UsageError(f"{where}: a bound is NaN.")
        if not bool((self.lo <= self.hi).all()):
            raise UsageError(f"{where}: a lower bound lies above its upper bound.")
        if not bool((self.lo < math.inf).all() and (self.hi > -math.inf).all()):
            raise UsageError(f"{where}: a lower bound of inf, or an upper one of -inf, leaves no value.")
        if not bool(torch.allclose(self.V @ self.V.T, torch.eye(k, device=self.V.device), atol=1e-4)):
            raise UsageError(f"{where}: the rows of V are not orthonormal.")

    @property
    def batch(self) -> int | None:
        """How many sequences the bounds are for; None when they are for any."""
        return next((len(t) for t in (self.lo, self.hi, self.shift) if t.ndim == 2), None)

    @property
    def changes_nothing(self) -> bool:
        """No bound and no shift."""
        free = (self.lo == -math.inf).all() and (self.hi == math.inf).all() and (self.shift == 0).all()
        return bool(free)

    def to(self, device: torch.device) -> Intervention:
        moved = copy.copy(self)  # checked already; to look at the values again would wait for the device
        for name in ("V", "lo", "hi", "shift"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved


def apply(hidden: Tensor, intervention: Intervention, where: Tensor | None = None) -> Tensor:
    """``hidden [..., d_model]`` of any float dtype -> same shape and dtype.

    Args:
        hidden: residuals; ``[batch, tokens, d_model]`` when the bounds differ by sequence.
        where: ``[...]`` bool, the tokens meant; None is all.

    Rows that nothing changes, and rows not meant, come back bit for bit; when there are no others, ``hidden`` itself.
    """
    V = intervention.V
    bounds = (_per_row(t) for t in (intervention.lo, intervention.hi, intervention.shift))
    with _no_autocast(hidden.device.type):
        change = correction(hidden.float() @ V.T, *bounds)  # [..., k]
        rows = (change != 0).any(-1)  # of NaN as well
        if where is not None:
            rows = rows & where
        if hidden.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.where(rows[..., None], (hidden.float() + change @ V).to(hidden.dtype), hidden)
        # Looking at values costs no waiting here, and writing only what changes saves most of the time.
        if not bool(rows.any()):
            return hidden
        out = hidden.clone()
        out[rows] = (hidden[rows].float() + change[rows] @ V).to(hidden.dtype)
        return out


def correction(p: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """What the formula adds to projections ``p [..., k]``."""
    return p.clamp(lo, hi) - p + shift


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """It would multiply in half precision."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def _per_row(bound: Tensor) -> Tensor:
    """``[batch, k]`` -> ``[batch, 1, k]``: the same for all tokens of a sequence."""
    return bound[:, None] if bound.ndim == 2 else bound


def orthonormal(directions: Tensor) -> Tensor:
    """Rows ``[k, d_model]`` orthonormalised in the order given (Gram-Schmidt by QR), signs kept, float32.

    Raises:
        UsageError: no rows, zero or linearly dependent ones, or NaN or infinity in them.
    """
    rows = directions.float()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not 0 < len(rows) <= rows.shape[1]:
        raise UsageError(f"Directions of shape {tuple(directions.shape)} cannot be made orthonormal.")
    if not bool(rows.isfinite().all()):
        raise UsageError("A direction holds NaN or infinity.")
    q, r = torch.linalg.qr(rows.T)
    scale = r.diagonal()
    if bool((scale.abs() <= 1e-6 * rows.norm(dim=-1).clamp(min=1e-30)).any()):
        raise UsageError("The directions of an intervention are zero or linearly dependent.")
    return (q * scale.sign()).T.contiguous()


def cap(layer: int, directions: Tensor, floor: Bound) -> Intervention:
    """Hold the projections at ``floor`` or above (activation capping)."""
    return band(layer, directions, floor, math.inf)


def band(layer: int, directions: Tensor, lo: Bound, hi: Bound) -> Intervention:
    """Hold the projections between ``lo`` and ``hi``.

    Several directions are orthonormalised in the order given; bounds refer to the result.
    """
    V = orthonormal(directions)
    return Intervention(layer, V, _full(lo, V), _full(hi, V), _full(0, V))


def ablate(layer: int, directions: Tensor) -> Intervention:
    """Remove the component along the directions."""
    return band(layer, directions, 0, 0)


def mean_ablate(layer: int, directions: Tensor, mean: Bound) -> Intervention:
    """Set the component to a mean value."""
    return band(layer, directions, mean, mean)


def add(layer: int, directions: Tensor, strength: Bound, norm: float = 1.0) -> Intervention:
    """Shift the projections by ``strength * norm`` (negative = away).

    Args:
        layer: the decoder block.
        directions: ``[d_model]`` or ``[k, d_model]``.
        strength: in residual-stream units, or in units of ``norm``.
        norm: the layer's mean residual norm (:func:`persona_axis.model.reading.residual_norms`), so that one strength
            means the same at every layer (the paper's section 3.2); 1 leaves ``strength`` raw.

    Raises:
        UsageError: ``norm`` is not a positive number.
    """
    if not (norm > 0 and math.isfinite(norm)):
        raise UsageError(f"Layer {layer}: a residual norm of {norm} is no unit.")
    V = orthonormal(directions)
    return Intervention(layer, V, _full(-math.inf, V), _full(math.inf, V), _full(strength, V) * norm)


def _full(bound: Bound, V: Tensor) -> Tensor:
    """A bound of its own on V's device: ``[k]``, or as given when it differs by sequence."""
    value = torch.as_tensor(bound, dtype=torch.float32, device=V.device)
    return (value if value.ndim else value.expand(len(V))).clone()
