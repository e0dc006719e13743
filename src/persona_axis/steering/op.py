"""The intervention as two PyTorch operators, which ``torch.compile`` and CUDA graphs keep: no hook to be skipped.

``persona_axis::intervene_`` is for serving: it changes rows in place, each under the policy of its slot in a bank.
``persona_axis::intervened`` returns hidden states changed by one policy. Both are the formula of
:mod:`persona_axis.steering.interventions`: one kernel launch on a GPU with Triton (``triton_kernel.py``), plain PyTorch
elsewhere. Neither has a gradient.

Contract:

1. A row's stream is ``hidden + residual``, added in float32 whatever the two are stored in (servers keep them apart
   until the next norm adds them). ``p`` is of the stream; the change is added to ``hidden``, which is rounded once.
2. A row that nothing changes keeps its bits. Slot 0 of a bank is off, its content is not read. A direction that a slot
   does not need is ``V = 0, lo = -inf, hi = inf, shift = 0``, and changes nothing.
3. Every buffer is read when the operator runs, so new content counts from the next replay of a CUDA graph on.
4. Shapes, dtypes and devices are checked in each call. Contents cannot be without waiting for a GPU: there, a row whose
   slot, or place in ``sums``, does not exist becomes NaN; on the CPU it is an error.
5. Projections and changes are float32 element by element: neither autocast nor TF32 reaches them.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from persona_axis.errors import UsageError
from persona_axis.steering.interventions import correction

STREAM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def change_rows(
    hidden: Tensor,
    V: Tensor,
    lo: Tensor,
    hi: Tensor,
    shift: Tensor,
    slots: Tensor,
    residual: Tensor | None = None,
    sums: Tensor | None = None,
    capture: Tensor | None = None,
    projections: Tensor | None = None,
    strength: Tensor | None = None,
) -> None:
    """Change rows in place, each under the policy of its slot: the operator's body in plain PyTorch, for callers that
    are in an operator already.

    ``slots``, ``capture``, ``projections`` and ``strength`` may be longer than ``hidden``, as a server's buffers are:
    what lies beyond its rows is neither read nor written.

    Args:
        hidden: ``[rows, d_model]`` bfloat16, float16 or float32; its rows may lie apart.
        V: the bank's directions, ``[slots, k, d_model]`` float32; those of a slot are orthonormal or zero.
        lo, hi, shift: ``[slots, k]`` float32.
        slots: ``[rows]`` int32, each row's slot; 0 is off.
        residual: ``[rows, d_model]``, the other half of the stream.
        sums: ``[places, d_model]`` float32; the stream *after* the change is added to the row's place.
        capture: ``[rows]`` int32, each row's place in ``sums``, 0 being none; rows of one place add up.
        projections: ``[rows, k]`` float32, receives ``p``, *before* the change; 0 for rows of slot 0.
        strength: ``[rows]`` float32, by which each row's ``shift`` is multiplied; None is 1.

    Raises:
        UsageError: a shape, dtype, device or layout that does not fit; on the CPU also a slot or a place that does
            not exist.
    """
    _check_bank(hidden, V, lo, hi, shift, slots, residual, sums, capture, projections, strength)
    slot = _numbers(hidden, "slots", slots, len(V))
    on = slot[:, None] > 0
    if len(slot) and slot.device.type == "cpu" and bool((slot == slot[0]).all()):
        slot = slot[:1]  # one policy for all: no copy of its directions for every row
    directions = V[slot]
    add = shift[slot] if strength is None else shift[slot] * strength[: len(hidden), None]
    p, change = _change(_stream(hidden, residual), directions, lo[slot], hi[slot], add)
    if hidden.device.type == "cpu":  # looking costs no waiting here, and writing what changes saves half of the time
        moved = ((change != 0).any(-1, keepdim=True) & on).squeeze(-1).nonzero().squeeze(-1)
        theirs = directions if len(directions) == 1 else directions[moved]
        hidden[moved] = (hidden[moved].float() + _along(change[moved], theirs)).to(hidden.dtype)
    else:
        hidden.copy_(_moved(hidden, directions, change, on))
    if projections is not None:
        projections[: len(hidden)] = torch.where(on, p, 0)
    if sums is not None and capture is not None:
        place = _numbers(hidden, "capture", capture, len(sums))
        sums.index_add_(0, place, torch.where(place[:, None] > 0, _stream(hidden, residual), 0))


intervene_ = torch.library.custom_op(
    "persona_axis::intervene_", change_rows, mutates_args=("hidden", "sums", "projections")
)


@torch.library.custom_op("persona_axis::intervened", mutates_args=())
def intervened(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """``hidden [..., d_model]`` changed by one policy, as a new contiguous tensor.

    Args:
        hidden: bfloat16, float16 or float32.
        V: ``[k, d_model]`` float32, rows orthonormal or zero.
        lo, hi, shift: ``[k]`` float32.

    Raises:
        UsageError: a shape, dtype, device or layout that does not fit.
    """
    rows = _rows(hidden, V, lo, hi, shift)
    _, change = _change(rows.float(), V[None], lo, hi, shift)
    return _moved(rows, V[None], change).view(hidden.shape)


@intervene_.register_fake
def _(
    hidden: Tensor,
    V: Tensor,
    lo: Tensor,
    hi: Tensor,
    shift: Tensor,
    slots: Tensor,
    residual: Tensor | None = None,
    sums: Tensor | None = None,
    capture: Tensor | None = None,
    projections: Tensor | None = None,
    strength: Tensor | None = None,
) -> None:
    return None


@intervened.register_fake
def _(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape)


if find_spec("triton") is not None:

    @intervene_.register_kernel("cuda")
    def _(
        hidden: Tensor,
        V: Tensor,
        lo: Tensor,
        hi: Tensor,
        shift: Tensor,
        slots: Tensor,
        residual: Tensor | None = None,
        sums: Tensor | None = None,
        capture: Tensor | None = None,
        projections: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> None:
        from persona_axis.steering import triton_kernel

        _check_bank(hidden, V, lo, hi, shift, slots, residual, sums, capture, projections, strength)
        triton_kernel.intervene_(hidden, V, lo, hi, shift, slots, residual, sums, capture, projections, strength)

    @intervened.register_kernel("cuda")
    def _(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
        from persona_axis.steering import triton_kernel

        rows = _rows(hidden, V, lo, hi, shift)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        triton_kernel.intervened(rows, out, V, lo, hi, shift)
        return out.view(hidden.shape)


def _stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
    return hidden.float() if residual is None else hidden.float() + residual.float()


def _change(stream: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Projections of ``stream [rows, d_model]`` and what the formula adds to them, ``[rows, k]``.

    ``V`` is ``[rows, k, d_model]`` or one policy for all, ``[1, k, d_model]``.
    """
    p = (stream[:, None] * V).sum(-1)
    return p, correction(p, lo, hi, shift)


def _moved(hidden: Tensor, V: Tensor, change: Tensor, on: Tensor | None = None) -> Tensor:
    """``hidden`` with the change put in, in the rows that have one."""
    moved = (change != 0).any(-1, keepdim=True)
    if on is not None:
        moved = moved & on
    return torch.where(moved, (hidden.float() + _along(change, V)).to(hidden.dtype), hidden)


def _along(change: Tensor, V: Tensor) -> Tensor:
    """``change [rows, k]`` along directions ``[rows or 1, k, d_model]``: ``[rows, d_model]``."""
    return change * V[:, 0] if change.shape[1] == 1 else (change[..., None] * V).sum(1)


def _numbers(hidden: Tensor, name: str, given: Tensor, count: int) -> Tensor:
    """The rows' numbers, as indices; on the CPU, where looking costs no waiting, they must exist."""
    here = given[: len(hidden)].long()
    if here.device.type == "cpu" and not bool(((here >= 0) & (here < count)).all()):
        raise UsageError(f"{name} holds numbers outside 0 to {count - 1}: {here.min()} to {here.max()}.")
    return here


def _check_bank(
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
    if hidden.ndim != 2:
        raise UsageError(f"hidden has shape {list(hidden.shape)}; [rows, d_model] is expected.")
    rows, width = hidden.shape
    if hidden.stride(1) != 1 or (rows > 1 and hidden.stride(0) < width):
        raise UsageError(f"hidden has strides {hidden.stride()}: its rows must be contiguous and must not overlap.")
    if residual is not None:
        _check("residual", residual, hidden, STREAM_DTYPES, (rows, width))
        if residual.stride(1) != 1:
            raise UsageError(f"residual has strides {residual.stride()}: its rows must be contiguous.")
    _check_policy(hidden, V, lo, hi, shift, "slots")
    _check_rows("slots", slots, hidden, torch.int32)
    if (sums is None) != (capture is None):
        raise UsageError("sums and capture belong together: give both or neither.")
    if sums is not None and capture is not None:
        _check("sums", sums, hidden, (torch.float32,), (len(sums), width), contiguous=True)
        _check_rows("capture", capture, hidden, torch.int32)
    if projections is not None:
        _check_rows("projections", projections, hidden, torch.float32, V.shape[1])
    if strength is not None:
        _check_rows("strength", strength, hidden, torch.float32)


def _rows(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """``[..., d_model]`` -> ``[rows, d_model]``, checked."""
    if not hidden.ndim:
        raise UsageError("hidden is a single number; [..., d_model] is expected.")
    _check_policy(hidden, V, lo, hi, shift)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_policy(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor, bank: str = "") -> None:
    if hidden.dtype not in STREAM_DTYPES:
        raise UsageError(f"hidden is {hidden.dtype}; bfloat16, float16 or float32 is expected.")
    lead = V.shape[: V.ndim - 2]
    if V.ndim != 2 + bool(bank) or 0 in V.shape:
        raise UsageError(f"V has shape {list(V.shape)}; [{bank}{', ' * bool(bank)}k, d_model] is expected.")
    k = V.shape[-2]
    _check("V", V, hidden, (torch.float32,), (*lead, k, hidden.shape[-1]), contiguous=True)
    for name, bound in (("lo", lo), ("hi", hi), ("shift", shift)):
        _check(name, bound, hidden, (torch.float32,), (*lead, k), contiguous=True)


def _check_rows(name: str, given: Tensor, hidden: Tensor, dtype: torch.dtype, *rest: int) -> None:
    """A buffer with an entry for each row, and maybe more."""
    if not given.ndim or len(given) < len(hidden):
        raise UsageError(f"{name} has shape {list(given.shape)}; an entry for each of {len(hidden)} rows is expected.")
    _check(name, given, hidden, (dtype,), (len(given), *rest), contiguous=True)


def _check(
    name: str,
    given: Tensor,
    hidden: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    contiguous: bool = False,
) -> None:
    if given.shape != shape:
        raise UsageError(f"{name} has shape {list(given.shape)}; {list(shape)} is expected.")
    if given.dtype not in dtypes:
        raise UsageError(f"{name} is {given.dtype}; {' or '.join(str(d) for d in dtypes)} is expected.")
    if given.device != hidden.device:
        raise UsageError(f"{name} is on {given.device}, hidden on {hidden.device}.")
    if contiguous and not given.is_contiguous():
        raise UsageError(f"{name} is not contiguous.")
