"""Sums of reply activations, one place per request that asks, whatever the length of the reply.

An engine runs ahead of what it knows: with asynchronous scheduling a request that has just ended is fed its end token,
and when a stop string is found by the front end, tokens beyond it. So the newest ``RECENT`` tokens of a request stay
apart from its sum until later ones push them in, and what was one too many is left out when the sum is read.

Contract:

1. The operator adds a token's residual into a row of ``recent``; ``admit`` says into which, having moved what was there
   into the sum. Both tensors are allocated once and never moved.
2. ``read(place, seen, count)`` is the sum over the first ``count`` of ``seen`` tokens, or raises: it never guesses.
3. A place that is given is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_axis.errors import PersonaAxisError

RECENT = 4  # tokens of a request that can still be left out


class Sums:
    """Args: ``places`` is how many requests are summed at one time.

    Attributes:
        total: ``[layers, places, d_model]`` float32.
        recent: ``[layers, 1 + places * RECENT, d_model]`` float32; row 0 is nobody's.
    """

    def __init__(self, n_layers: int, places: int, d_model: int, device: torch.device) -> None:
        self.total = torch.zeros(n_layers, places, d_model, device=device)
        self.recent = torch.zeros(n_layers, 1 + places * RECENT, d_model, device=device)
        self._free = list(range(places))

    def take(self) -> int | None:
        """An empty place; None when all are taken."""
        if not self._free:
            return None
        place = self._free.pop(0)
        self.total[:, place] = 0
        self.recent[:, _rows(place)] = 0
        return place

    def give_back(self, place: int) -> None:
        self._free.append(place)

    def admit(self, places: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Rows of ``recent`` for the ``tokens``-th token of the request at each of ``places``, emptied for them."""
        if not places:
            return []
        rows = [1 + place * RECENT + token % RECENT for place, token in zip(places, tokens, strict=True)]
        at = torch.tensor(rows, device=self.recent.device)
        into = torch.tensor(list(places), device=self.recent.device)
        self.total.index_add_(1, into, self.recent.index_select(1, at))
        self.recent.index_fill_(1, at, 0)
        return rows

    def read(self, place: int, seen: int, count: int) -> Tensor:
        """``[layers, d_model]`` float32 on the CPU: the first ``count`` tokens of the ``seen`` that were summed.

        Raises:
            PersonaAxisError: fewer were seen, or too many more.
        """
        return read_saved(self.save(place), seen, count)

    def save(self, place: int) -> tuple[Tensor, Tensor]:
        """A copy on the CPU: what :func:`read_saved` reads when the place is somebody else's."""
        return self.total[:, place].cpu().clone(), self.recent[:, _rows(place)].cpu().clone()


def read_saved(saved: tuple[Tensor, Tensor], seen: int, count: int) -> Tensor:
    """:meth:`Sums.read` of a place that was saved."""
    if count > seen:
        raise PersonaAxisError(f"{count} tokens of the reply count, but the engine was fed only {seen} of them.")
    if count < seen - RECENT:
        raise PersonaAxisError(
            f"The engine ran {seen - count} tokens past the end of the reply before it was stopped; its activation can "
            f"be told from theirs up to {RECENT}. Ask for the reply again, or end it by a token instead of a string."
        )
    total, recent = saved
    oldest = max(0, seen - RECENT)
    kept = [token % RECENT for token in range(oldest, count)]
    return total + recent[:, kept].sum(1)


def _rows(place: int) -> slice:
    return slice(1 + place * RECENT, 1 + (place + 1) * RECENT)
