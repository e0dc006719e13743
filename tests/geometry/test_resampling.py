"""Reliability and bootstrap: against explicit resampled data sets, a formula, and the truth they should cover."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from persona_worlds import random_weights, slow_axis, slow_cross_fit, slow_pc1, vectors_of, world
from torch import Tensor

from persona_axis.geometry import resampling
from persona_axis.geometry.axis import project
from persona_axis.geometry.crossfit import cross_fit
from persona_axis.geometry.fit import Interval
from persona_axis.geometry.resampling import (
    Draws,
    axes_of,
    cos_axis_pc1_draws,
    cross_fit_draws,
    interval,
    question_folds,
    reliability,
)

ROLES = ["bard", "ghost", "pirate", "judge", "tutor"]


# ---- reliability ------------------------------------------------------------------------------------------------


def reliability_of(noise: float, *, width: int = 256, n_questions: int = 24, gap: float = 2.0, seed: int = 0) -> float:
    """Of an axis ``gap`` long, from a role and an Assistant for each of whom every cell has ``noise`` per dimension."""
    assistant = torch.full((width,), gap / width**0.5)
    means = world(9, n_questions, width, seed=seed, spread=0.0, noise=noise, assistant=assistant).means
    return reliability(torch.ones(9, n_questions), means, torch.ones(8), True, seed)


def test_a_strong_signal_is_reliable() -> None:
    assert reliability_of(0.01) == pytest.approx(1, abs=1e-3)


def test_noise_is_not_reliable() -> None:
    values = [reliability_of(1.0, gap=0.0, seed=seed) for seed in range(10)]
    assert abs(float(np.mean(values))) < 0.1
    assert max(map(abs, values)) < 0.3


@pytest.mark.parametrize("noise", [0.2, 0.5, 1.0])
def test_reliability_is_that_of_all_questions(noise: float) -> None:
    """Halves agree by ``S / (S + N_half)``; stepped up that is ``S / (S + N)``, N being the whole axis's noise.

    Unless stepped up, or stepped up wrongly, this is far off: N_half is twice N.
    """
    gap, width, n_questions, n_roles = 2.0, 256, 24, 8
    noise_of_axis = noise**2 * width * (1 + 1 / n_roles) / n_questions
    expected = gap**2 / (gap**2 + noise_of_axis)
    measured = np.mean([reliability_of(noise, gap=gap, seed=seed) for seed in range(20)])
    assert measured == pytest.approx(expected, abs=0.03)


def test_reliability_is_the_same_for_the_same_seed_whatever_else_draws() -> None:
    first = reliability_of(0.5, seed=3)
    torch.manual_seed(99)
    torch.randn(5)
    assert reliability_of(0.5, seed=3) == first
    assert reliability_of(0.5, seed=4) != first


def test_reliability_leaves_out_what_is_not_in_the_axis() -> None:
    means = world(6, 24, 32, seed=5, noise=0.5).means
    weights, in_axis = torch.ones(6, 24), torch.tensor([1.0, 1, 0, 1, 1])
    whole = reliability(weights, means, in_axis, True, 0)
    rest = [0, 1, 2, 4, 5]
    assert whole == pytest.approx(reliability(weights[rest], means[rest], torch.ones(4), True, 0), abs=1e-6)
    assert whole != pytest.approx(reliability(weights, means, torch.ones(5), True, 0), abs=1e-4)


def test_axes_of_draws_are_axes_of_the_repeated_roles() -> None:
    random = torch.Generator().manual_seed(6)
    vectors = torch.randn(3, 6, 4, generator=random)
    counts = torch.tensor([[1.0, 1, 1, 1, 1], [0, 3, 1, 0, 1], [2, 0, 0, 2, 1]])
    vectors[1, 2] = torch.nan  # a role without data in this draw, although drawn three times
    axes = axes_of(vectors, counts)
    for draw in range(3):
        expected = slow_axis(vectors[draw].double().numpy(), counts[draw].numpy())
        np.testing.assert_allclose(axes[draw].numpy(), expected, rtol=1e-5, atol=1e-6)


# ---- draws ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n_questions=st.integers(1, 30), n_roles=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_every_draw_takes_as_many_questions_and_roles_as_there_are(n_questions: int, n_roles: int, seed: int) -> None:
    roles = ROLES[:n_roles]
    draws = Draws.make(n_questions, roles, seed, 40)
    assert draws.questions.shape == (40, n_questions)
    assert draws.roles.shape == (40, n_roles)
    for counts, n in ((draws.questions, n_questions), (draws.roles, n_roles)):
        assert (counts.sum(1) == n).all()
        assert (counts >= 0).all()
        assert torch.equal(counts, counts.round())


def test_draws_are_multinomial() -> None:
    """Each count is binomial(n, 1/n): mean 1, variance 1 - 1/n; two counts of a draw have covariance -1/n."""
    n = 10
    draws = Draws.make(n, ROLES, 0, 20_000).questions
    torch.testing.assert_close(draws.mean(0), torch.ones(n), rtol=0, atol=0.04)
    torch.testing.assert_close(draws.T.cov(), torch.eye(n) - 1 / n, rtol=0, atol=0.05)


def test_questions_and_roles_are_drawn_apart() -> None:
    draws = Draws.make(5, ROLES, 0, 5_000)
    both = torch.cat([draws.questions, draws.roles], 1).T.corrcoef()
    assert both[:5, 5:].abs().max() < 0.08


def test_the_rows_of_one_role_are_drawn_together() -> None:
    rows = ["bard", "ghost", "pirate", "bard", "ghost", "bard"]  # a role may have several vectors
    draws = Draws.make(4, rows, 1, 200)
    assert torch.equal(draws.roles[:, 0], draws.roles[:, 3])
    assert torch.equal(draws.roles[:, 0], draws.roles[:, 5])
    assert torch.equal(draws.roles[:, 1], draws.roles[:, 4])
    assert not torch.equal(draws.roles[:, 0], draws.roles[:, 1])
    assert (draws.roles[:, :3].sum(1) == 3).all()  # three roles are drawn, not six rows


def test_draws_follow_their_seed() -> None:
    first, again, other = (Draws.make(9, ROLES, seed, 30) for seed in (7, 7, 8))
    assert torch.equal(first.questions, again.questions)
    assert torch.equal(first.roles, again.roles)
    assert not torch.equal(first.questions, other.questions)
    assert len(Draws.make(3, ROLES, 0).questions) == resampling.DRAWS == 1000


@pytest.mark.parametrize(("elements", "sizes"), [(1, [10]), (4, [3, 3, 3, 1]), (100, [1] * 10), (0, [10])])
def test_chunks_are_the_draws_in_order(monkeypatch: pytest.MonkeyPatch, elements: int, sizes: list[int]) -> None:
    monkeypatch.setattr(resampling, "DRAW_ELEMENTS", 12)
    draws = Draws.make(6, ROLES, 2, 10)
    chunks = list(draws.chunks(elements))
    assert [len(c.questions) for c in chunks] == [len(c.roles) for c in chunks] == sizes
    assert torch.equal(torch.cat([c.questions for c in chunks]), draws.questions)
    assert torch.equal(torch.cat([c.roles for c in chunks]), draws.roles)


@settings(max_examples=40, deadline=None)
@given(n_questions=st.integers(1, 60), folds=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_question_folds_are_balanced(n_questions: int, folds: int, seed: int) -> None:
    fold = question_folds(n_questions, seed, folds)
    assert fold.shape == (n_questions,)
    sizes = torch.bincount(fold, minlength=folds)
    assert len(sizes) == folds
    assert sizes.sum() == n_questions  # each question is held out once
    assert sizes.max() - sizes.min() <= 1


def test_question_folds_are_shuffled_by_seed() -> None:
    first, again, other = (question_folds(40, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(40) % 5)
    assert set(first.tolist()) == set(range(5))


# ---- intervals --------------------------------------------------------------------------------------------------


def test_an_interval_holds_the_percentiles() -> None:
    draws = torch.randn(777, generator=torch.Generator().manual_seed(3))
    low, high = np.percentile(draws.double().numpy(), [2.5, 97.5])
    assert interval(0.25, draws) == Interval(0.25, pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_draws_without_a_value_do_not_count() -> None:
    draws = torch.randn(300, generator=torch.Generator().manual_seed(4))
    holes = draws.clone()
    holes[[3, 50]] = torch.nan
    holes[100], holes[200] = torch.inf, -torch.inf
    low, high = np.percentile(np.delete(draws.double().numpy(), [3, 50, 100, 200]), [2.5, 97.5])
    assert interval(0.0, holes) == Interval(0.0, pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


# ---- bootstrap figures ------------------------------------------------------------------------------------------


def bootstrap_design(paired: bool) -> tuple[Tensor, Tensor, Draws]:
    weights = random_weights((6, 15), seed=8, kept=1.0)
    weights[4, 3:5] = 0
    return weights, world(6, 15, 10, seed=9 + paired, noise=0.7).means, Draws.make(15, ROLES, 5, 12)


@pytest.mark.parametrize("paired", [True, False])
def test_cosines_are_those_of_the_resampled_data(paired: bool) -> None:
    """Each draw against a data set in which drawn questions and roles stand as often as they were drawn."""
    weights, means, draws = bootstrap_design(paired)
    in_axis, in_space = torch.tensor([1.0, 1, 0, 1, 1]), torch.ones(5)
    cosines = cos_axis_pc1_draws(weights, means, in_axis, in_space, paired, draws)
    assert cosines.shape == (12,)
    for draw in range(12):
        drawn = torch.repeat_interleave(torch.arange(15), draws.questions[draw].long())
        vectors = vectors_of(weights[:, drawn], means[:, drawn], paired)
        roles = draws.roles[draw]
        axis = slow_axis(vectors, (in_axis * roles).numpy())
        _, direction = slow_pc1(vectors, (in_space * roles).numpy())
        assert float(cosines[draw]) == pytest.approx(axis @ direction / np.linalg.norm(axis), abs=1e-3)


@pytest.mark.parametrize("paired", [True, False])
def test_cross_fitted_draws_are_cross_fits_of_the_resampled_data(paired: bool) -> None:
    weights, means, draws = bootstrap_design(paired)
    folds = torch.arange(15) % 3
    everyone = torch.ones(5)
    projections, distances = cross_fit_draws(weights, means, folds, everyone, everyone, paired, draws)
    assert projections.shape == (12, 6)
    for draw in range(12):
        drawn = torch.repeat_interleave(torch.arange(15), draws.questions[draw].long())
        roles = draws.roles[draw]
        # A question drawn twice stays in its one fold.
        on_axis, on_pc1 = slow_cross_fit(weights[:, drawn], means[:, drawn], folds[drawn], roles, roles, paired)
        np.testing.assert_allclose(projections[draw].numpy(), on_axis - on_axis[1:].mean(), atol=2e-3)
        edge = (on_pc1[1:].max() - on_pc1[0]) / (on_pc1[1:].max() - on_pc1[1:].min())
        assert float(distances[draw]) == pytest.approx(edge, abs=5e-3)


def test_chunks_change_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, means, draws = bootstrap_design(True)
    folds, everyone = question_folds(15, 0, 3), torch.ones(5)

    def figures() -> list[Tensor]:
        return [
            cos_axis_pc1_draws(weights, means, everyone, everyone, True, draws),
            *cross_fit_draws(weights, means, folds, everyone, everyone, True, draws),
        ]

    whole = figures()
    monkeypatch.setattr(resampling, "DRAW_ELEMENTS", 5 * means.shape[0] * means.shape[2])
    for part, all_at_once in zip(figures(), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("n_questions", [5, 6])
def test_few_questions_and_roles_still_get_intervals(n_questions: int) -> None:
    """Among 1,000 draws some hold the questions of one fold only, or one role only: no axis, but no crash either."""
    means = world(4, n_questions, 8, seed=10, noise=0.3).means
    weights, everyone = torch.ones(4, n_questions), torch.ones(3)
    folds = question_folds(n_questions, 0)
    draws = Draws.make(n_questions, ROLES[:3], 0)
    fold_counts = torch.stack([draws.questions[:, folds == f].sum(1) for f in range(5)], 1)
    assert (fold_counts == n_questions).any()
    projections, distances = cross_fit_draws(weights, means, folds, everyone, everyone, True, draws)
    assert projections[:, 0].isfinite().float().mean() > 0.9
    assert distances.isfinite().float().mean() > 0.85  # a ninth of the draws has one role thrice
    cosines = cos_axis_pc1_draws(weights, means, everyone, everyone, True, draws)
    alone = (draws.roles > 0).sum(1) == 1
    assert torch.equal(cosines.isnan(), alone)
    assert interval(0.0, distances).low < interval(0.0, distances).high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """60 data sets from one truth: the roles' places, relative to the roles' mean, against their 95 % intervals."""
    n_roles, n_questions, width = 8, 20, 8
    truth = world(n_roles + 1, n_questions, width, seed=11, spread=0.5, assistant=torch.full((width,), 3.0))
    axis = truth.personas[0] - truth.personas[1:].mean(0)
    places = project(truth.personas, axis)
    places = places - places[1:].mean()
    weights, everyone = torch.ones(n_roles + 1, n_questions), torch.ones(n_roles)
    covered = []
    for seed in range(60):
        noise = torch.randn(truth.means.shape, generator=torch.Generator().manual_seed(100 + seed))
        means, folds = truth.means + noise, question_folds(n_questions, seed)
        held = cross_fit(weights[None], means, folds, everyone[None], everyone[None], True).projection[0]
        draws = Draws.make(n_questions, [*ROLES, "miner", "nurse", "clown"], seed, 200)
        projections, _ = cross_fit_draws(weights, means, folds, everyone, everyone, True, draws)
        centre = held[1:].mean()
        for persona in range(1, n_roles + 1):
            found = interval(float(held[persona]), projections[:, persona] + centre)
            assert found.low < found.high
            covered.append(found.low - float(centre) <= float(places[persona]) <= found.high - float(centre))
    assert 0.88 < np.mean(covered) < 0.995
