"""Persona space against scikit-learn's PCA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from persona_worlds import repeated
from sklearn.decomposition import PCA
from torch import Tensor

from persona_axis.geometry.space import PersonaSpace, first_component


def some_roles(n: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Roles with clearly different variances, and an assistant."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.linspace(4, 0.5, width)
    roles = torch.randn(n, width, generator=random) * scale + torch.randn(width, generator=random)
    return roles, torch.randn(width, generator=random) * scale


@pytest.mark.parametrize(("n", "width", "k"), [(7, 20, 6), (30, 6, 6), (7, 6, 6), (6, 6, 5), (2, 5, 1)])
def test_components_are_those_of_pca(n: int, width: int, k: int) -> None:
    roles, assistant = some_roles(n, width)
    space = PersonaSpace.fit(roles, assistant)
    pca = PCA(k, svd_solver="full").fit(roles.double().numpy())
    assert space.components.shape == (k, width)
    np.testing.assert_allclose(space.mean.numpy(), pca.mean_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(space.shares.numpy(), pca.explained_variance_ratio_, rtol=1e-4, atol=1e-6)
    inner = (space.components.numpy() * pca.components_).sum(1)
    np.testing.assert_allclose(np.abs(inner), 1, atol=1e-4)
    signs = np.sign(inner)
    np.testing.assert_allclose(
        space.coordinates(roles).numpy(), signs * pca.transform(roles.double().numpy()), atol=2e-3
    )


def test_components_are_orthonormal_and_shares_descend_to_one_in_sum() -> None:
    space = PersonaSpace.fit(*some_roles(12, 40))
    torch.testing.assert_close(space.components @ space.components.T, torch.eye(11), rtol=0, atol=1e-5)
    assert float(space.shares.sum()) == pytest.approx(1, abs=1e-5)
    assert (space.shares.diff() <= 0).all()
    assert (space.shares > 0).all()


def test_the_assistant_is_on_the_positive_side_of_every_component() -> None:
    roles, assistant = some_roles(9, 12)
    space = PersonaSpace.fit(roles, assistant)
    assert (space.coordinates(assistant) > 0).all()
    mirrored = PersonaSpace.fit(roles, 2 * roles.mean(0) - assistant)
    torch.testing.assert_close(mirrored.components, -space.components)
    torch.testing.assert_close(mirrored.shares, space.shares)


def test_coordinates_keep_the_shape_in_front() -> None:
    roles, assistant = some_roles(6, 8)
    space = PersonaSpace.fit(roles, assistant)
    assert space.coordinates(roles.reshape(2, 3, 8)).shape == (2, 3, 5)
    torch.testing.assert_close(space.coordinates(space.mean), torch.zeros(5))
    # All components are kept, so that roles are where they were.
    torch.testing.assert_close(space.mean + space.coordinates(roles) @ space.components, roles, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("share", "n"), [(0.0, 1), (0.3, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.9999, 3), (1.0, 3)]
)
def test_components_for_a_share(share: float, n: int) -> None:
    space = PersonaSpace(torch.zeros(3), torch.eye(3), torch.tensor([0.5, 0.25, 0.25]))
    assert space.components_for(share) == n


def test_the_whole_variance_never_asks_for_more_components_than_there_are() -> None:
    rounded = PersonaSpace(torch.zeros(2), torch.eye(2), torch.tensor([0.5, 0.5 - 2.0**-24]))
    assert rounded.shares.sum() < 1
    assert rounded.components_for(1.0) == 2
    for n in (3, 50, 300):
        space = PersonaSpace.fit(*some_roles(n, 64, seed=n))
        assert space.components_for(1.0) <= len(space.shares)


def test_first_component_is_weighted_pca_draw_by_draw() -> None:
    random = torch.Generator().manual_seed(1)
    roles = torch.randn(5, 8, 12, generator=random) * torch.linspace(3, 0.5, 12)
    assistant = torch.randn(5, 12, generator=random)
    counts = torch.randint(0, 4, (5, 8), generator=random).float()
    direction, share = first_component(roles, assistant, counts)
    for draw in range(5):
        rows = repeated(roles[draw].double().numpy(), counts[draw].numpy())
        pca = PCA(svd_solver="full").fit(rows)
        expected = pca.components_[0]
        expected = expected * np.sign((assistant[draw].numpy() - pca.mean_) @ expected)
        np.testing.assert_allclose(direction[draw].numpy(), expected, atol=1e-4)
        assert float(share[draw]) == pytest.approx(pca.explained_variance_ratio_[0], rel=1e-4)


def test_first_component_is_that_of_the_space() -> None:
    roles, assistant = some_roles(9, 30)
    space = PersonaSpace.fit(roles, assistant)
    direction, share = first_component(roles[None], assistant[None], torch.ones(1, 9))
    torch.testing.assert_close(direction[0], space.components[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(share[0], space.shares[0])


def test_the_sign_of_the_first_component_follows_the_assistant_of_each_draw() -> None:
    roles, assistant = some_roles(9, 10)
    other = 2 * roles.mean(0) - assistant
    direction, _ = first_component(roles.expand(2, -1, -1), torch.stack([assistant, other]), torch.ones(2, 9))
    torch.testing.assert_close(direction[1], -direction[0])
    assert ((assistant - roles.mean(0)) * direction[0]).sum() > 0


@pytest.mark.parametrize("drawn", [{}, {2: 6}])
def test_a_draw_of_fewer_than_two_roles_has_no_component_and_spoils_no_other(drawn: dict[int, int]) -> None:
    """LAPACK refuses a NaN matrix, and with it the whole batch."""
    roles, assistant = some_roles(6, 10)
    counts = torch.ones(3, 6)
    counts[1] = torch.tensor([float(drawn.get(role, 0)) for role in range(6)])
    direction, share = first_component(roles.expand(3, -1, -1), assistant.expand(3, -1), counts)
    assert direction[1].isnan().all()
    assert share[1].isnan()
    alone, _ = first_component(roles[None], assistant[None], counts[:1])
    for draw in (0, 2):
        torch.testing.assert_close(direction[draw], alone[0])
