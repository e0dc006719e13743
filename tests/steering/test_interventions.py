"""The intervention formula as mathematics: identities, bounds, and which bits may change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_axis.errors import UsageError
from persona_axis.steering.interventions import (
    Intervention,
    ablate,
    add,
    apply,
    band,
    cap,
    mean_ablate,
    orthonormal,
)

# A rounding of the result moves a projection by at most this share of the residual's length.
ROUNDING = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-8}
DTYPES = list(ROUNDING)


@dataclass(frozen=True, eq=False)
class Case:
    hidden: Tensor  # [batch, tokens, d_model]
    directions: Tensor  # [k, d_model]


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    width, k = draw(st.sampled_from([4, 33, 64])), draw(st.integers(1, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = draw(st.sampled_from([0.1, 3.0, 200.0])) * torch.randn(2, 7, width, generator=random)
    hidden[..., ::3] *= 0  # zeros of both signs, which adding nothing would not keep
    hidden[0] *= -1
    directions = torch.randn(k, width, generator=random) * draw(st.sampled_from([0.01, 1.0, 50.0]))
    return Case(hidden.to(draw(st.sampled_from(DTYPES))), directions)


def projections(hidden: Tensor, intervention: Intervention) -> Tensor:
    return hidden.float() @ intervention.V.T


def tolerance(*hidden: Tensor) -> Tensor:
    """How far rounding may put a projection, ``[..., 1]``."""
    return ROUNDING[hidden[0].dtype] * sum(h.float().norm(dim=-1, keepdim=True) for h in hidden) + 1e-6


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def one_direction(width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


PROPERTY = settings(max_examples=40, deadline=None)


# ---- identity ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(cases())
def test_no_strength_is_the_identity_bit_for_bit(case: Case) -> None:
    assert same_bits(apply(case.hidden, add(0, case.directions, 0.0)), case.hidden)


@PROPERTY
@given(cases())
def test_bounds_that_nothing_crosses_are_the_identity_bit_for_bit(case: Case) -> None:
    far = 2 * float(case.hidden.float().norm(dim=-1).max()) + 1
    assert same_bits(apply(case.hidden, band(0, case.directions, -far, far)), case.hidden)
    assert same_bits(apply(case.hidden, cap(0, case.directions, -math.inf)), case.hidden)


@PROPERTY
@given(cases(), st.floats(-1, 1))
def test_rows_above_the_floor_keep_their_bits_and_the_others_move(case: Case, quantile: float) -> None:
    here = cap(0, case.directions, 0.0)
    p = projections(case.hidden, here)
    floor = float(p.abs().max()) * quantile
    here = cap(0, case.directions, floor)
    below = (p < floor).any(-1)
    after = apply(case.hidden, here)
    assert same_bits(after[~below], case.hidden[~below])
    clearly = (p < floor - 2 * tolerance(case.hidden)).any(-1)
    assert (after != case.hidden).any(-1)[clearly].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zeros_of_an_untouched_row_stay_while_its_neighbour_is_capped(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[-0.0, 3.0, -0.0], [-0.0, -3.0, -0.0]], dtype=dtype)
    after = apply(hidden, cap(0, torch.tensor([0.0, 1, 0]), 1.0))
    assert same_bits(after[0], hidden[0])
    assert after[1].tolist() == [0, 1, 0]


# ---- what each constructor does ---------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.floats(-2, 2))
def test_a_cap_lifts_to_its_floor_and_never_below(case: Case, relative: float) -> None:
    here = cap(0, case.directions, 0.0)
    before = projections(case.hidden, here)
    floor = relative * float(before.abs().mean())
    here = cap(0, case.directions, floor)
    after = apply(case.hidden, here)
    assert after.dtype == case.hidden.dtype
    slack = tolerance(case.hidden, after)
    p = projections(after, here)
    assert (p >= floor - slack).all()
    assert ((p - before.clamp(min=floor)).abs() <= slack).all()  # nor any higher than needed


@PROPERTY
@given(cases(), st.floats(-2, 2), st.floats(0, 2))
def test_a_band_holds_both_ends(case: Case, low: float, gap: float) -> None:
    scale = float(projections(case.hidden, ablate(0, case.directions)).abs().mean())
    lo, hi = low * scale, (low + gap) * scale
    here = band(0, case.directions, lo, hi)
    before = projections(case.hidden, here)
    after = apply(case.hidden, here)
    slack = tolerance(case.hidden, after)
    assert ((projections(after, here) - before.clamp(lo, hi)).abs() <= slack).all()


@PROPERTY
@given(cases(), st.floats(-50, 50))
def test_ablation_leaves_no_component_and_mean_ablation_the_mean(case: Case, mean: float) -> None:
    for here, left in ((ablate(0, case.directions), 0.0), (mean_ablate(0, case.directions, mean), mean)):
        after = apply(case.hidden, here)
        assert ((projections(after, here) - left).abs() <= tolerance(case.hidden, after)).all()


@PROPERTY
@given(cases(), st.floats(-100, 100))
def test_add_shifts_every_projection_by_the_strength(case: Case, strength: float) -> None:
    here = add(0, case.directions, strength)
    after = apply(case.hidden, here)
    shifted = projections(after, here) - projections(case.hidden, here)
    assert ((shifted - strength).abs() <= tolerance(case.hidden, after)).all()


@PROPERTY
@given(cases(), st.sampled_from(["cap", "ablate", "add"]))
def test_nothing_moves_across_the_directions(case: Case, kind: str) -> None:
    assume(case.hidden.dtype == torch.float32)
    here = {
        "cap": cap(0, case.directions, 1.0),
        "ablate": ablate(0, case.directions),
        "add": add(0, case.directions, 2),
    }
    V = here[kind].V
    after = apply(case.hidden, here[kind])
    moved = after - case.hidden
    across = moved - (moved @ V.T) @ V
    assert (across.norm(dim=-1, keepdim=True) <= 8 * tolerance(case.hidden, after)).all()
    assert moved.abs().max() > 0


@PROPERTY
@given(cases(), st.floats(-2, 2))
def test_holding_twice_is_holding_once(case: Case, floor: float) -> None:
    for here in (
        cap(0, case.directions, floor),
        band(0, case.directions, floor, floor + 1),
        ablate(0, case.directions),
    ):
        once = apply(case.hidden, here)
        twice = apply(once, here)
        # The second time there is only rounding to mend: at most a rounding of every coordinate.
        assert ((twice.float() - once.float()).norm(dim=-1, keepdim=True) <= 4 * tolerance(case.hidden, once)).all()


def test_the_formula_in_float64() -> None:
    """Bounds and shifts of their own for each of three directions."""
    random = torch.Generator().manual_seed(1)
    V = orthonormal(torch.randn(3, 16, generator=random))
    lo, hi = torch.tensor([-1.0, 0.5, -math.inf]), torch.tensor([0.5, math.inf, 2.0])
    shift = torch.tensor([0.0, -3.0, 0.25])
    hidden = 3 * torch.randn(2, 5, 16, generator=random)
    h, v = hidden.double().numpy(), V.double().numpy()
    p = h @ v.T
    expected = h + (np.clip(p, lo.numpy(), hi.numpy()) - p + shift.numpy()) @ v
    np.testing.assert_allclose(apply(hidden, Intervention(0, V, lo, hi, shift)).numpy(), expected, atol=1e-5)


def test_the_projection_is_on_the_normalised_direction() -> None:
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(2))
    direction = one_direction()
    torch.testing.assert_close(apply(hidden, cap(0, 25 * direction, 1.0)), apply(hidden, cap(0, direction, 1.0)))
    torch.testing.assert_close(apply(hidden, add(0, 25 * direction, 1.0)), hidden + direction / direction.norm())


def test_the_reference_clamps_the_negated_axis_from_above() -> None:
    """Its cap ``c`` on ``role - default`` is our floor ``-c`` on ``default - role``."""
    hidden = torch.randn(30, 8, generator=torch.Generator().manual_seed(3))
    direction, c = one_direction(), 0.3
    ours = apply(hidden, cap(0, direction, -c))
    torch.testing.assert_close(ours, apply(hidden, band(0, -direction, -math.inf, c)))
    assert 0 < (ours != hidden).any(-1).sum() < 30


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 5, 8)])
def test_any_number_of_dimensions_in_front(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    here = ablate(0, one_direction())
    flat = torch.stack([apply(row, here) for row in hidden.reshape(-1, 8)])
    torch.testing.assert_close(apply(hidden, here), flat.reshape(shape))


def test_the_input_is_not_written_to() -> None:
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(5))
    copy = hidden.clone()
    assert not torch.equal(apply(hidden, ablate(0, one_direction())), copy)
    assert torch.equal(hidden, copy)


def test_half_precision_is_computed_in_float32() -> None:
    """As good as the float32 result, rounded once."""
    hidden = (20 * torch.randn(50, 64, generator=torch.Generator().manual_seed(6))).bfloat16()
    here = cap(0, one_direction(64), 5.0)
    assert same_bits(apply(hidden, here), apply(hidden.float(), here).bfloat16())


# ---- some rows, each with bounds of its own -----------------------------------------------------------------------


@st.composite
def masks(draw: Callable[..., Any]) -> Tensor:
    return torch.tensor(draw(st.lists(st.booleans(), min_size=14, max_size=14))).reshape(2, 7)


@PROPERTY
@given(cases(), masks(), st.sampled_from(["cap", "band", "ablate", "add"]))
def test_rows_that_are_not_meant_keep_their_bits(case: Case, where: Tensor, kind: str) -> None:
    here = {
        "cap": cap(0, case.directions, 1.0),
        "band": band(0, case.directions, -0.1, 0.1),
        "ablate": ablate(0, case.directions),
        "add": add(0, case.directions, 300.0),
    }[kind]
    after, every = apply(case.hidden, here, where), apply(case.hidden, here)
    assert same_bits(after[~where], case.hidden[~where])
    assert same_bits(after[where], every[where])


@PROPERTY
@given(cases(), st.data())
def test_bounds_of_each_sequence_are_bounds_of_it_alone(case: Case, data: Any) -> None:
    k = len(case.directions)
    numbers = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=k, max_size=k), min_size=2, max_size=2)
    lo, shift = torch.tensor(data.draw(numbers)), torch.tensor(data.draw(numbers))
    V = orthonormal(case.directions)
    hi = torch.full((k,), 20.0)  # one for all sequences
    here = Intervention(0, V, lo, hi, shift)
    assert here.batch == 2
    together = apply(case.hidden, here)
    for i in range(2):
        alone = Intervention(0, V, lo[i], hi, shift[i])
        assert alone.batch is None
        expected = apply(case.hidden[i : i + 1], alone)  # other sums of other batches, rounded otherwise
        difference = (together[i : i + 1].float() - expected.float()).norm(dim=-1, keepdim=True)
        assert (difference <= 4 * tolerance(case.hidden[i : i + 1], expected)).all()


@PROPERTY
@given(cases(), st.data())
def test_each_direction_has_its_own_bounds(case: Case, data: Any) -> None:
    k = len(case.directions)
    scale = float(projections(case.hidden, ablate(0, case.directions)).abs().mean())
    lo = data.draw(st.lists(st.one_of(st.just(-math.inf), st.floats(-2, 2)), min_size=k, max_size=k))
    lo = [scale * value for value in lo]
    hi = [max(value, scale) for value in lo]
    here = band(0, case.directions, lo, hi)
    before = projections(case.hidden, here)
    after = apply(case.hidden, here)
    kept = ((before >= here.lo) & (before <= here.hi)).all(-1)
    assert same_bits(after[kept], case.hidden[kept])
    slack = tolerance(case.hidden, after)
    assert ((projections(after, here) - before.clamp(here.lo, here.hi)).abs() <= slack).all()


@PROPERTY
@given(cases(), st.floats(-3, 3), st.floats(0.01, 30))
def test_a_strength_in_norms_is_a_raw_one(case: Case, strength: float, norm: float) -> None:
    in_norms = apply(case.hidden, add(0, case.directions, strength, norm))
    raw = add(0, case.directions, float(torch.tensor(strength) * norm))
    assert same_bits(in_norms, apply(case.hidden, raw))


# ---- what is not a number -----------------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.sampled_from([math.nan, math.inf, -math.inf]), st.sampled_from(["cap", "band", "ablate", "add"]))
def test_nan_and_infinity_are_not_hidden(case: Case, number: float, kind: str) -> None:
    """A row that holds one never becomes finite, and no other row does because of it."""
    here = {
        "cap": cap(0, case.directions, 1.0),
        "band": band(0, case.directions, -0.1, 0.1),
        "ablate": ablate(0, case.directions),
        "add": add(0, case.directions, 3.0),
    }[kind]
    spoilt = case.hidden.clone()
    spoilt[1, 3, 2] = number
    after = apply(spoilt, here)
    assert not after[1, 3].isfinite().all()
    if math.isnan(number):
        assert after[1, 3].isnan().all()  # the projection is NaN, and every direction carries it
    others = torch.ones(2, 7, dtype=torch.bool)
    others[1, 3] = False
    assert same_bits(after[others], apply(case.hidden, here)[others])
    assert same_bits(apply(spoilt, here, others)[~others], spoilt[~others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_it(dtype: torch.dtype) -> None:
    hidden = (20 * torch.randn(50, 64, generator=torch.Generator().manual_seed(6))).to(dtype)
    here = cap(0, one_direction(64), 5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = apply(hidden, here)
    assert same_bits(inside, apply(hidden, here))


# ---- directions -------------------------------------------------------------------------------------------------


@PROPERTY
@given(cases())
def test_rows_are_gram_schmidt_in_the_order_given(case: Case) -> None:
    rows = case.directions.double().numpy()
    expected: list[np.ndarray] = []
    for row in rows:
        for done in expected:
            row = row - (row @ done) * done
        expected.append(row / np.linalg.norm(row))
    V = orthonormal(case.directions)
    assert V.dtype == torch.float32
    assert V.is_contiguous()
    np.testing.assert_allclose(V.numpy(), np.array(expected), atol=2e-4)
    torch.testing.assert_close(V @ V.T, torch.eye(len(V)), rtol=0, atol=1e-5)


def test_one_direction_keeps_its_sign() -> None:
    for direction in (one_direction(), -one_direction()):
        torch.testing.assert_close(orthonormal(direction), (direction / direction.norm())[None])
        assert orthonormal(direction.bfloat16()).dtype == torch.float32


@PROPERTY
@given(seed=st.integers(0, 2**31), width=st.sampled_from([3, 8, 64, 576]), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_dependent_rows_are_refused(seed: int, width: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = scale * torch.randn(2, width, generator=random)
    mixed = torch.randn(1, 2, generator=random) @ rows
    for directions in (torch.cat([rows, mixed]), torch.cat([rows, rows[:1]]), torch.cat([rows, 0 * rows[:1]])):
        with pytest.raises(UsageError, match="zero or linearly dependent"):
            orthonormal(directions)


@pytest.mark.parametrize("rows", [torch.zeros(8), torch.zeros(2, 8)])
def test_zero_directions_are_refused(rows: Tensor) -> None:
    with pytest.raises(UsageError, match="zero or linearly dependent"):
        cap(0, rows, 1.0)


@pytest.mark.parametrize("shape", [(0, 8), (5, 4), (2, 2, 8), ()])
def test_no_directions_and_more_than_there_are_dimensions_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"Directions of shape \(.*\) cannot be made orthonormal"):
        cap(0, torch.randn(shape, generator=torch.Generator().manual_seed(7)), 1.0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_directions_that_are_not_finite_are_refused(number: float) -> None:
    for directions in (torch.tensor([1.0, number, 0]), torch.tensor([[1.0, 0, 0], [0, number, 1]])):
        with pytest.raises(UsageError, match="A direction holds NaN or infinity"):
            add(0, directions, 1.0)
        V = directions.reshape(-1, 3)
        with pytest.raises(UsageError, match="Layer 4: a direction holds NaN or infinity"):
            Intervention(4, V, *(torch.zeros(len(V)) for _ in range(3)))


@PROPERTY
@given(cases(), st.floats(-3, 3))
def test_bounds_are_of_the_orthonormal_directions(case: Case, lo: float) -> None:
    """The second direction without its part along the first, and so on; the order given decides."""
    k = len(case.directions)
    floors = torch.linspace(lo, lo + 2, k)
    after = apply(case.hidden, cap(0, case.directions, floors))
    V = orthonormal(case.directions)
    torch.testing.assert_close(
        apply(case.hidden, Intervention(0, V, floors, torch.full((k,), math.inf), torch.zeros(k))), after
    )
    p = after.float() @ V.T
    assert (p >= floors - tolerance(case.hidden, after)).all()
    for i in range(k):  # the first i directions alone span what the first i rows do
        torch.testing.assert_close(orthonormal(case.directions[: i + 1]), V[: i + 1], rtol=0, atol=2e-4)


# ---- validation -------------------------------------------------------------------------------------------------


def test_rows_that_are_not_orthonormal_are_refused() -> None:
    bounds = torch.zeros(2)
    skew = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0]])
    for V in (skew, 2 * torch.eye(3)[:2], torch.zeros(2, 3)):
        with pytest.raises(UsageError, match="Layer 3: the rows of V are not orthonormal"):
            Intervention(3, V, bounds, bounds, bounds)
    Intervention(3, torch.eye(3)[:2], bounds, bounds, bounds)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 2, 3)])
def test_directions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"Layer 0: the directions have shape .* \[k, d_model\] is expected"):
        Intervention(0, torch.ones(shape), *(torch.zeros(3) for _ in range(3)))


@pytest.mark.parametrize(
    "shapes",
    [
        [(1,), (2,), (2,)],
        [(2,), (), (2,)],
        [(2,), (2,), (2, 1)],
        [(3, 2), (4, 2), (2,)],
        [(1, 2), (3, 2), (2,)],  # would broadcast
        [(5, 3, 2), (2,), (2,)],
        [(2,), (2,), (3,)],
    ],
)
def test_bounds_of_another_shape_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match=r"a value for each of the 2 directions, \[2\] or \[batch, 2\]; got"):
        Intervention(0, torch.eye(3)[:2], *(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("bound", [[1.0, 2.0], torch.zeros(3), torch.zeros(2, 3), [[0.0, 1.0]]])
def test_bounds_for_more_directions_than_there_are_are_refused(bound: Any) -> None:
    with pytest.raises(UsageError, match="for each of the 1 directions"):
        cap(0, one_direction(), bound)
    with pytest.raises(UsageError, match="for each of the 1 directions"):
        add(0, one_direction(), bound)


def test_other_dtypes_are_refused() -> None:
    parts = [torch.eye(3)[:1], *(torch.zeros(1) for _ in range(3))]
    for i in range(4):
        wrong = [t.double() if i == j else t for j, t in enumerate(parts)]
        with pytest.raises(UsageError, match="Layer 2: V, lo, hi and shift must be float32"):
            Intervention(2, *wrong)


@pytest.mark.parametrize(
    ("lo", "hi", "message"),
    [
        (1.0, 0.5, "a lower bound lies above its upper bound"),
        ([0.0, 1.0], [1.0, 0.5], "a lower bound lies above its upper bound"),
        ([[0.0, 1.0], [0.0, 3.0]], 2.0, "a lower bound lies above its upper bound"),
        (math.nan, 1.0, "a bound is NaN"),
        (0.0, [1.0, math.nan], "a bound is NaN"),
        (math.inf, math.inf, "leaves no value"),
        (-math.inf, -math.inf, "leaves no value"),
        ([0.0, math.inf], math.inf, "leaves no value"),
    ],
)
def test_bounds_without_a_value_between_them_are_refused(lo: Any, hi: Any, message: str) -> None:
    directions = torch.eye(8)[:2]
    with pytest.raises(UsageError, match=f"Layer 5: .*{message}"):
        band(5, directions, lo, hi)
    if hi == math.inf:
        with pytest.raises(UsageError, match=f"Layer 5: .*{message}"):
            cap(5, directions, lo)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_would_spoil_the_stream_is_refused(number: float) -> None:
    with pytest.raises(UsageError, match="Layer 5: a shift is not finite"):
        add(5, one_direction(), number)
    with pytest.raises(UsageError, match="Layer 5: a shift is not finite"):
        add(5, one_direction(), torch.tensor([[0.0], [number]]))
    with pytest.raises(UsageError, match=r"Layer 5: .*(bound is NaN|leaves no value)"):
        mean_ablate(5, one_direction(), number)


@pytest.mark.parametrize("norm", [0.0, -2.0, math.nan, math.inf])
def test_a_norm_that_is_no_unit_is_refused(norm: float) -> None:
    with pytest.raises(UsageError, match=r"Layer 5: a residual norm of .* is no unit"):
        add(5, one_direction(), 1.0, norm)


def test_bounds_are_a_copy() -> None:
    """Interventions do not change when what they were made from does."""
    floor, strength = torch.zeros(1), torch.ones(3, 1)
    here, there = cap(0, one_direction(), floor), add(0, one_direction(), strength)
    floor += 1
    strength += 1
    assert here.lo.tolist() == [0]
    assert there.shift.tolist() == [[1]] * 3


def test_moving_keeps_everything() -> None:
    here = band(4, one_direction(), -1.0, 2.0)
    there = here.to(torch.device("cpu"))
    assert there.layer == 4
    for name in ("V", "lo", "hi", "shift"):
        assert torch.equal(getattr(there, name), getattr(here, name))
        assert getattr(here.to(torch.device("meta")), name).device.type == "meta"
        assert getattr(here, name).device.type == "cpu"
