"""The intervention as an operator: the formula in float64, which bits may change, and what compilers must keep.

``TestFormula`` runs twice: on the operators, and on the Triton kernels in Triton's interpreter, which has to be asked
for before Triton is imported and therefore is a process of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_axis.errors import UsageError
from persona_axis.steering import interventions, op
from persona_axis.steering.interventions import orthonormal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
ULPS = 1.01 if INTERPRETED else 0.502  # the interpreter cuts float32 to bfloat16 where the compiled kernel rounds
PROPERTY = settings(max_examples=8 if INTERPRETED else 30, deadline=None)


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of ``intervene_``."""

    hidden: Tensor
    V: Tensor
    lo: Tensor
    hi: Tensor
    shift: Tensor
    slots: Tensor
    residual: Tensor | None = None
    sums: Tensor | None = None
    capture: Tensor | None = None
    projections: Tensor | None = None
    strength: Tensor | None = None

    @property
    def stream(self) -> Tensor:
        """float64"""
        return self.hidden.double() if self.residual is None else self.hidden.double() + self.residual.double()


def run(case: Case) -> Case:
    """What the buffers hold afterwards; those of ``case`` stay."""
    copies = {n: _copy(t) for n, t in vars(case).items()}
    if INTERPRETED:
        from persona_axis.steering import triton_kernel

        triton_kernel.intervene_(**copies)
    else:
        op.intervene_(**copies)
    return Case(**copies)


def run_one(hidden: Tensor, V: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    if not INTERPRETED:
        return op.intervened(hidden, V, lo, hi, shift)
    from persona_axis.steering import triton_kernel

    rows = hidden.reshape(-1, hidden.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    triton_kernel.intervened(rows, out, V, lo, hi, shift)
    return out.view(hidden.shape)


def _copy(t: Tensor | None) -> Tensor | None:
    """With its strides, gaps and all."""
    if t is None:
        return None
    return _whole(t).clone().as_strided(t.shape, t.stride(), t.storage_offset())


def _whole(t: Tensor) -> Tensor:
    """All of a tensor's storage."""
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)


def _gaps(t: Tensor) -> Tensor:
    """Which part of the storage lies between the rows."""
    gaps = torch.ones(len(_whole(t)), dtype=torch.bool)
    gaps.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return gaps


def plain(case: Case) -> tuple[Tensor, Tensor]:
    """Row by row in float64: hidden after the change and ``p``, without any rounding."""
    hidden, seen = case.hidden.double(), torch.zeros(len(case.hidden), case.V.shape[1], dtype=torch.float64)
    for row, (stream, slot) in enumerate(zip(case.stream, case.slots.tolist(), strict=False)):
        if slot == 0:
            continue
        seen[row] = p = torch.stack([(stream * v.double()).sum() for v in case.V[slot]])
        bounded = torch.minimum(torch.maximum(p, case.lo[slot].double()), case.hi[slot].double())
        shift = case.shift[slot].double() * (1 if case.strength is None else float(case.strength[row]))
        for v, by in zip(case.V[slot].double(), bounded - p + shift, strict=True):
            hidden[row] += by * v
    return hidden, seen


def tolerance(case: Case) -> Tensor:
    """Of a projection in float32, ``[rows, 1]``."""
    strongest = 1.0 if case.strength is None else max(1.0, float(case.strength.abs().max()))
    shifts = strongest * case.shift[1:].abs().sum()  # slot 0 is rubbish
    sizes = case.stream.norm(dim=-1, keepdim=True) + shifts
    return 2.0**-20 * sizes + 1e-6


def assert_close(case: Case, after: Tensor) -> None:
    """``after`` is the change of ``case``, rounded once."""
    want, _ = plain(case)
    assert after.dtype == case.hidden.dtype
    slack = tolerance(case) + ULPS * ROUNDING[after.dtype] * want.abs()
    slack = slack + (2.0**-24 if after.dtype == torch.float16 else 0)  # subnormal numbers
    excess = (after.double() - want).abs() - slack
    assert not len(excess) or float(excess.max()) <= 0


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def bank(n_slots: int, k: int, width: int, random: torch.Generator, spread: float) -> tuple[Tensor, ...]:
    """Slots of every kind, each with up to ``k`` directions and the others unused; slot 0 is rubbish."""
    V, shift = torch.zeros(n_slots, k, width), torch.zeros(n_slots, k)
    lo, hi = torch.full((n_slots, k), -math.inf), torch.full((n_slots, k), math.inf)
    for slot in range(1, n_slots):
        used = 1 + slot % k
        V[slot, :used] = orthonormal(torch.randn(used, width, generator=random))
        a, b = spread * torch.randn(2, used, generator=random)
        kind = slot % 4
        if kind in (1, 2):
            lo[slot, :used] = torch.minimum(a, b)
        if kind == 2:
            hi[slot, :used] = torch.maximum(a, b)
        if kind == 3:
            lo[slot, :used] = hi[slot, :used] = a
        if kind == 0:
            shift[slot, :used] = b
    V[0], lo[0], hi[0], shift[0] = math.nan, 5, -5, math.inf
    return V, lo, hi, shift


def make(
    rows: int = 9,
    width: int = 64,
    k: int = 2,
    n_slots: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    residual: bool = True,
    apart: bool = False,
    scale: float = 3.0,
    strength: bool = False,
) -> Case:
    random = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        whole = (scale * torch.randn(rows, width + 24 * apart, generator=random)).to(dtype)
        whole[:, ::5] *= 0  # zeros of both signs, which adding nothing would not keep
        return whole[:, 8 : 8 + width] if apart else whole

    slots = torch.randint(n_slots, (rows + 3,), generator=random, dtype=torch.int32)
    capture = torch.randint(3, (rows + 1,), generator=random, dtype=torch.int32)
    policy = bank(n_slots, k, width, random, scale)
    return Case(
        draw(),
        *policy,
        slots,
        draw() if residual else None,
        torch.randn(3, width, generator=random),
        capture,
        torch.full((rows + 2, k), 7.0),
        torch.randn(rows + 1, generator=random) if strength else None,
    )


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    return make(
        rows=draw(st.integers(0, 9)),
        width=draw(st.sampled_from([4, 33, 64])),
        k=draw(st.integers(1, 3)),
        n_slots=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**31)),
        residual=draw(st.booleans()),
        apart=draw(st.booleans()),
        scale=draw(st.sampled_from([0.1, 3.0, 200.0])),
        strength=draw(st.booleans()),
    )


class TestFormula:
    @PROPERTY
    @given(cases())
    def test_rows_change_as_the_formula_says(self, case: Case) -> None:
        assert_close(case, run(case).hidden)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("width", "k"), [(576, 1), (1000, 3), (4096, 1), (4096, 3)])
    @pytest.mark.parametrize("residual", [True, False])
    def test_widths_of_real_models(self, dtype: torch.dtype, width: int, k: int, residual: bool) -> None:
        case = make(6, width, k, dtype=dtype, residual=residual, apart=k > 1)
        after = run(case)
        assert_close(case, after.hidden)
        assert not same_bits(after.hidden, case.hidden)

    @PROPERTY
    @given(cases())
    def test_untouched_rows_keep_their_bits(self, case: Case) -> None:
        after, (want, _) = run(case).hidden, plain(case)
        still = (want == case.hidden.double()).all(-1)
        assert same_bits(after[still], case.hidden[still])
        off = case.slots[: len(still)] == 0
        assert still[off].all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_lies_between_rows_keeps_its_bits(self, dtype: torch.dtype) -> None:
        case = make(dtype=dtype, apart=True)
        after = run(case)
        for t, now in ((case.hidden, after.hidden), (case.residual, after.residual)):
            assert same_bits(_whole(t)[_gaps(t)], _whole(now)[_gaps(t)])
        assert same_bits(_whole(case.residual), _whole(after.residual))

    def test_a_row_of_no_strength_is_only_bounded(self) -> None:
        case = make(strength=True)
        case.strength.fill_(0)
        assert same_bits(run(case).hidden, run(replace(case, strength=None, shift=0 * case.shift)).hidden)

    @PROPERTY
    @given(cases())
    def test_projections_are_taken_before_the_change(self, case: Case) -> None:
        after, (_, want) = run(case).projections, plain(case)
        rows = len(case.hidden)
        assert ((after[:rows].double() - want).abs() <= tolerance(case)).all()
        assert (after[:rows][case.slots[:rows] == 0] == 0).all()
        assert (after[rows:] == 7).all()  # beyond the rows

    @PROPERTY
    @given(cases())
    def test_sums_receive_what_was_written_and_collisions_add_up(self, case: Case) -> None:
        after = run(case)
        want = case.sums.double()
        for stream, place in zip(replace(after).stream, case.capture.tolist(), strict=False):
            if place:
                want[place] += stream
        size = want.abs() + after.stream.abs().sum(0)
        assert ((after.sums.double() - want).abs() <= 2.0**-21 * size).all()
        assert same_bits(after.sums[0], case.sums[0])

    def test_many_rows_of_one_place(self) -> None:
        case = replace(make(50), capture=torch.full((50,), 2, dtype=torch.int32), sums=torch.zeros(3, 64))
        after = run(case)
        torch.testing.assert_close(after.sums[2].double(), after.stream.sum(0), rtol=1e-5, atol=1e-4)
        assert not after.sums[:2].any()

    def test_a_row_does_not_depend_on_its_neighbours(self) -> None:
        case = make(9, 1000, dtype=torch.bfloat16)
        whole = run(case).hidden
        for row in range(9):
            alone = {n: getattr(case, n)[row : row + 1] for n in ("hidden", "residual", "slots", "capture")}
            assert same_bits(run(replace(case, **alone)).hidden[0], whole[row])

    def test_the_stream_is_not_rounded_before_it_is_projected(self) -> None:
        """256 + 0.5 is 256 in bfloat16."""
        hidden, residual = torch.tensor([[256.0, 1]]).bfloat16(), torch.tensor([[0.5, 1]]).bfloat16()
        one = torch.ones(1, dtype=torch.int32)
        case = Case(hidden, torch.eye(2)[:1].expand(2, 1, 2).contiguous(), *_bounds(2, lo=256.25), one, residual)
        assert same_bits(run(case).hidden, hidden)
        lifted = run(replace(case, lo=torch.full((2, 1), 260.5))).hidden
        assert lifted.tolist() == [[260, 1]]  # 256 + (260.5 - 256.5)

    def test_minus_zeros_of_a_row_with_only_unused_directions_stay(self) -> None:
        hidden = torch.tensor([[-0.0, 3.0]])
        case = Case(hidden, torch.zeros(2, 2, 2), *_bounds(2, k=2), torch.ones(1, dtype=torch.int32))
        assert same_bits(run(case).hidden, hidden)

    def test_a_batch_of_nothing_but_off_rows(self) -> None:
        case = make(6)
        after = run(replace(case, slots=torch.zeros(6, dtype=torch.int32)))
        assert same_bits(after.hidden, case.hidden)

    def test_not_a_number_stays_visible(self) -> None:
        case = make(4, n_slots=2)
        case.hidden[1, 3] = math.nan
        after = run(replace(case, slots=torch.ones(4, dtype=torch.int32))).hidden
        assert after[1].isnan().all()
        assert not after[[0, 2, 3]].isnan().any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_new_content_of_the_bank_counts_in_the_next_call(self, dtype: torch.dtype) -> None:
        case = make(dtype=dtype)
        for seed in (1, 2):
            case = replace(make(dtype=dtype, seed=seed), hidden=case.hidden, residual=case.residual)
            assert_close(case, run(case).hidden)

    @PROPERTY
    @given(cases(), st.booleans())
    def test_one_policy_out_of_place_is_the_formula_of_interventions(self, case: Case, deep: bool) -> None:
        slot = len(case.V) - 1
        policy = (case.V[slot], case.lo[slot], case.hi[slot], case.shift[slot])
        if slot == 0:
            policy = (torch.zeros_like(policy[0]), *(t[0] for t in _bounds(1, policy[0].shape[0])))
        hidden = case.hidden[None] if deep else case.hidden
        before = case.hidden.clone()
        after = run_one(hidden, *policy)
        assert after.is_contiguous()
        assert after.shape == hidden.shape
        assert same_bits(case.hidden, before)
        every = {name: t[None].expand(2, *t.shape).contiguous() for name, t in zip(POLICY, policy, strict=True)}
        ones = torch.ones(len(before), dtype=torch.int32)
        assert_close(replace(case, **every, slots=ones, residual=None), after.reshape(before.shape))
        used = policy[0].any(-1)
        if used.any():
            here = interventions.Intervention(0, *(t[used] for t in policy))
            torch.testing.assert_close(
                after.float(), interventions.apply(hidden, here).float(), rtol=ROUNDING[after.dtype], atol=2e-4
            )


POLICY = ("V", "lo", "hi", "shift")


def _bounds(n_slots: int, k: int = 1, lo: float = -math.inf) -> tuple[Tensor, Tensor, Tensor]:
    """``lo``, ``hi`` and ``shift`` of a bank."""
    return torch.full((n_slots, k), lo), torch.full((n_slots, k), math.inf), torch.zeros(n_slots, k)


# ---- the kernels ------------------------------------------------------------------------------------------------


def test_the_kernels_pass_the_same_tests_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestFormula"]
    command += [f"{__file__}::TestKernel"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


class TestKernel:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("slot", [-1, 5, 2**31 - 1])
    def test_a_slot_that_does_not_exist_makes_its_row_nan(self, slot: int) -> None:
        case = make()
        case.slots[2] = slot
        after = run(case).hidden
        assert after[2].isnan().all()
        assert not after[[0, 1, *range(3, 9)]].isnan().any()

    def test_so_does_a_place_that_does_not_exist(self) -> None:
        case = make()
        case.capture[4] = 3
        after = run(case)
        assert after.hidden[4].isnan().all()
        assert not after.sums.isnan().any()


# ---- what compilers keep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    case = make(4, 8, dtype=dtype, apart=True, strength=True)
    torch.library.opcheck(op.intervene_, tuple(vars(case).values()))
    policy = (case.V[3], case.lo[3], case.hi[3], case.shift[3])
    torch.library.opcheck(op.intervened, (case.hidden[None], *policy))


def test_opcheck_of_the_bare_operator() -> None:
    bare = replace(make(4, 8), residual=None, sums=None, capture=None, projections=None)
    torch.library.opcheck(op.intervene_, tuple(vars(bare).values()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_full_graph_reads_the_buffers_anew(backend: str) -> None:
    torch._dynamo.reset()
    case = make(dtype=torch.bfloat16)
    buffers = {name: t.clone() for name, t in vars(case).items() if t is not None and name != "hidden"}

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def step(x: Tensor) -> Tensor:
        x = x * 1
        op.intervene_(x, **buffers)
        return x * 1

    with torch.inference_mode():
        for seed in (1, 2, 3):
            fresh = replace(make(dtype=torch.bfloat16, seed=seed), hidden=case.hidden)
            for name, buffer in buffers.items():
                buffer.copy_(getattr(fresh, name))
            got, want = step(case.hidden), run(fresh)
            assert same_bits(got, want.hidden)
            assert same_bits(buffers["sums"], want.sums)
            assert same_bits(buffers["projections"], want.projections)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_full_graph_out_of_place(backend: str) -> None:
    torch._dynamo.reset()
    case = make()
    V, lo, hi, shift = (t[1].clone() for t in (case.V, case.lo, case.hi, case.shift))
    step = torch.compile(lambda x: op.intervened(x * 1, V, lo, hi, shift) * 1, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for floor in (-2.0, 2.0):
            lo.fill_(floor)
            assert same_bits(step(case.hidden), op.intervened(case.hidden, V, lo, hi, shift))


def test_autocast_does_not_reach_it() -> None:
    case = make()
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(case)
    assert same_bits(inside.hidden, run(case).hidden)


# ---- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.zeros(9, 64, dtype=torch.float64)}, r"hidden is torch\.float64"),
        ({"hidden": torch.zeros(1, 9, 64)}, r"hidden has shape \[1, 9, 64\]"),
        ({"hidden": torch.zeros(64, 9).T}, "hidden has strides"),
        ({"hidden": torch.zeros(1, 64).expand(9, 64)}, "hidden has strides"),
        ({"residual": torch.zeros(8, 64)}, r"residual has shape \[8, 64\]; \[9, 64\]"),
        ({"residual": torch.zeros(64, 9).T}, "residual has strides"),
        ({"residual": torch.zeros(9, 64, dtype=torch.int32)}, r"residual is torch\.int32"),
        ({"V": torch.zeros(2, 64)}, r"V has shape \[2, 64\]; \[slots, k, d_model\]"),
        ({"V": torch.zeros(5, 0, 64)}, "V has shape"),
        ({"V": torch.zeros(5, 2, 32)}, r"V has shape \[5, 2, 32\]; \[5, 2, 64\]"),
        ({"V": torch.zeros(5, 2, 64, dtype=torch.bfloat16)}, r"V is torch\.bfloat16"),
        ({"V": torch.zeros(5, 64, 2).mT}, "V is not contiguous"),
        ({"lo": torch.zeros(5)}, r"lo has shape \[5\]; \[5, 2\]"),
        ({"hi": torch.zeros(4, 2)}, r"hi has shape \[4, 2\]; \[5, 2\]"),
        ({"shift": torch.zeros(5, 2, dtype=torch.float64)}, r"shift is torch\.float64"),
        ({"slots": torch.zeros(8, dtype=torch.int32)}, r"slots has shape \[8\]; an entry for each of 9 rows"),
        ({"slots": torch.zeros(9, dtype=torch.int64)}, r"slots is torch\.int64"),
        ({"slots": torch.full((9,), 5, dtype=torch.int32)}, "slots holds numbers outside 0 to 4: 5 to 5"),
        ({"slots": torch.full((9,), -1, dtype=torch.int32)}, "slots holds numbers outside 0 to 4: -1 to -1"),
        ({"capture": None}, "sums and capture belong together"),
        ({"sums": None}, "sums and capture belong together"),
        ({"sums": torch.zeros(3, 32)}, r"sums has shape \[3, 32\]; \[3, 64\]"),
        ({"capture": torch.full((9,), 3, dtype=torch.int32)}, "capture holds numbers outside 0 to 2"),
        ({"projections": torch.zeros(9, 3)}, r"projections has shape \[9, 3\]; \[9, 2\]"),
        ({"strength": torch.zeros(8)}, r"strength has shape \[8\]; an entry for each of 9 rows"),
        ({"strength": torch.zeros(9, dtype=torch.float64)}, r"strength is torch\.float64"),
    ],
)
def test_arguments_that_do_not_fit(wrong: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        op.intervene_(**(vars(make()) | wrong))


def test_tensors_of_two_devices() -> None:
    with pytest.raises(UsageError, match="lo is on meta, hidden on cpu"):
        op._check("lo", torch.zeros(2, device="meta"), torch.zeros(1, 3), (torch.float32,), (2,))


def test_arguments_of_one_policy_that_do_not_fit() -> None:
    hidden, V, bounds = torch.zeros(3, 8), torch.zeros(1, 8), [t[0] for t in _bounds(1)]
    with pytest.raises(UsageError, match=r"V has shape \[8\]; \[k, d_model\]"):
        op.intervened(hidden, V[0], *bounds)
    with pytest.raises(UsageError, match=r"lo has shape \[2\]; \[1\]"):
        op.intervened(hidden, V, torch.zeros(2), *bounds[1:])
    with pytest.raises(UsageError, match="a single number"):
        op.intervened(torch.tensor(1.0), V, *bounds)
