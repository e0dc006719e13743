"""Policies over a stream of a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from persona_axis.steering.interventions import Intervention, orthonormal
from persona_axis.steering.policy import Policy, Positions

WIDTH = 6


def made(
    seed: int = 0,
    layers: Sequence[int] = (1, 2),
    kind: str = "band",
    *,
    k: int = 1,
    positions: Positions = "all",
    width: int = WIDTH,
) -> Policy:
    """``kind``: cap (lower bounds), band (both), add (shifts), all (bounds and shifts)."""
    random = torch.Generator().manual_seed(seed)
    return Policy(tuple(_part(layer, kind, k, width, random) for layer in sorted(layers)), positions=positions)


def _part(layer: int, kind: str, k: int, width: int, random: torch.Generator) -> Intervention:
    def numbers() -> Tensor:
        return torch.randn(k, generator=random)

    V, middle, shift = orthonormal(torch.randn(k, width, generator=random)), numbers(), numbers()
    lo = torch.full([k], -math.inf) if kind == "add" else middle
    hi = torch.full([k], math.inf) if kind in ("add", "cap") else middle + 0.5
    return Intervention(layer, V, lo, hi, shift if kind in ("add", "all") else torch.zeros(k))
