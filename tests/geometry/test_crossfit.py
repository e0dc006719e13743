"""Cross-fitting against a slow loop, and its honesty: noise does not make an Assistant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from persona_worlds import parts, random_weights, slow_axis, slow_cross_fit, vectors_of, world
from torch import Tensor

from persona_axis.geometry.axis import project
from persona_axis.geometry.crossfit import HeldOut, cross_fit, edge_distance, held_out_axes
from persona_axis.geometry.resampling import axes_of, question_folds
from persona_axis.geometry.vectors import persona_vectors

FOLDS = 4


def design(n_personas: int, n_questions: int, *, seed: int, missing: int | None = None) -> tuple[Tensor, Tensor]:
    """Incomplete weights that stay connected inside and outside of every fold; ``missing`` skips fold 0."""
    folds = question_folds(n_questions, seed=0, folds=FOLDS)
    for attempt in range(200):
        weights = random_weights((n_personas, n_questions), seed=1000 * seed + attempt, kept=0.75)
        if missing is not None:
            weights[missing, folds == 0] = 0
        if all(_connected(weights * (folds == f), missing) for f in range(FOLDS)):
            return weights, folds
    raise AssertionError("no connected design among 200")


def _connected(weights: Tensor, missing: int | None) -> bool:
    groups = parts(weights)
    return len(groups) == 1 and len(groups[0]) >= len(weights) - (missing is not None)


def assert_same_places(held: HeldOut, draw: int, expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(held.projection[draw].numpy(), expected[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(held.pc1[draw].numpy(), expected[1], rtol=1e-3, atol=1e-3)


# ---- against the slow loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("missing", [None, 3])
def test_cross_fit_is_the_slow_loop(paired: bool, missing: int | None) -> None:
    """With ``missing``, one role has no rollout on a fold's questions: it is held out on the others only."""
    weights, folds = design(7, 20, seed=1, missing=missing)
    means = world(7, 20, 10, seed=2, noise=0.5).means
    everyone = torch.ones(6)
    held = cross_fit(weights[None], means, folds, everyone[None], everyone[None], paired)
    assert held.projection.shape == held.pc1.shape == (1, 7)
    assert_same_places(held, 0, slow_cross_fit(weights, means, folds, everyone, everyone, paired))


def test_draws_count_roles_as_often_as_drawn_and_the_axis_apart_from_the_space() -> None:
    weights, folds = design(8, 20, seed=3)
    means = world(8, 20, 10, seed=4, noise=0.5).means
    in_axis = torch.tensor([[2.0, 0, 1, 1, 1, 0, 2], [1, 1, 1, 0, 3, 1, 0]])
    in_space = torch.tensor([[2.0, 0, 1, 1, 1, 3, 2], [1, 1, 1, 2, 3, 1, 1]])
    batch = torch.stack([weights, 2 * weights + (weights > 0)])
    held = cross_fit(batch, means, folds, in_axis, in_space, paired=True)
    for draw in range(2):
        expected = slow_cross_fit(batch[draw], means, folds, in_axis[draw], in_space[draw], True)
        assert_same_places(held, draw, expected)


def test_a_role_without_any_rollout_is_nowhere_and_moves_nobody() -> None:
    weights, folds = design(7, 20, seed=5)
    means = world(7, 20, 10, seed=6, noise=0.5).means
    weights[4] = 0
    everyone, rest = torch.ones(1, 6), [0, 1, 2, 3, 5, 6]
    held = cross_fit(weights[None], means, folds, everyone, everyone, True)
    without = cross_fit(weights[None, rest], means[rest], folds, everyone[:, :5], everyone[:, :5], True)
    assert held.projection[0, 4].isnan()
    assert held.pc1[0, 4].isnan()
    torch.testing.assert_close(held.projection[:, rest], without.projection, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(held.edge_distance(), without.edge_distance(), rtol=1e-3, atol=1e-3)


def test_a_role_is_projected_as_if_it_had_never_been_rolled_out() -> None:
    """In a balanced design leaving a role out of the axis is leaving it out of the data."""
    n_personas, n_questions = 6, 12
    means = world(n_personas, n_questions, 10, seed=7, noise=1.0).means
    folds = question_folds(n_questions, seed=0, folds=FOLDS)
    weights, everyone = torch.ones(n_personas, n_questions), torch.ones(1, n_personas - 1)
    held = cross_fit(weights[None], means, folds, everyone, everyone, True)
    values = []
    for fold in range(FOLDS):
        here = (folds == fold).float()
        tested = vectors_of(weights * here, means, True)
        row = []
        for persona in range(n_personas):
            others = [p for p in range(n_personas) if p != persona or p == 0]
            train = vectors_of(weights[others] * (1 - here), means[others], True)
            axis = slow_axis(train, np.ones(len(others) - 1))
            row.append((tested[persona] - tested[1:].mean(0)) @ axis / np.linalg.norm(axis))
        values.append(row)
    table = np.array(values)
    expected = (table - table[:, 1:].mean(1, keepdims=True)).mean(0)
    np.testing.assert_allclose((held.projection[0] - held.projection[0, 1:].mean()).numpy(), expected, atol=1e-4)


def test_what_all_activations_share_moves_nobody_relative_to_the_others() -> None:
    """Residuals share a part some ten times as long as an axis; each role has an axis of its own to project it on."""
    weights, folds = design(7, 20, seed=9)
    means = world(7, 20, 10, seed=10, noise=0.5).means
    everyone = torch.ones(1, 6)
    shared = 30 * torch.randn(10, generator=torch.Generator().manual_seed(11))
    before = cross_fit(weights[None], means, folds, everyone, everyone, True)
    after = cross_fit(weights[None], means + shared, folds, everyone, everyone, True)
    moved = after.projection - before.projection
    torch.testing.assert_close(moved, moved[:, :1].expand(-1, 7), rtol=1e-3, atol=2e-3)
    assert moved.abs().min() > 1  # the level itself is that of the residuals
    torch.testing.assert_close(after.pc1, before.pc1, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(after.edge_distance(), before.edge_distance(), rtol=1e-3, atol=1e-3)


# ---- edge distance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assistant", "roles", "distance"),
    [
        (5.0, [1.0, 3.0, 5.0], 0.0),  # at the outermost role
        (6.0, [1.0, 3.0, 5.0], -0.25),  # beyond it
        (4.0, [5.0, 3.0, 1.0], 0.25),
        (1.0, [1.0, 3.0, 5.0], 1.0),  # the other end
        (-3.0, [1.0, 5.0], 2.0),
        (4.0, [math.nan, 5.0, 1.0], 0.25),
        (6.0, [5.0, 1.0, math.nan], -0.25),
        (-6.0, [-5.0, math.nan, -7.0], 0.5),  # a missing role is not a role at zero
    ],
)
def test_edge_distance(assistant: float, roles: list[float], distance: float) -> None:
    assert float(edge_distance(torch.tensor(assistant), torch.tensor(roles))) == pytest.approx(distance)


def test_edge_distance_of_several_draws() -> None:
    roles = torch.tensor([[0.0, 10.0], [0.0, 20.0], [math.nan, math.nan]])
    distances = edge_distance(torch.tensor([9.0, 25.0, 0.0]), roles)
    assert distances[:2].tolist() == pytest.approx([0.1, -0.25])
    assert distances[2].isnan()


def test_edge_distance_does_not_depend_on_units() -> None:
    random = torch.Generator().manual_seed(10)
    assistant, roles = torch.randn(4, generator=random), torch.randn(4, 7, generator=random)
    torch.testing.assert_close(edge_distance(3 * assistant - 8, 3 * roles - 8), edge_distance(assistant, roles))


def test_the_held_out_edge_distance_is_on_the_first_component() -> None:
    random = torch.Generator().manual_seed(11)
    projection, pc1 = torch.randn(2, 3, 6, generator=random)
    expected = (pc1[:, 1:].amax(1) - pc1[:, 0]) / (pc1[:, 1:].amax(1) - pc1[:, 1:].amin(1))
    torch.testing.assert_close(HeldOut(projection, pc1).edge_distance(), expected)


# ---- honesty ----------------------------------------------------------------------------------------------------


def assistant_distances(assistant: Tensor | None, seeds: int = 20) -> tuple[Tensor, Tensor]:
    """In sample and cross-fitted: how many role-SDs the Assistant is out, per seed. Roles differ by noise alone."""
    in_sample, cross_fitted = [], []
    everyone = torch.ones(1, 20)
    for seed in range(seeds):
        means = world(21, 20, 64, seed=seed, spread=0.0, noise=1.0, assistant=assistant).means
        weights = torch.ones(1, 21, 20)
        vectors = persona_vectors(weights, means)
        held = cross_fit(weights, means, question_folds(20, seed), everyone, everyone, True)
        in_sample.append(_deviations(project(vectors, axes_of(vectors, everyone)[:, None])[0]))
        cross_fitted.append(_deviations(held.projection[0]))
    return torch.stack(in_sample), torch.stack(cross_fitted)


def _deviations(places: Tensor) -> Tensor:
    return (places[0] - places[1:].mean()) / places[1:].std()


def test_noise_makes_an_assistant_in_sample_but_not_held_out() -> None:
    in_sample, cross_fitted = assistant_distances(None)
    assert in_sample.min() > 4
    assert cross_fitted.mean().abs() < 0.5
    assert cross_fitted.abs().max() < 4


def test_an_assistant_who_is_there_is_found_held_out() -> None:
    _, cross_fitted = assistant_distances(torch.full((64,), 3 / 8))  # 3 units away; noise of a vector is 0.22 a side
    assert cross_fitted.min() > 5


def test_the_cross_fitted_distance_is_the_planted_one() -> None:
    gap = 4.0
    means = world(21, 40, 64, seed=12, spread=0.0, noise=0.5, assistant=torch.full((64,), gap / 8)).means
    everyone = torch.ones(1, 20)
    held = cross_fit(torch.ones(1, 21, 40), means, question_folds(40, 0), everyone, everyone, True)
    assert float(held.projection[0, 0] - held.projection[0, 1:].mean()) == pytest.approx(gap, rel=0.05)


def test_the_edge_of_the_roles_is_pushed_in_by_fitting_on_the_same_data() -> None:
    """Roles and Assistant from one distribution: in sample PC1 spreads the roles, held out it is chance."""
    ranges = []
    for seed in range(10):
        means = world(13, 20, 64, seed=seed, spread=0.0, noise=1.0).means
        weights, everyone = torch.ones(1, 13, 20), torch.ones(1, 12)
        held = cross_fit(weights, means, question_folds(20, seed), everyone, everyone, True)
        vectors = persona_vectors(weights, means)[0, 1:]
        top = torch.linalg.svd(vectors - vectors.mean(0))[2][0]
        ranges.append(((vectors @ top).std(), held.pc1[0, 1:].std()))
    in_sample, cross_fitted = torch.tensor(ranges).T
    assert (in_sample > 1.5 * cross_fitted).all()


# ---- the axes themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False])
def test_held_out_axes_are_fitted_without_the_fold_and_without_the_role(paired: bool) -> None:
    weights, folds = design(7, 20, seed=11)
    means = world(7, 20, 10, seed=12, noise=0.5).means
    in_axis = torch.tensor([1.0, 1, 0, 1, 1, 1])  # one role is not in the axis, so nothing is left out for it
    found = held_out_axes(weights, means, folds, in_axis, paired)
    assert found.shape == (FOLDS, 7, 10)
    for fold in range(FOLDS):
        train = vectors_of(weights * (folds != fold), means, paired)
        for persona in range(7):
            expected = slow_axis(train, in_axis.numpy(), persona - 1 if persona else None)
            np.testing.assert_allclose(found[fold, persona].numpy(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[:, 3], found[:, 0])


def test_what_is_held_out_moves_no_axis() -> None:
    """A role's rollouts change every other's axis and not its own; a fold's questions those of the other folds."""
    weights, folds = design(6, 20, seed=13)
    means = world(6, 20, 8, seed=14, noise=0.5).means
    args = (folds, torch.ones(5), False)  # plain means: a question's effect is no matter of other personas
    before = held_out_axes(weights, means, *args)
    role, question = means.clone(), means.clone()
    role[2] += 5 * torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    question[:, folds == 1] += 7 * torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1))
    moved = (held_out_axes(weights, role, *args) - before).norm(dim=-1) > 1e-4
    assert moved.all(0).tolist() == [True, True, False, True, True, True]
    assert not moved[:, 2].any()
    moved = (held_out_axes(weights, question, *args) - before).norm(dim=-1) > 1e-4
    assert moved.all(1).tolist() == [True, False, True, True]
    assert not moved[1].any()


def test_a_role_absent_from_the_other_folds_leaves_their_axes_to_the_rest() -> None:
    weights, folds = design(7, 20, seed=15)
    means = world(7, 20, 10, seed=16, noise=0.5).means
    weights[4, folds != 2] = 0  # only on fold 2's questions
    found = held_out_axes(weights, means, folds, torch.ones(6), True)
    assert found.isfinite().all()
    rest = [0, 1, 2, 3, 5, 6]
    others = held_out_axes(weights[rest], means[rest], folds, torch.ones(5), True)
    torch.testing.assert_close(found[2][rest], others[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[2, 4], others[2, 0], rtol=1e-3, atol=1e-3)
