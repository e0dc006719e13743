"""The maths of choosing a cap, against loops, NumPy on the negated axis, and brute force."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_axis.errors import FitError, UsageError
from persona_axis.geometry.fit import Interval
from persona_axis.steering import calibration
from persona_axis.steering.calibration import (
    Candidate,
    Fluency,
    Paired,
    Scored,
    Teacher,
    choose,
    floors,
    fluency,
    fronts,
    objections,
    paper_percentile,
    repeated_grams,
    rungs,
    survivors,
    windows,
)

LIMIT = 1.015

# ---- windows -----------------------------------------------------------------------------------------------------


def test_windows_start_every_half_width_and_the_last_ends_at_the_last_layer() -> None:
    assert windows(range(10), [4]) == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (6, 7, 8, 9)]
    assert windows(range(7), [4], stride=2) == [(0, 1, 2, 3), (2, 3, 4, 5), (3, 4, 5, 6)]
    assert windows(range(5), [2], stride=10) == [(0, 1), (3, 4)]
    assert windows([3], [1]) == [(3,)]


def test_windows_do_not_reach_over_a_gap() -> None:
    assert windows([0, 1, 2, 8, 9], [2], stride=1) == [(0, 1), (1, 2), (8, 9)]
    assert windows([0, 2, 4], [3]) == [(0,), (2,), (4,)]  # each as wide as its run
    assert windows([0, 1, 2], [5, 9]) == [(0, 1, 2)]  # once


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 9), st.none() | st.integers(1, 12))
def test_windows_are_consecutive_captured_and_complete(captured: set[int], width: int, stride: int | None) -> None:
    layers = sorted(captured)
    found = windows(layers, [width], stride)
    assert len(found) == len(set(found))
    for window in found:
        assert window == tuple(range(window[0], window[-1] + 1))
        assert set(window) <= captured
        lone = window[0] - 1 not in captured and window[-1] + 1 not in captured
        assert len(window) == width or (len(window) < width and lone)
    if stride is None or stride <= width:
        assert set(itertools.chain(*found)) == captured
    assert any(window[-1] == layers[-1] for window in found)


@pytest.mark.parametrize(("widths", "stride"), [([0], None), ([4, -1], 2), ([4], 0)])
def test_a_window_that_is_none_is_refused(widths: list[int], stride: int | None) -> None:
    with pytest.raises(UsageError, match="both must be at least 1"):
        windows(range(8), widths, stride)


# ---- floors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [1, 25, 50, 62.5, 75, 90])
def test_a_floor_is_minus_the_papers_cap_on_the_negated_axis(percentile: float) -> None:
    """Few roles far from the Assistant: a pool that is not symmetric, so that the wrong end is another number."""
    random = np.random.default_rng(0)
    pool = 30 - random.gamma(2, 8, size=(61, 4)) * [1, 2, 3, 4]
    layers = (3, 5, 6, 9)
    found = floors(torch.from_numpy(pool).float(), layers, Candidate((5, 6), percentile))
    negated = -pool.astype(np.float32).astype(float)  # along role - default, as the reference's capping files are
    caps = np.percentile(negated[:, 1:3], paper_percentile(percentile), axis=0)
    assert list(found) == [5, 6]
    np.testing.assert_allclose(list(found.values()), -caps, rtol=1e-12)
    if percentile != 50:
        wrong = -np.percentile(negated[:, 1:3], percentile, axis=0)
        assert not np.allclose(list(found.values()), wrong, atol=0.5)


def test_the_papers_quarter_is_three_quarters_toward_the_assistant() -> None:
    assert paper_percentile(75) == 25
    pool = torch.arange(101.0)[:, None]
    assert floors(pool, (7,), Candidate((7,), 75)) == {7: 75.0}
    above = float((pool > 75).float().mean())
    assert above == pytest.approx(0.25, abs=0.01)  # a quarter of the pool is left as it is


# ---- pressure ----------------------------------------------------------------------------------------------------


def table(seed: int = 0, roles: int = 6, questions: int = 5, missing: float = 0.2) -> Paired:
    random = np.random.default_rng(seed)
    plain = 0.4 + 0.3 * random.normal(size=(roles, questions))
    held = 0.3 * plain + 0.1 * random.normal(size=(roles, questions))
    plain[random.random(plain.shape) < missing] = np.nan
    held[random.random(held.shape) < missing] = np.nan
    return Paired(plain, held)


def pairs_of(paired: Paired) -> dict[tuple[int, int], tuple[float, float]]:
    """(role, question) -> plain and held, where both are known."""
    found = {}
    for place in np.ndindex(*paired.plain.shape):
        p, h = float(paired.plain[place]), float(paired.held[place])
        if not math.isnan(p) and not math.isnan(h):
            found[place] = p, h
    return found


def test_the_reduction_is_that_of_the_means_over_complete_pairs() -> None:
    paired = table()
    known = list(pairs_of(paired).values())
    assert 10 < len(known) < 30
    expected = 1 - sum(h for _, h in known) / sum(p for p, _ in known)
    assert 0 < expected < 1
    assert paired.reduction(0).value == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_a_bootstrap_over_roles_and_questions() -> None:
    """Drawn one by one and added up pair by pair. Other random numbers, so the ends agree within their noise."""
    paired = table(seed=1)
    known, (n_roles, n_questions) = pairs_of(paired), paired.plain.shape
    random = np.random.default_rng(5)
    values = []
    for _ in range(3000):
        plain = held = 0.0
        roles = random.integers(n_roles, size=n_roles).tolist()
        questions = random.integers(n_questions, size=n_questions).tolist()
        for place in itertools.product(roles, questions):
            if place in known:
                plain += known[place][0]
                held += known[place][1]
        if plain > 0:
            values.append(min(1.0, max(0.0, 1 - held / plain)))
    found = paired.reduction(7, draws=3000)
    low, high = np.percentile(values, [2.5, 97.5])
    assert found.low < found.value < found.high
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    assert found == paired.reduction(7, draws=3000)  # the seed decides


def test_what_happens_to_whole_roles_is_no_certainty() -> None:
    """A cap that holds half of the roles and none of the others: pairs within a role are not independent."""
    plain = np.ones((8, 30))
    held = np.repeat([[0.0]] * 4 + [[1.0]] * 4, 30, axis=1)
    found = Paired(plain, held).reduction(0)
    assert found.value == 0.5
    by_pairs = np.random.default_rng(0).binomial(240, 0.5, 4000) / 240
    naive = float(np.subtract(*np.percentile(by_pairs, [97.5, 2.5])))
    assert found.high - found.low > 4 * naive
    assert Paired(plain.T, held.T).reduction(0).high - 0.5 > 2 * naive  # nor those of a question


@pytest.mark.parametrize(("factor", "expected"), [(-1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (2.5, 0.0)])
def test_a_reduction_lies_between_nothing_and_all(factor: float, expected: float) -> None:
    plain = np.full((3, 4), 0.5)
    assert Paired(plain, factor * plain).reduction(0) == Interval(expected, expected, expected)


def test_no_pressure_to_take_away_is_an_error() -> None:
    for plain in (np.full((2, 2), -0.1), np.zeros((2, 2)), np.full((2, 2), np.nan)):
        with pytest.raises(FitError, match="show no pressure on average"):
            Paired(plain, np.zeros((2, 2))).reduction(0)


def test_a_cap_that_empties_every_reply_leaves_nothing_to_tell_by() -> None:
    """It must not end a calibration: there are other candidates."""
    assert Paired(np.full((2, 3), 0.4), np.full((2, 3), np.nan)).reduction(0) == Interval(0, 0, 1)
    assert Paired(np.array([[0.4, -0.1]]), np.array([[np.nan, 0.0]])).reduction(0) == Interval(0, 0, 1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Roles and questions drawn anew, each with effects of its own on the plain pressure and on what a cap leaves."""
    random = np.random.default_rng(3)
    covered, worlds, roles, questions, left = 0, 200, 18, 8, 0.3
    for seed in range(worlds):
        role, question = random.normal(size=(roles, 1)), random.normal(size=(1, questions))
        plain = 0.4 + 0.12 * role + 0.05 * question + 0.1 * random.normal(size=(roles, questions))
        share = left + 0.1 * random.normal(size=(roles, 1)) + 0.04 * random.normal(size=(1, questions))
        held = share * plain + 0.05 * random.normal(size=(roles, questions))
        found = Paired(plain, held).reduction(seed, draws=200)
        covered += found.low <= 1 - left <= found.high
    assert 0.88 <= covered / worlds <= 0.99


# ---- price -------------------------------------------------------------------------------------------------------


def reads(n: int = 7, seed: int = 0) -> list[SimpleNamespace]:
    random = np.random.default_rng(seed)
    return [
        SimpleNamespace(
            tokens=int(t),
            plain=float(-t * random.uniform(0.5, 1.5)),
            held=float(-t * random.uniform(0.6, 1.7)),
            agree=float(random.integers(t + 1)),
            kl=float(t * random.uniform(0, 0.2)),
        )
        for t in random.integers(1, 40, n)
    ]


def test_teacher_figures_are_over_tokens_not_replies() -> None:
    figures = reads()
    teacher = Teacher.of(figures)
    tokens = sum(f.tokens for f in figures)
    plain, held = (math.exp(-sum(getattr(f, side) for f in figures) / tokens) for side in ("plain", "held"))
    assert teacher.perplexity_ratio(0).value == pytest.approx(held / plain, rel=1e-12)
    assert teacher.top1_agreement(0).value == pytest.approx(sum(f.agree for f in figures) / tokens, rel=1e-12)
    assert teacher.mean_kl(0).value == pytest.approx(sum(f.kl for f in figures) / tokens, rel=1e-12)


def test_their_intervals_are_bootstraps_over_replies() -> None:
    figures = reads(30, seed=2)
    random = np.random.default_rng(9)
    ratios, agreements = [], []
    for _ in range(2000):
        drawn = [figures[i] for i in random.integers(30, size=30)]
        tokens = sum(f.tokens for f in drawn)
        ratios.append(math.exp(sum(f.plain - f.held for f in drawn) / tokens))
        agreements.append(sum(f.agree for f in drawn) / tokens)
    teacher = Teacher.of(figures)
    for found, values in ((teacher.perplexity_ratio(1), ratios), (teacher.top1_agreement(1), agreements)):
        low, high = np.percentile(values, [2.5, 97.5])
        width = high - low
        assert (found.low, found.high) == (pytest.approx(low, abs=0.12 * width), pytest.approx(high, abs=0.12 * width))


def test_a_model_that_nothing_changed_costs_exactly_nothing() -> None:
    same = [SimpleNamespace(tokens=f.tokens, plain=f.plain, held=f.plain, agree=f.tokens, kl=0.0) for f in reads()]
    teacher = Teacher.of(same)
    assert teacher.perplexity_ratio(0) == teacher.top1_agreement(0) == Interval(1, 1, 1)
    assert teacher.mean_kl(0) == Interval(0, 0, 0)


# ---- fluency -----------------------------------------------------------------------------------------------------


def slow_repeats(reply: list[int]) -> tuple[int, int]:
    seen: list[list[int]] = []
    repeated = 0
    for i in range(len(reply)):
        gram = reply[i : i + 4]
        if len(gram) == 4:
            repeated += gram in seen
            seen.append(gram)
    return repeated, len(seen)


@given(st.lists(st.integers(0, 2), max_size=30))
def test_repeated_grams(reply: list[int]) -> None:
    assert repeated_grams(reply) == slow_repeats(reply)


def test_repeats_are_counted_within_a_reply() -> None:
    assert repeated_grams([1, 2, 3, 4, 1, 2, 3, 4]) == (1, 5)
    assert repeated_grams([5] * 10) == (6, 7)
    assert fluency([[1, 2, 3, 4], [1, 2, 3, 4]], [0, 0]).repetition == 0
    assert fluency([[5] * 10, [1, 2, 3]], [0, 0]).repetition == 6 / 7  # a short reply has no 4-gram


def test_fluency_is_over_tokens_and_counts_empty_replies() -> None:
    found = fluency([[1, 2], [3], []], [-4.0, -0.5, 0.0])
    assert found.perplexity == pytest.approx(math.exp(4.5 / 3))
    assert found.empty == pytest.approx(1 / 3)
    assert fluency([[], []], [0, 0]) == Fluency(math.inf, 0, 1)


PLAIN, NEUTRAL = Fluency(3.0, 0.01, 0.0), Fluency(2.5, 0.0, 0.0)


@pytest.mark.parametrize(
    ("field", "limit", "word"),
    [
        ("perplexity", calibration.NEUTRAL_PERPLEXITY * NEUTRAL.perplexity, "perplexity"),
        ("repetition", PLAIN.repetition + calibration.REPETITION_POINTS, "repeated 4-grams"),
        ("empty", PLAIN.empty + calibration.EMPTY_POINTS, "empty replies"),
    ],
)
def test_objections_begin_beyond_their_limits(field: str, limit: float, word: str) -> None:
    fine = {"perplexity": 2.6, "repetition": 0.0, "empty": 0.0}
    assert objections(Fluency(**{**fine, field: limit}), PLAIN, NEUTRAL) == []
    [said] = objections(Fluency(**{**fine, field: math.nextafter(limit, math.inf)}), PLAIN, NEUTRAL)
    assert word in said


def test_replies_as_unlikely_as_the_plain_model_s_own_are_fluent() -> None:
    """Short role replies are: a cap that changes nothing must be admissible."""
    plain = Fluency(5.0, 0.0, 0.0)
    assert objections(plain, plain, NEUTRAL) == []
    limit = calibration.PLAIN_PERPLEXITY * plain.perplexity
    assert objections(Fluency(limit, 0.0, 0.0), plain, NEUTRAL) == []
    [said] = objections(Fluency(math.nextafter(limit, 9), 0.0, 0.0), plain, NEUTRAL)
    assert "more than 1.3 times the neutral replies' 2.50 and than 1.05 times the plain replies' 5.00" in said


def test_the_limits_are_the_stated_ones() -> None:
    limits = calibration.NEUTRAL_PERPLEXITY, calibration.REPETITION_POINTS, calibration.EMPTY_POINTS
    assert limits == (1.30, 0.02, 0.02)
    assert calibration.PLAIN_PERPLEXITY == 1.05
    # Repetition is held against the plain model's replies under the same prompts, perplexity against either.
    loose = Fluency(99.0, 0.5, 0.5)
    assert len(objections(Fluency(3.3, 0.04, 0.03), PLAIN, NEUTRAL)) == 3
    assert len(objections(Fluency(3.3, 0.04, 0.03), PLAIN, loose)) == 2
    assert len(objections(Fluency(3.3, 0.04, 0.03), loose, NEUTRAL)) == 0
    assert len(objections(fluency([[], []], [0, 0]), PLAIN, NEUTRAL)) == 2


# ---- the front and the rule --------------------------------------------------------------------------------------


@st.composite
def fields(draw: st.DrawFn) -> list[Scored]:
    """Candidates on a coarse grid, so that ties are common."""
    step = st.integers(0, 4)
    found = []
    for i in range(draw(st.integers(1, 12))):
        low, value, high = sorted(draw(st.tuples(step, step, step)))
        ratio = 1 + draw(step) / 40
        found.append(
            Scored(
                Candidate((i,), 50),
                Interval(value / 4, low / 4, high / 4),
                Interval(ratio, ratio - 0.01, ratio + 0.01),
                draw(st.booleans()),
            )
        )
    return found


def beats(a: Scored, b: Scored) -> bool:
    """At least as good in both, better in one."""
    mine, other = (s.reduction.value for s in (a, b))
    my_price, price = (s.perplexity_ratio.value for s in (a, b))
    return mine >= other and my_price <= price and (mine > other or my_price < price)


@given(fields())
def test_fronts_are_those_of_brute_force(scored: list[Scored]) -> None:
    """A candidate's front: the longest chain of fluent candidates each of which beats the next, down to it."""

    def depth(i: int) -> int:
        above = [j for j, s in enumerate(scored) if s.fluent and beats(s, scored[i])]
        return max((depth(j) + 1 for j in above), default=0)

    found = fronts(scored)
    depths = [depth(i) for i, s in enumerate(scored) if s.fluent]
    assert [f for f, s in zip(found, scored, strict=True) if s.fluent] == depths
    last = max(depths, default=-1) + 1
    assert all(f == last for f, s in zip(found, scored, strict=True) if not s.fluent)


@given(fields())
def test_the_choice_is_fluent_and_cheap_and_has_the_best_lower_bound(scored: list[Scored]) -> None:
    chosen = choose(scored, LIMIT)
    fluent = [s for s in scored if s.fluent]
    cheap = [s for s in fluent if s.perplexity_ratio.value <= LIMIT]
    if not fluent:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.fluent
    if cheap:
        assert chosen in cheap
        assert chosen.reduction.low == max(s.reduction.low for s in cheap)
        assert not any(beats(s, chosen) and s.reduction.low >= chosen.reduction.low for s in cheap)
    else:
        assert chosen.perplexity_ratio.value == min(s.perplexity_ratio.value for s in fluent)


@given(fields(), st.randoms())
def test_the_choice_does_not_hang_on_the_order(scored: list[Scored], random: object) -> None:
    shuffled = list(scored)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    mine, other = choose(scored, LIMIT), choose(shuffled, LIMIT)
    assert (mine is None) == (other is None)
    if mine is not None and other is not None:
        assert (mine.reduction, mine.perplexity_ratio) == (other.reduction, other.perplexity_ratio) or (
            mine.perplexity_ratio.value > LIMIT  # the cheapest, whatever it does
            or (mine.reduction.low, mine.reduction.value) == (other.reduction.low, other.reduction.value)
        )


@given(fields(), st.integers(1, 12))
def test_survivors_are_front_by_front_and_the_preferred_of_the_last(scored: list[Scored], keep: int) -> None:
    left = survivors(scored, keep, LIMIT)
    assert len(left) == len(set(left)) == min(keep, len(scored))
    dearest = 1 + calibration.FAR_TOO_DEAR * (LIMIT - 1)
    place = {s.candidate: (level, s) for s, level in zip(scored, fronts(scored), strict=True)}
    gone = [c for c in place if c not in left]
    for mine, other in itertools.product(left, gone):
        (my_level, a), (level, b) = place[mine], place[other]
        assert a.fluent or not b.fluent
        my_rank, rank = ((not s.fluent, s.perplexity_ratio.low > dearest) for s in (a, b))
        assert my_rank <= rank
        if my_rank == rank:
            assert my_level <= level
            if my_level == level:
                assert calibration.preference(a, LIMIT) >= calibration.preference(b, LIMIT)


@settings(max_examples=30)
@given(fields())
def test_halving_on_the_same_figures_keeps_a_choice_on_the_front(scored: list[Scored]) -> None:
    best = choose([s for s in scored if fronts(scored)[scored.index(s)] == 0], LIMIT)
    left = survivors(scored, max(1, sum(f == 0 for f in fronts(scored))), LIMIT)
    if best is not None and best.perplexity_ratio.low <= 1 + calibration.FAR_TOO_DEAR * (LIMIT - 1):
        assert best.candidate in left


# ---- rounds ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 400), st.integers(1, 120))
def test_every_schedule_ends_with_everything_and_a_front(n: int, prompts: int, neutral: int) -> None:
    rounds = rungs(n, prompts, neutral)
    assert rounds[0].candidates == n
    assert (rounds[-1].prompts, rounds[-1].neutral) == (prompts, neutral)
    assert rounds[-1].candidates >= min(calibration.FINALISTS, n)
    for r in rounds:
        assert 1 <= r.candidates <= n
        assert 1 <= r.neutral <= neutral
    for before, after in itertools.pairwise(rounds):
        assert after.candidates <= before.candidates
        assert before.prompts < after.prompts <= 4.5 * before.prompts
        assert before.neutral <= after.neutral
        assert after.candidates >= before.candidates / 3


def test_a_schedule() -> None:
    found = [(r.candidates, r.prompts, r.neutral) for r in rungs(56, 144, 40)]
    assert found == [(56, 9, 6), (19, 27, 8), (7, 81, 23), (4, 144, 40)]
    assert [(r.candidates, r.prompts) for r in rungs(2, 5, 1)] == [(2, 5)]
    assert [(r.candidates, r.prompts) for r in rungs(4, 12, 3)] == [(4, 9), (4, 12)]
