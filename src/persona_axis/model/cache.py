"""Key/value storage for the decoding loop: fixed slots, written in place.

Contract:

1. A slot holds one sequence; its tokens sit at positions ``0..length-1``, no padding in front.
2. Active sequences occupy slots ``0..n-1``. When one ends, the last active one moves into the hole, so a
   decoding step reads a view of the storage and never gathers or copies it.
3. ``prefill`` rows name their slots and start positions; a decode step writes one token per active slot.
4. Columns at or beyond a sequence's length hold stale numbers; every reader masks them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 64  # capacity is rounded up to this many positions


class SlotLayer(CacheLayerMixin):
    """One decoder block's keys and values, ``[slots, kv_heads, capacity, head_dim]`` in the model's dtype."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: Tensor) -> Tensor:
        heads, dim = like.shape[1], like.shape[3]
        # Zeros, not empty: a masked column is multiplied by weight 0, and 0 * NaN would be NaN.
        return like.new_zeros(self.owner.slots, heads, self.owner.capacity, dim)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write this forward's keys and values and return all that its queries may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        owner = self.owner
        rows, columns = owner.write_rows, owner.write_columns
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        if owner.decoding:  # views, no copy
            return self.keys[: owner.n_rows, :, : owner.width], self.values[: owner.n_rows, :, : owner.width]
        slots = rows[:, 0]
        return self.keys[slots, :, : owner.width], self.values[slots, :, : owner.width]

    def resize(self) -> None:
        """Move what is stored into storage of the owner's new size."""
        if not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        old_keys, old_values = self.keys, self.values
        self.lazy_initialization(old_keys, old_values)
        n, width = min(len(old_keys), self.owner.slots), min(old_keys.shape[2], self.owner.capacity)
        self.keys[:n, :, :width] = old_keys[:n, :, :width]
        self.values[:n, :, :width] = old_values[:n, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.width, 0

    def get_seq_length(self) -> int:
        return self.owner.width

    def get_max_length(self) -> int:
        return self.owner.capacity


class SlotCache(Cache):
    """All decoder blocks' slots, and where the current forward reads and writes."""

    def __init__(self, n_layers: int, slots: int, capacity: int, device: torch.device) -> None:
        self.slots = slots
        self.capacity = _round_up(capacity)
        self.device = device
        self.decoding = False
        self.n_rows = 0
        self.width = 0
        self.write_rows = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.write_columns = self.write_rows
        super().__init__(layers=[SlotLayer(self) for _ in range(n_layers)])

    def resize(self, slots: int, capacity: int) -> None:
        """Storage of at least ``capacity`` positions for ``slots`` sequences; the first slots' contents stay."""
        self.slots = slots
        self.capacity = max(_round_up(capacity), self.capacity)
        for layer in self._slot_layers():
            layer.resize()

    def begin_prefill(self, slots: Tensor, starts: Tensor, width: int) -> Tensor:
        """The next forward writes ``width`` tokens per row into ``slots [rows]`` from ``starts [rows]``.

        Returns the position ids ``[rows, width]``. Rows shorter than ``width`` write padding beyond their end,
        which their first real tokens overwrite.
        """
        positions = starts[:, None] + torch.arange(width, device=self.device)
        self.decoding = False
        self.n_rows = len(slots)
        self.width = int(positions[:, -1].max()) + 1
        self.write_rows = slots[:, None].expand(-1, width)
        self.write_columns = positions
        return positions

    def begin_decode(self, lengths: Tensor, width: int) -> None:
        """The next forward appends one token to slots ``0..n-1`` at ``lengths [n]``; ``width`` = max + 1."""
        self.decoding = True
        self.n_rows = len(lengths)
        self.width = width
        self.write_rows = torch.arange(self.n_rows, device=self.device)[:, None]
        self.write_columns = lengths[:, None]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy whole sequences between slots (``[k]`` each)."""
        for layer in self._slot_layers():
            if layer.is_initialized:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]

    def extract(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of one slot's first ``length`` positions, per layer ``[kv_heads, length, head_dim]``."""
        return [
            (layer.keys[slot, :, :length].clone(), layer.values[slot, :, :length].clone())
            for layer in self._slot_layers()
        ]

    def insert(self, slots: Tensor, prefix: list[tuple[Tensor, Tensor]]) -> None:
        """Put a stored prefix at the start of each of ``slots``."""
        for layer, (keys, values) in zip(self._slot_layers(), prefix, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[slots, :, : keys.shape[1]] = keys
            layer.values[slots, :, : values.shape[1]] = values

    def _slot_layers(self) -> list[Any]:
        return self.layers


def _round_up(n: int) -> int:
    return -(-n // GROWTH) * GROWTH
