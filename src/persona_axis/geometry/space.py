"""Persona space: PCA of mean-centred role vectors at one layer (paper, section 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PersonaSpace:
    """Principal components of role vectors.

    Attributes:
        mean: ``[d_model]``, mean role vector.
        components: ``[k, d_model]`` orthonormal rows, descending variance; the Assistant is on the positive side.
        shares: ``[k]``, share of the variance of each; all components, so they sum to 1.
    """

    mean: Tensor
    components: Tensor
    shares: Tensor

    @classmethod
    def fit(cls, roles: Tensor, assistant: Tensor) -> PersonaSpace:
        """From role vectors ``[n, d_model]`` and the assistant vector ``[d_model]``, float32."""
        mean = roles.mean(0)
        _, singular, components = torch.linalg.svd(roles - mean, full_matrices=False)
        k = min(len(roles) - 1, roles.shape[1])  # centring takes one dimension
        singular, components = singular[:k], components[:k]
        side = components @ (assistant - mean)
        components = torch.where(side[:, None] < 0, -components, components)
        variance = singular.square()
        return cls(mean, components, variance / variance.sum())

    def coordinates(self, vectors: Tensor) -> Tensor:
        """``[..., d_model]`` -> ``[..., k]``."""
        return (vectors - self.mean) @ self.components.T

    def components_for(self, share: float) -> int:
        """How many components carry at least this share of the variance."""
        # A hair of slack, so that rounding does not ask for one more component at share 1.
        return int((self.shares.cumsum(0) < share - 1e-6).sum()) + 1


def first_component(roles: Tensor, assistant: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """PC1 of many draws at once, through the small Gram matrix.

    Args:
        roles: ``[N, n, d]`` role vectors of each draw.
        assistant: ``[N, d]``, fixes the sign.
        weights: ``[N, n]``, how often each role was drawn.

    Returns:
        ``(direction [N, d] unit, share [N])``; NaN for a draw of fewer than two roles.
    """
    # A role drawn again and again still has no variance, only rounding.
    total = weights.sum(-1).masked_fill((weights > 0).sum(-1) < 2, torch.nan)[:, None, None]
    mean = (weights[..., None] * roles).sum(1, keepdim=True) / total
    centred = (roles - mean) * weights.sqrt()[..., None]  # [N, n, d]
    gram = (centred @ centred.transpose(1, 2)).double()
    values, vectors = torch.linalg.eigh(gram.nan_to_num())  # ascending; NaN would fail the whole batch
    direction = (vectors[:, None, :, -1].float() @ centred)[:, 0]
    direction = direction / direction.norm(dim=-1, keepdim=True)
    side = ((assistant - mean[:, 0]) * direction).sum(-1, keepdim=True)
    share = (values[:, -1] / values.clamp(min=0).sum(-1)).float()
    return torch.where(side < 0, -direction, direction), share
