"""Persona vectors against a plain least-squares solution, and what each estimator makes of selective filtering."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from persona_worlds import least_squares, parts, plain_means, random_weights, world

from persona_axis.errors import FitError
from persona_axis.geometry.vectors import check_connected, persona_vectors

CLOSE = {"rtol": 1e-4, "atol": 2e-4}


@settings(max_examples=60, deadline=None)
@given(
    n_personas=st.integers(2, 7),
    n_questions=st.integers(2, 9),
    kept=st.floats(0.35, 1.0),
    seed=st.integers(0, 2**31),
)
def test_paired_is_weighted_least_squares(n_personas: int, n_questions: int, kept: float, seed: int) -> None:
    weights = random_weights((n_personas, n_questions), seed=seed, kept=kept)
    assume(len(parts(weights)) == 1)
    means = world(n_personas, n_questions, 5, seed=seed, noise=1.0).means
    np.testing.assert_allclose(persona_vectors(weights, means).numpy(), least_squares(weights, means), **CLOSE)


def test_many_draws_at_once_are_each_their_own_fit() -> None:
    means = world(6, 8, 5, seed=1, noise=1.0).means
    weights = random_weights((2, 3, 6, 8), seed=2, kept=0.7)
    vectors = persona_vectors(weights, means)
    assert vectors.shape == (2, 3, 6, 5)
    for i in range(2):
        for j in range(3):
            assert len(parts(weights[i, j])) == 1
            np.testing.assert_allclose(vectors[i, j].numpy(), least_squares(weights[i, j], means), **CLOSE)


def test_a_question_nobody_was_kept_on_is_as_if_never_asked() -> None:
    means = world(5, 7, 4, seed=3, noise=1.0).means
    weights = random_weights((5, 7), seed=4, kept=0.8)
    weights[:, 2] = 0
    others = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(
        persona_vectors(weights, means), persona_vectors(weights[:, others], means[:, others]), **CLOSE
    )


@pytest.mark.parametrize("paired", [True, False])
def test_a_balanced_design_gives_plain_means(paired: bool) -> None:
    means = world(6, 9, 5, seed=5, noise=1.0).means
    vectors = persona_vectors(torch.full((6, 9), 2.0), means, paired)
    torch.testing.assert_close(vectors, means.mean(1), **CLOSE)


def test_paper_is_the_mean_over_rollouts() -> None:
    means = world(6, 9, 5, seed=6, noise=1.0).means
    weights = random_weights((4, 6, 9), seed=7, kept=0.6)
    vectors = persona_vectors(weights, means, paired=False)
    for draw in range(4):
        np.testing.assert_allclose(vectors[draw].numpy(), plain_means(weights[draw], means), rtol=1e-5, atol=1e-5)


def test_paired_recovers_what_selective_filtering_hides_from_paper() -> None:
    """Each role is kept on its own window of questions, and the questions differ a lot."""
    planted = world(6, 20, 8, seed=8, question_spread=5.0)
    weights = torch.zeros(6, 20)
    weights[0] = 5
    for role in range(1, 6):
        weights[role, 3 * role : 3 * role + 4] = 1
    paired = persona_vectors(weights, planted.means) - planted.personas
    paper = persona_vectors(weights, planted.means, paired=False) - planted.personas
    assert paired.abs().max() < 1e-4
    assert paper[1:].norm(dim=-1).min() > 2  # every role is off by more than a few of the questions' effects


@pytest.mark.parametrize("paired", [True, False])
def test_a_persona_without_data_has_no_vector_and_leaves_the_others_alone(paired: bool) -> None:
    means = world(5, 6, 4, seed=9, noise=1.0).means
    weights = random_weights((5, 6), seed=10, kept=0.8)
    weights[3] = 0
    vectors = persona_vectors(weights, means, paired)
    assert vectors[3].isnan().all()
    rest = [0, 1, 2, 4]
    torch.testing.assert_close(vectors[rest], persona_vectors(weights[rest], means[rest], paired), **CLOSE)


def test_what_stands_in_an_empty_cell_does_not_matter() -> None:
    means = world(5, 6, 4, seed=11, noise=1.0).means
    weights = random_weights((5, 6), seed=12, kept=0.6)
    assert len(parts(weights)) == 1
    assert (weights == 0).any()
    scrambled = torch.where((weights == 0)[..., None], torch.tensor(100.0), means)
    for paired in (True, False):
        torch.testing.assert_close(
            persona_vectors(weights, scrambled, paired), persona_vectors(weights, means, paired), rtol=0, atol=0
        )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), kept=st.floats(0.5, 1.0))
def test_question_effects_change_no_vector(seed: int, kept: float) -> None:
    weights = random_weights((5, 7), seed=seed, kept=kept)
    assume(len(parts(weights)) == 1 and weights.any(0).all() and weights.any(1).all())
    planted = world(5, 7, 4, seed=seed, noise=1.0)
    before = persona_vectors(weights, planted.means)
    extra = world(1, 7, 4, seed=seed ^ 1).questions  # sums to zero
    torch.testing.assert_close(persona_vectors(weights, planted.means + extra), before, rtol=1e-3, atol=1e-3)
    # What all questions share is not a question's effect.
    torch.testing.assert_close(persona_vectors(weights, planted.means + 3), before + 3, rtol=1e-3, atol=1e-3)


def test_unconnected_draws_stay_finite_and_right_within_each_part() -> None:
    means = world(5, 6, 4, seed=13, noise=1.0).means
    weights = torch.zeros(5, 6)
    weights[:3, :3] = random_weights((3, 3), seed=14, kept=1.0)
    weights[3:, 3:] = random_weights((2, 3), seed=15, kept=1.0)
    vectors = persona_vectors(weights, means)
    for part in (slice(0, 3), slice(3, 5)):
        alone = least_squares(weights[part], means[part])
        here = vectors[part].numpy()
        np.testing.assert_allclose(here - here[0], alone - alone[0], rtol=1e-3, atol=1e-3)


def test_personas_without_any_question_in_common_keep_their_plain_means() -> None:
    """As a bootstrap draw of few questions can leave them: the equations are singular then."""
    means = world(3, 3, 4, seed=16, noise=1.0).means
    vectors = persona_vectors(2 * torch.eye(3), means)
    torch.testing.assert_close(vectors, means[torch.arange(3), torch.arange(3)], **CLOSE)


def test_a_chain_of_shared_questions_is_connected() -> None:
    weights = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]])
    check_connected(weights, ["default", "bard", "pirate", "ghost"])
    weights[2, 1] = 0  # pirate and ghost are on their own now
    with pytest.raises(FitError) as caught:
        check_connected(weights, ["default", "bard", "pirate", "ghost"])
    message = str(caught.value)
    assert "pirate, ghost share no question with default" in message
    assert "bard" not in message
    assert "--filter" in message


def test_a_persona_without_data_is_not_connected() -> None:
    weights = torch.ones(3, 4)
    weights[1] = 0
    with pytest.raises(FitError, match="bard share"):
        check_connected(weights, ["default", "bard", "pirate"])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), kept=st.floats(0.1, 0.6))
def test_connected_means_one_part(seed: int, kept: float) -> None:
    weights = random_weights((6, 5), seed=seed, kept=kept)
    names = [f"role{i}" for i in range(6)]
    groups = parts(weights)
    first = next((g for g in groups if 0 in g), {0})
    if len(first) == 6:
        check_connected(weights, names)
    else:
        with pytest.raises(FitError) as caught:
            check_connected(weights, names)
        lost = [n for i, n in enumerate(names) if i not in first]
        assert ", ".join(lost[:5]) + " share" in str(caught.value)
