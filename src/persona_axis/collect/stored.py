"""Stored activations of a range of layers, shard by shard: read once when they fit in memory, else once per pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_axis.collect.cells import ShardCells
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.files.shards import open_arrays

KEPT_BYTES = 1 << 26  # activations held between passes: memory must not grow with the number of rollouts


@dataclass(frozen=True, slots=True, eq=False)
class ShardActivations:
    """What a finished shard holds of some layers.

    Attributes:
        entries: ``[entries, layers, d_model]``, a row per entry of ``cells``: an activation, or a folded sum.
        replies: ``[replies, layers, d_model]``, single replies' activations (of a folded shard those that were kept);
            zeros for a reply without a counted token.
        reply_rows: which of the shard's rows those replies are.
    """

    cells: ShardCells
    entries: Tensor
    replies: Tensor
    reply_rows: tuple[int, ...]


class StoredLayers:
    """Iterates over a run's finished shards, as often as needed."""

    def __init__(self, run: RunDir, cells: Sequence[ShardCells], layers: slice) -> None:
        self.run = run
        self.cells = cells
        self.layers = layers
        self._kept: list[ShardActivations] | None = None

    def __iter__(self) -> Iterator[ShardActivations]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[ShardActivations] | None = []
        size = 0
        for cells in self.cells:
            shard = self._read(cells)
            size += shard.entries.nbytes + (shard.replies.nbytes if shard.replies is not shard.entries else 0)
            if kept is not None and size <= KEPT_BYTES:
                kept.append(shard)
            else:
                kept = None
            yield shard
        self._kept = kept

    def _read(self, cells: ShardCells) -> ShardActivations:
        folder = self.run.folded if cells.folded else self.run.rollouts
        names = ("sums", "kept_activations") if cells.folded else ("activations",)
        with open_arrays(folder, shard_name(cells.shard), config_hash=self.run.config_hash, log=self.run.log) as arrays:
            found = [torch.from_numpy(arrays.read(name, second=self.layers)) for name in names]
            rows = arrays.read("kept_rows").tolist() if cells.folded else range(len(found[0]))
        return ShardActivations(cells, found[0], found[-1], tuple(rows))
