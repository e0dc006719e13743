"""The intervention operator on a GPU: is it exact, how close to the memory's speed, and what does it cost a server?

    PYTHONPATH=src python -m benchmarks.gpu_intervention [--device cpu] [--rounds 20] [--layers 32 --d-model 4096 ...]

Needs torch, numpy and, on a GPU, triton. It has a table of its own because it says more than a ratio: *checks*, which
must hold (exit code 1 when one does not), and *aims*, figures from CUDA events of CUDA graphs that run in turn in one
process, A B B A.

- the operator against float64: dtypes, widths, numbers of directions, residual or none, rows that lie apart
- a stand-in decoder, its stream split into hidden and residual as vLLM keeps it, in a CUDA graph, with 16 layers held
  and captured: each held layer against float64 on what it was given (bfloat16, float32), the whole against the same
  decoder in float64 (float32), new buffers between replays, rows of padding; then compiled as one full graph
- aim: at least 85 % of the bandwidth of a copy of as many bytes, on more data than the L2 cache holds
- aim: 8 held layers take at most 1 % of a decode step of a decoder of realistic size

``--device cpu`` runs the checks, without graphs, on small sizes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from benchmarks.measure import Claim, Compared, Result
from persona_axis.steering.interventions import orthonormal
from persona_axis.steering.op import intervene_, intervened

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((64, 4096, 1), (300, 576, 1), (300, 1000, 3), (300, 5120, 8), (100, 16384, 2))  # rows, d_model, k
STREAMED = ((8192, 4096, 1), (8192, 4096, 3), (8192, 5120, 1), (4096, 8192, 1), (2048, 16384, 1), (65536, 576, 1))
BANDWIDTH, SHARE = 0.85, 1.01
HELD_LAYERS, CHECKED_LAYERS = 8, 16
OVER_L2 = 8  # how many times the L2 cache's size a timing goes through

Change = Callable[[int, Tensor, Tensor], None]  # layer, hidden, residual; hidden changes in place


@dataclass(frozen=True)
class Check:
    """Something that must hold."""

    name: str
    holds: bool
    detail: str = ""

    def line(self) -> str:
        return f"{self.name:<60} {'met' if self.holds else 'NOT MET'}{self.detail and f' ({self.detail})'}"


@dataclass(frozen=True)
class Sizes:
    """Of the stand-in decoder."""

    d_model: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    ff: int = 14336
    batch: int = 64
    context: int = 1024

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


# ---- a bank and the formula in float64 --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bank:
    """Policies by slot, for one layer or, with a leading dimension, for several."""

    V: Tensor  # [..., slots, k, d_model]
    lo: Tensor  # [..., slots, k]
    hi: Tensor
    shift: Tensor

    def at(self, layer: int) -> Bank:
        return Bank(*(t[layer] for t in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.V, self.lo, self.hi, self.shift


def make_bank(d_model: int, k: int, random: torch.Generator, device: torch.device, scale: float = 1.0) -> Bank:
    """Slots: off, floors, bands, equal bounds on one direction and the others unused, a shift."""
    V = torch.stack([orthonormal(torch.randn(k, d_model, generator=random)) for _ in range(5)])
    lo, hi, shift = torch.full((5, k), -math.inf), torch.full((5, k), math.inf), torch.zeros(5, k)
    draws = scale * torch.randn(4, k, generator=random)
    lo[1] = draws[0]
    lo[2], hi[2] = draws[1] - scale / 2, draws[1] + scale / 2
    V[3, 1:] = 0
    lo[3, 0] = hi[3, 0] = draws[2, 0]
    shift[4] = draws[3]
    V[0] = 0
    return Bank(*(t.to(device) for t in (V, lo, hi, shift)))


def exact(stream: Tensor, bank: Bank, slots: Tensor) -> tuple[Tensor, Tensor]:
    """What the formula adds to ``stream [rows, d_model]`` and its projections, in float64."""
    V, lo, hi, shift = (t.double()[slots.long()] for t in bank.tensors)
    on = (slots > 0).double()[:, None]
    p = (V @ stream.double()[..., None])[..., 0] * on
    change = (torch.minimum(torch.maximum(p, lo), hi) - p + shift) * on
    return (change[..., None] * V).sum(1), p


def excess(got: Tensor, hidden: Tensor, stream: Tensor, bank: Bank, slots: Tensor) -> float:
    """By how much ``got`` is farther from float64 than one rounding and a float32 projection allow; <= 0 is good."""
    want = hidden.double() + exact(stream, bank, slots)[0]
    info = torch.finfo(got.dtype)
    slack = 0.502 * info.eps * want.abs() + 0.5 * info.smallest_normal * info.eps
    slack = slack + 2.0**-20 * stream.double().norm(dim=-1, keepdim=True) + 1e-6
    over = ((got.double() - want).abs() - slack).max()
    return math.inf if bool(over.isnan()) else float(over)


# ---- the operator alone -----------------------------------------------------------------------------------------


def check_operator(device: torch.device, shapes: Sequence[tuple[int, int, int]]) -> Iterator[Check]:
    """Every dtype and shape against float64, in place and out of place; untouched rows bit for bit."""
    random = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        worst, kept, places, seen = -math.inf, True, -math.inf, 0.0
        for rows, d_model, k in shapes:
            for split in (True, False):
                whole = torch.randn(2, rows, d_model + 32, generator=random).to(device, dtype)
                hidden, residual = whole[..., :d_model]
                bank = make_bank(d_model, k, random, device)
                slots = torch.randint(5, (rows,), generator=random, dtype=torch.int32).to(device)
                capture = torch.randint(3, (rows,), generator=random, dtype=torch.int32).to(device)
                sums, projections = torch.zeros(3, d_model, device=device), torch.zeros(rows, k, device=device)
                before = whole.clone()
                rest = residual if split else None
                intervene_(hidden, *bank.tensors, slots, rest, sums, capture, projections)
                was = before[0, :, :d_model]
                stream = was.double() + residual.double() * split
                worst = max(worst, excess(hidden, was, stream, bank, slots))
                change, p = exact(stream, bank, slots)
                still = (change == 0).all(-1)
                kept &= torch.equal(hidden[still], was[still]) and torch.equal(
                    whole[..., d_model:], before[..., d_model:]
                )
                kept &= torch.equal(whole[1], before[1])
                after = hidden.double() + residual.double() * split
                want = torch.zeros(3, d_model, dtype=torch.float64, device=device)
                want.index_add_(0, capture.long(), after * (capture > 0).double()[:, None])
                places = max(places, float((sums - want).abs().max() - 2.0**-18 * after.abs().sum(0).max()))
                seen = max(seen, float(((projections - p).abs() / stream.norm(dim=-1, keepdim=True)).max()))
                one = Bank(*(t[2] for t in bank.tensors))
                out = intervened(was, *one.tensors)
                every, ones = Bank(*(t[None].expand(2, *t.shape) for t in one.tensors)), torch.ones_like(slots)
                worst = max(worst, excess(out, was, was, every, ones))
        yield Check(f"operator, {dtype}: one rounding from float64", worst <= 0, f"{worst:.1e} over the allowance")
        yield Check(f"operator, {dtype}: untouched rows and gaps bit for bit", kept)
        yield Check(f"operator, {dtype}: captured sums", places <= 0)
        yield Check(f"operator, {dtype}: projections", seen <= 2.0**-20, f"off by {seen:.1e} of the row's norm")


def check_wrong_slots(device: torch.device) -> Check:
    """On a GPU a slot that does not exist makes its row NaN, and only that."""
    bank = make_bank(64, 1, torch.Generator().manual_seed(0), device)
    hidden = torch.ones(4, 64, device=device)
    intervene_(hidden, *bank.tensors, torch.tensor([1, 5, -1, 0], dtype=torch.int32, device=device))
    found = hidden.isnan().all(-1).tolist()
    return Check("a slot that does not exist makes its row NaN", found == [False, True, True, False], str(found))


# ---- a stand-in decoder -----------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """One decode step of a pre-norm decoder with grouped heads; weights and cache are random.

    The stream is ``hidden + residual``; each norm adds them, in the dtype of the decoder, as a fused add-norm does.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.sizes = s = sizes
        kv = s.kv_heads * s.head_dim

        def draw(n: int, *shape: int) -> nn.Parameter:
            drawn = torch.randn(s.layers, *shape, dtype=dtype, device=device)
            return nn.Parameter(drawn.div_(math.sqrt(n)), requires_grad=False)

        torch.manual_seed(0)
        self.qkv = draw(s.d_model, s.d_model + 2 * kv, s.d_model)
        self.o = draw(s.d_model, s.d_model, s.d_model)
        self.gate_up = draw(s.d_model, 2 * s.ff, s.d_model)
        self.down = draw(s.ff, s.d_model, s.ff)
        self.keys = draw(1, s.batch, s.kv_heads, s.context, s.head_dim)
        self.values = draw(1, s.batch, s.kv_heads, s.context, s.head_dim)

    def forward(self, x: Tensor, change: Change | None = None) -> Tensor:
        """``x [batch, d_model]`` -> the stream after the last block."""
        s = self.sizes
        hidden, residual = x, torch.zeros_like(x)
        for layer in range(s.layers):
            residual = hidden + residual
            hidden = self._attention(layer, rms_norm(residual, (s.d_model,)))
            residual = hidden + residual
            gate, up = (rms_norm(residual, (s.d_model,)) @ self.gate_up[layer].T).chunk(2, -1)
            hidden = (silu(gate) * up) @ self.down[layer].T
            if change is not None:
                change(layer, hidden, residual)
        return hidden + residual

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        s = self.sizes
        kv = s.kv_heads * s.head_dim
        q, k, v = (x @ self.qkv[layer].T).split([s.d_model, kv, kv], -1)
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, -1], values[:, :, -1] = (t.view(s.batch, s.kv_heads, s.head_dim) for t in (k, v))
        query = q.view(s.batch, s.heads, 1, s.head_dim)
        mixed = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        return mixed.reshape(s.batch, s.d_model) @ self.o[layer].T

    def bytes_read(self) -> int:
        """By one step, at least."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


class Held:
    """The operator at some layers, with the buffers of a server. ``change`` is what the decoder calls."""

    def __init__(self, layers: Sequence[int], batch: int, bank: Bank, places: int = 3, tapped: bool = False) -> None:
        self.layers, self.bank, self.tapped = tuple(layers), bank, tapped
        d_model, k, device = bank.V.shape[-1], bank.V.shape[-2], bank.V.device
        self.slots = torch.zeros(batch, dtype=torch.int32, device=device)
        self.capture = torch.zeros(batch, dtype=torch.int32, device=device)
        self.sums = torch.zeros(len(layers), places, d_model, device=device)
        self.projections = torch.zeros(len(layers), batch, k, device=device)
        self.taps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # hidden before and after, residual

    def change(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        if layer not in self.layers:
            return
        i = self.layers.index(layer)
        before = hidden.clone() if self.tapped else None
        policy = self.bank.at(i).tensors
        intervene_(hidden, *policy, self.slots, residual, self.sums[i], self.capture, self.projections[i])
        if before is not None:
            self.taps[i] = before, hidden.clone(), residual.clone()

    def set(self, bank: Bank, slots: Tensor, capture: Tensor) -> None:
        """New content in the same buffers."""
        for t, new in zip(self.bank.tensors, bank.tensors, strict=True):
            t.copy_(new)
        self.slots.copy_(slots)
        self.capture.copy_(capture)
        self.sums.zero_()


class Exact(Held):
    """The same in float64, with the formula written out."""

    def change(self, layer: int, hidden: Tensor, residual: Tensor) -> None:
        if layer not in self.layers:
            return
        i = self.layers.index(layer)
        change, p = exact(hidden + residual, self.bank.at(i), self.slots)
        hidden += change
        self.projections[i] = p
        after = (hidden + residual) * (self.capture > 0).double()[:, None]
        self.sums[i] += torch.zeros_like(self.sums[i], dtype=torch.float64).index_add_(0, self.capture.long(), after)


@torch.inference_mode()
def check_decoder(device: torch.device, sizes: Sizes, dtype: torch.dtype) -> Iterator[Check]:
    """Replays of a captured step, or on the CPU plain calls, under one set of buffers after another."""
    layers = range(sizes.layers - min(CHECKED_LAYERS, sizes.layers), sizes.layers)
    random = torch.Generator().manual_seed(1)
    decoder = Decoder(sizes, dtype, device)
    x = torch.randn(sizes.batch, sizes.d_model, generator=random).to(device, dtype)
    held = Held(layers, sizes.batch, _banks(layers, sizes, random, device), tapped=True)
    step = replayed(lambda: decoder(x, held.change), device)
    plain = replayed(lambda: decoder(x), device)().clone()
    whole = dtype == torch.float32  # bfloat16 differs from float64 without any intervention
    twin = Exact(layers, sizes.batch, _banks(layers, sizes, random, device)) if whole else None
    double = copy.deepcopy(decoder).double() if whole else None
    name = f"decoder, {dtype}, {len(layers)} layers{', CUDA graph' if device.type == 'cuda' else ''}: "
    padding = sizes.batch // 4
    for which, (bank, slots, capture) in _contents(layers, sizes, padding, random, device).items():
        held.set(bank, slots, capture)
        out = step().clone()
        yield Check(f"{name}{which}", *_against_taps(held))
        if which == "off":
            yield Check(f"{name}off is the plain decoder bit for bit", torch.equal(out, plain))
        else:
            moved = (out != plain).any(-1)
            there = torch.equal(out[-padding:], plain[-padding:])
            yield Check(f"{name}{which}, padding bit for bit", there)
            yield Check(f"{name}{which}, the others moved", bool(moved[slots > 0].all()))
        if twin is not None and double is not None:
            twin.set(bank, slots, capture)
            worst = _relative(out, double(x.double(), twin.change))
            sums, seen = _relative(held.sums, twin.sums), _relative(held.projections, twin.projections)
            detail = f"stream {worst:.1e}, sums {sums:.1e}, projections {seen:.1e}"
            yield Check(f"{name}{which}, whole against float64", max(worst, sums, seen) < 1e-3, detail)


def _banks(layers: Sequence[int], sizes: Sizes, random: torch.Generator, device: torch.device) -> Bank:
    each = [make_bank(sizes.d_model, 2, random, device) for _ in layers]
    return Bank(*(torch.stack(ts) for ts in zip(*(b.tensors for b in each), strict=True)))


def _contents(
    layers: Sequence[int], sizes: Sizes, padding: int, random: torch.Generator, device: torch.device
) -> dict[str, tuple[Bank, Tensor, Tensor]]:
    """What the buffers are to hold, one set of contents after another; the last rows are padding, slot 0."""
    first, second = (_banks(layers, sizes, random, device) for _ in range(2))
    off = torch.zeros(sizes.batch, dtype=torch.int32)
    slots = off.clone()
    slots[:-padding] = 1 + torch.arange(sizes.batch - padding) % 4
    capture = torch.randint(1, 3, (sizes.batch,), generator=random, dtype=torch.int32)
    capture[-padding:] = 0
    others = slots.clone()
    others[:-padding] = 1 + (slots[:-padding] + 1) % 4
    contents = {
        "first bank": (first, slots, capture),
        "another bank": (second, slots, off),
        "other slots": (second, others, capture.flip(0) * (others > 0)),
        "off": (second, off, capture),
    }
    return {n: (bank, a.to(device), b.to(device)) for n, (bank, a, b) in contents.items()}


def _against_taps(held: Held) -> tuple[bool, str]:
    """Each held layer against float64 on what it was given."""
    worst, still = -math.inf, True
    for i, (before, after, residual) in held.taps.items():
        stream, bank = before.double() + residual.double(), held.bank.at(i)
        worst = max(worst, excess(after, before, stream, bank, held.slots))
        change, p = exact(stream, bank, held.slots)
        untouched = (change == 0).all(-1)
        still &= torch.equal(after[untouched], before[untouched])
        kept = (after.double() + residual.double()) * (held.capture > 0).double()[:, None]
        want = torch.zeros_like(held.sums[i], dtype=torch.float64).index_add_(0, held.capture.long(), kept)
        size = 2.0**-18 * kept.abs().sum(0).max()
        worst = max(worst, float(((held.sums[i] - want).abs() - size).max()))
        slack = 2.0**-20 * stream.norm(dim=-1, keepdim=True)
        worst = max(worst, float(((held.projections[i] - p).abs() - slack).max()))
    return worst <= 0 and still and len(held.taps) == len(held.layers), f"{len(held.taps)} layers, {worst:.1e} over"


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-12))


@torch.inference_mode()
def check_compiled(device: torch.device, sizes: Sizes) -> Iterator[Check]:
    """``torch.compile(fullgraph=True)`` of a few layers; buffers change between calls."""
    sizes = replace(sizes, layers=min(4, sizes.layers))
    layers, random = range(sizes.layers), torch.Generator().manual_seed(2)
    decoder, x = Decoder(sizes, torch.float32, device), torch.randn(sizes.batch, sizes.d_model, device=device)
    held, twin = (Held(layers, sizes.batch, _banks(layers, sizes, random, device)) for _ in range(2))
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    step = torch.compile(lambda: decoder(x, held.change), fullgraph=True, backend=backend)
    for which, contents in _contents(layers, sizes, max(1, sizes.batch // 4), random, device).items():
        held.set(*contents)
        twin.set(*contents)
        got, want = step(), decoder(x, twin.change)
        worst = max(_relative(got, want.double()), _relative(held.sums, twin.sums.double()))
        worst = max(worst, _relative(held.projections, twin.projections.double()))
        yield Check(f"decoder compiled as one full graph ({backend}): {which}", worst < 1e-4, f"off by {worst:.1e}")


# ---- CUDA graphs and events -------------------------------------------------------------------------------------


def replayed(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """``work`` in a CUDA graph, whose result stays in one place; on the CPU ``work`` itself."""
    if device.type != "cuda":
        return work
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and makes workspaces, which a capture must not do
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = work()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def compare_on_device(*works: Callable[[], Tensor], rounds: int, calls: int = 1) -> Compared:
    """Like :func:`benchmarks.measure.compare`, by CUDA events."""
    for work in works:
        work()
    runs: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    for i in range(rounds):
        for which in order if i % 2 == 0 else order[::-1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                works[which]()
            end.record()
            end.synchronize()
            runs[which].append(start.elapsed_time(end) / 1000 / calls)
    return Compared(runs)


@torch.inference_mode()
def bandwidth(device: torch.device, rows: int, d_model: int, k: int, rounds: int, capture: bool = False) -> Result:
    """All rows changed (a shift, so that every call changes them again) against a copy of as many bytes.

    Both go round a ring of buffers that together are some times the L2 cache.
    """
    moved = 3 * rows * d_model * 2  # bytes: hidden and residual read, hidden written, bfloat16
    ring = max(2, math.ceil(OVER_L2 * torch.cuda.get_device_properties(device).L2_cache_size / moved))
    hidden, residual = (torch.randn(ring, rows, d_model, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.zeros(ring, moved // 2, device=device, dtype=torch.uint8) for _ in range(2))
    V = torch.zeros(2, k, d_model)
    V[1] = orthonormal(torch.randn(k, d_model))
    bounds = (torch.full((2, k), -math.inf), torch.full((2, k), math.inf), torch.full((2, k), 0.01))
    bank = Bank(*(t.to(device) for t in (V, *bounds)))
    slots = torch.ones(rows, dtype=torch.int32, device=device)
    place = torch.ones_like(slots) if capture else None  # the worst case: one place for all
    sums = torch.zeros(2, d_model, device=device) if capture else None

    def ours() -> Tensor:
        for i in range(ring):
            intervene_(hidden[i], *bank.tensors, slots, residual[i], sums, place)
        return hidden

    def copies() -> Tensor:
        for i in range(ring):
            target[i].copy_(source[i])
        return target

    found = compare_on_device(replayed(copies, device), replayed(ours, device), rounds=rounds, calls=3)
    copied, done = (seconds / ring for seconds in found.seconds())
    name = f"bandwidth {rows} x {d_model}, k {k}{', all captured' if capture else ''}"
    claim = Claim(name, ">= 85 % of a copy's bandwidth (aim)", BANDWIDTH, "x bandwidth of a copy")
    details = {"microseconds": done * 1e6, "gb_per_s": moved / done / 1e9, "copy_gb_per_s": moved / copied / 1e9}
    return Result(claim, found.ratio(0, 1), {"buffers": ring}, details)


@torch.inference_mode()
def decode_share(device: torch.device, sizes: Sizes, rounds: int, copy_gb_per_s: float) -> Result:
    """A decode step with 8 held layers, about half of the rows changed in each, against one without."""
    start = max(0, sizes.layers * 2 // 3 - HELD_LAYERS // 2)
    layers = range(start, min(sizes.layers, start + HELD_LAYERS))
    random = torch.Generator().manual_seed(3)
    decoder = Decoder(sizes, torch.bfloat16, device)
    x = torch.randn(sizes.batch, sizes.d_model, generator=random).to(device, torch.bfloat16)
    V = torch.stack([torch.stack([orthonormal(torch.randn(1, sizes.d_model, generator=random))] * 2) for _ in layers])
    shape = V.shape[:-1]
    bank = Bank(
        *(t.to(device) for t in (V, torch.full(shape, -math.inf), torch.full(shape, math.inf), torch.zeros(shape)))
    )
    held = Held(layers, sizes.batch, bank)
    held.slots.fill_(1)
    decoder(x, held.change)
    bank.lo[:, 1] = held.projections.median(1).values
    with_it, without = replayed(lambda: decoder(x, held.change), device), replayed(lambda: decoder(x), device)
    with_it()
    changed = float((held.projections < bank.lo[:, 1:]).float().mean())
    found = compare_on_device(with_it, without, rounds=rounds, calls=10)
    slow, fast = found.seconds()
    least = decoder.bytes_read() / copy_gb_per_s / 1e9
    claim = Claim(
        f"{len(layers)} held layers", "<= 1 % of a decode step (aim)", SHARE, "x seconds without", at_most=True
    )
    details = {
        "milliseconds_with_without": [slow * 1e3, fast * 1e3],
        "microseconds_per_layer": (slow - fast) / len(layers) * 1e6,
        "step_over_reading_weights_and_cache_at_copy_bandwidth": fast / least,
        "share_of_that_least_step": (slow - fast) / least,
        "rows_changed": changed,
    }
    return Result(claim, found.ratio(), {k: getattr(sizes, k) for k in vars(sizes)}, details)


# ---- the command ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "This machine has no CUDA device: nothing was checked or measured. --device cpu runs the checks on the CPU."
        )
        return 2
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else "CPU, nothing of this is about a GPU"
    print(f"{where}; torch {torch.__version__}", flush=True)
    checks, aims = [], []

    def note(entries: Iterator[Check] | Sequence[Check]) -> None:
        for check in entries:
            checks.append(check)
            print(check.line(), flush=True)

    note(check_operator(device, SHAPES if on_gpu else ((9, 64, 1), (9, 100, 3))))
    small = Sizes(1024, 20, 16, 4, 2816, 32, 128) if on_gpu else Sizes(48, 18, 4, 2, 64, 12, 8)
    for dtype in (torch.float32, torch.bfloat16):
        note(check_decoder(device, small, dtype))
    if not args.no_compile:
        note(check_compiled(device, small))
    if on_gpu:
        note([check_wrong_slots(device)])
        for result in measure(device, Sizes(*(getattr(args, name) for name in vars(Sizes()))), args.rounds):
            aims.append(result)
            print(result.line(), result.settings, result.details, sep="\n  ", flush=True)

    print(f"\n{where}\n")
    failed = [c for c in checks if not c.holds]
    print(f"{'checks':<60} {len(checks) - len(failed)} of {len(checks)} met")
    for check in failed:
        print(f"  {check.line()}")
    for aim in aims:
        print(aim.line())
    return 1 if failed else 0


def measure(device: torch.device, sizes: Sizes, rounds: int) -> Iterator[Result]:
    copied: list[float] = []
    for shape in STREAMED:
        result = bandwidth(device, *shape, rounds)
        copied.append(result.details["copy_gb_per_s"])
        yield result
    yield bandwidth(device, 8192, 4096, 1, rounds, capture=True)
    yield decode_share(device, sizes, rounds, max(copied))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_intervention", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (checks only)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="pairs per figure")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile, which takes a minute")
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
