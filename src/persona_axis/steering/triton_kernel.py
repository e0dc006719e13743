"""The intervention as Triton kernels: one launch per layer, each row read once. Import it where Triton is installed.

Contract:

1. A program handles one row and keeps it in registers. Its launch depends on the width and the number of directions
   alone, so a row's result has the same bits whatever else is in the batch; only ``sums`` depend on the order in which
   rows arrive there.
2. A row of slot 0 that is not captured is neither read nor written.
3. A slot, or a place in ``sums``, that does not exist would be somebody else's memory, and a check would make the host
   wait: such a row becomes NaN. It cannot pass for a row that was changed, or for one that was left alone.
4. Nothing is looked at on the host but shapes and strides, so a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_THREAD = 16  # of a row; for k = 1 some 50 registers per thread, so that several programs share a core
WARP = 32


def intervene_(
    hidden: Tensor,
    V: Tensor,
    lo: Tensor,
    hi: Tensor,
    shift: Tensor,
    slots: Tensor,
    residual: Tensor | None,
    sums: Tensor | None,
    capture: Tensor | None,
    projections: Tensor | None,
    strength: Tensor | None,
) -> None:
    """:func:`persona_axis.steering.op.intervene_` for arguments that were checked."""
    n_slots, k, width = V.shape
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(hidden):
        _change_in_place[(len(hidden),)](
            hidden,
            residual,
            V,
            lo,
            hi,
            shift,
            slots,
            sums,
            capture,
            projections,
            strength,
            hidden.stride(0),
            0 if residual is None else residual.stride(0),
            n_slots,
            0 if sums is None else len(sums),
            D=width,
            K=k,
            BLOCK=block,
            num_warps=_warps(block),
        )


def intervened(hidden: Tensor, out: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> None:
    """Write ``hidden [rows, d_model]``, changed by one policy, to ``out`` of the same shape."""
    k, width = V.shape
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(hidden):
        _change_into[(len(hidden),)](
            hidden,
            out,
            V,
            lo,
            hi,
            shift,
            hidden.stride(0),
            out.stride(0),
            D=width,
            K=k,
            BLOCK=block,
            num_warps=_warps(block),
        )


def _warps(block: int) -> int:
    return min(16, max(1, block // (WARP * ELEMENTS_PER_THREAD)))


@triton.jit
def _change(
    stream: tl.tensor,
    V: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    shift: tl.tensor,
    projections: tl.tensor,
    strength: tl.tensor,
    slot: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    D: tl.constexpr,
    K: tl.constexpr,
) -> tl.tensor:
    """What the formula adds to a row of the stream ``[BLOCK]``, and whether it adds anything."""
    change = tl.zeros_like(stream)
    moved = slot < 0  # no
    for i in range(K):
        at = slot * K + i
        v = tl.load(V + at * D + column, mask=inside, other=0.0)
        low, high, add = tl.load(lo + at), tl.load(hi + at), tl.load(shift + at)
        if strength is not None:
            add *= tl.load(strength)
        p = tl.sum(stream * v, axis=0)
        step = tl.minimum(tl.maximum(p, low), high) - p + add  # NaN stays NaN through the "- p"
        change += step * v
        moved = moved | (step != 0.0)
        if projections is not None:
            tl.store(projections + i, p)
    return change, moved


@triton.jit(do_not_specialize=["n_slots", "n_sums"])
def _change_in_place(
    hidden: tl.tensor,
    residual: tl.tensor,
    V: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    shift: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    capture: tl.tensor,
    projections: tl.tensor,
    strength: tl.tensor,
    hidden_stride: tl.tensor,
    residual_stride: tl.tensor,
    n_slots: tl.tensor,
    n_sums: tl.tensor,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    here = hidden + row * hidden_stride + column
    slot = tl.load(slots + row).to(tl.int64)
    wrong = (slot < 0) | (slot >= n_slots)
    wanted = slot > 0
    kept = slot * 0
    if capture is not None:
        kept = tl.load(capture + row).to(tl.int64)
        wrong = wrong | (kept < 0) | (kept >= n_sums)
        wanted = wanted | (kept > 0)
    seen = None
    if projections is not None:
        seen = projections + row * K
        if slot == 0:
            for i in tl.static_range(K):
                tl.store(seen + i, 0.0)

    power = None
    if strength is not None:
        power = strength + row

    if wrong:
        tl.store(here, tl.full([BLOCK], float("nan"), hidden.dtype.element_ty), mask=inside)
    elif wanted:
        stored = tl.load(here, mask=inside, other=0.0)
        stream = stored.to(tl.float32)
        rest = tl.zeros_like(stream)
        if residual is not None:
            rest = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
            stream += rest
        if slot > 0:
            change, moved = _change(stream, V, lo, hi, shift, seen, power, slot, column, inside, D, K)
            if moved:
                stored = (stored.to(tl.float32) + change).to(hidden.dtype.element_ty)
                tl.store(here, stored, mask=inside)
        if capture is not None:
            after = stored.to(tl.float32) + rest
            tl.atomic_add(sums + kept * D + column, after, mask=inside & (kept > 0), sem="relaxed")


@triton.jit
def _change_into(
    hidden: tl.tensor,
    out: tl.tensor,
    V: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    shift: tl.tensor,
    hidden_stride: tl.tensor,
    out_stride: tl.tensor,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    stored = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0)
    stream = stored.to(tl.float32)
    change, moved = _change(stream, V, lo, hi, shift, None, None, row * 0, column, inside, D, K)
    if moved:
        stored = (stream + change).to(hidden.dtype.element_ty)
    tl.store(out + row * out_stride + column, stored, mask=inside)
