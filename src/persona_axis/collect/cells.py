"""Sums of activations per persona, question and verdict class: what every fit is made from.

A rollout's *class* is what the filter looks at: the 0-3 score of an LLM judge, 1 or 0 for expressed or not of the
likelihood judge, -1 without a verdict. Counts are taken first (they decide the filter and who is dropped); means follow
(``collect/means.py``), for as many layers at a time as fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from persona_axis.collect.judging import read_verdicts
from persona_axis.collect.plan import DEFAULT, PlanRow
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.collect.verdicts import Verdict
from persona_axis.files.atomic import make_folder
from persona_axis.files.shards import drop_arrays, is_complete, open_arrays, read_rows, write_shard

UNJUDGED = -1
CELL_BYTES = 1 << 30  # sums held at once
FOLDED_SCHEMA = pa.schema(
    [
        ("persona", pa.string()),
        ("block", pa.int32()),
        ("verdict_class", pa.int8()),
        ("count", pa.int32()),
        ("first_row", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a fit's table: which rollouts of which persona it averages."""

    persona: str
    classes: frozenset[int] | None = None  # None is every rollout
    in_axis: bool = True
    in_space: bool = True

    def takes(self, persona: str, verdict_class: int) -> bool:
        return persona == self.persona and (self.classes is None or verdict_class in self.classes)


@dataclass(frozen=True, slots=True)
class ShardCells:
    """A finished shard reduced to what counting needs: per entry persona, block, class, rollouts."""

    shard: int
    folded: bool
    persona: list[str]
    block: list[int]
    verdict_class: list[int]
    count: list[int]


def verdict_class(verdict: Verdict, threshold: float | None) -> int:
    """The class of a verdict; ``threshold`` is the likelihood null's."""
    if verdict.status != "ok":
        return UNJUDGED
    if verdict.evidence is not None and threshold is not None:
        return int(verdict.evidence > threshold)
    return UNJUDGED if verdict.score is None else verdict.score


def shard_cells(run: RunDir, judge_name: str | None, threshold: float | None) -> Iterator[ShardCells]:
    """Every finished shard's entries; rollouts without a counted token are left out.

    Args:
        judge_name: whose verdicts; None classes everything as unjudged.
    """
    for shard, rows in run.plan.shards():
        if is_complete(run.folded, shard_name(shard), run.config_hash):
            yield _folded_cells(run, shard)
        elif run.has_rollouts(shard):
            yield _whole_cells(run, shard, rows, judge_name, threshold)


def _folded_cells(run: RunDir, shard: int) -> ShardCells:
    table = read_rows(run.folded, shard_name(shard), config_hash=run.config_hash).to_pydict()
    return ShardCells(shard, True, table["persona"], table["block"], table["verdict_class"], table["count"])


def _whole_cells(
    run: RunDir, shard: int, rows: list[PlanRow], judge_name: str | None, threshold: float | None
) -> ShardCells:
    table = read_rows(run.rollouts, shard_name(shard), ["n_counted"], config_hash=run.config_hash, log=run.log)
    counted = table["n_counted"].to_pylist()
    if judge_name is None:
        classes = [UNJUDGED] * len(rows)
    else:
        classes = [verdict_class(v, threshold) for v in read_verdicts(run, judge_name, shard)]
    return ShardCells(
        shard,
        False,
        [row.persona for row in rows],
        [row.block for row in rows],
        classes,
        [int(n > 0) for n in counted],
    )


def counts(cells: Sequence[ShardCells], rows: Sequence[Row], n_blocks: int) -> Tensor:
    """Rollouts per table row and block, ``[len(rows), n_blocks]`` float32."""
    total = torch.zeros(len(rows), n_blocks)
    for shard in cells:
        for i, block, n in entries_of(shard, rows):
            total[i, block] += shard.count[n]
    return total


def entries_of(shard: ShardCells, rows: Sequence[Row]) -> Iterator[tuple[int, int, int]]:
    """(table row, block, entry of the shard) of every entry that a table row takes."""
    by_persona: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_persona.setdefault(row.persona, []).append(i)
    for n, (persona, block, cls) in enumerate(zip(shard.persona, shard.block, shard.verdict_class, strict=True)):
        if shard.count[n] == 0:
            continue
        for i in by_persona.get(persona, ()):
            if rows[i].takes(persona, cls):
                yield i, block, n


def layer_chunks(n_layers: int, n_rows: int, n_blocks: int, d_model: int) -> Iterator[slice]:
    """Ranges of captured layers whose sums fit in memory together."""
    step = max(1, CELL_BYTES // max(1, n_rows * n_blocks * d_model * 4))
    for start in range(0, n_layers, step):
        yield slice(start, min(n_layers, start + step))


def fold_shard(run: RunDir, shard: int, judge_name: str | None, threshold: float | None, keep_rows: set[str]) -> bool:
    """Replace a shard's activations by sums per (persona, block, class); those of ``keep_rows`` stay readable.

    Only when every rollout has its verdict (or nothing is judged: ``judge_name`` None). Returns whether the shard is
    folded now.
    """
    name = shard_name(shard)
    if is_complete(run.folded, name, run.config_hash):
        drop_arrays(run.rollouts, name)  # a kill may have come between the two
        return True
    rows = list(run.plan.shards())[shard][1]
    verdicts = read_verdicts(run, judge_name, shard) if judge_name is not None else []
    if any(v.status != "ok" for v in verdicts):
        return False
    whole = _whole_cells(run, shard, rows, judge_name, threshold)
    cells: dict[tuple[str, int, int], list[int]] = {}
    for n, where in enumerate(zip(whole.persona, whole.block, whole.verdict_class, strict=True)):
        if whole.count[n]:
            cells.setdefault(where, []).append(n)
    with open_arrays(run.rollouts, name, config_hash=run.config_hash, log=run.log) as arrays:
        values = arrays.read("activations")
    kept = [n for n, row in enumerate(rows) if row.key in keep_rows]
    folded = [
        {"persona": p, "block": b, "verdict_class": c, "count": len(ns), "first_row": ns[0]}
        for (p, b, c), ns in cells.items()
    ]
    sums = (
        np.stack([values[ns].sum(0, dtype=np.float64) for ns in cells.values()])
        if cells
        else np.zeros((0, *values.shape[1:]))
    )
    arrays_out = {
        "sums": sums.astype(np.float32),
        "kept_rows": np.array(kept, dtype=np.int32),
        "kept_activations": values[kept],
    }
    make_folder(run.folded)
    write_shard(run.folded, name, folded, FOLDED_SCHEMA, arrays_out, run.config_hash)
    drop_arrays(run.rollouts, name)
    return True


def rows_to_keep(run: RunDir, per_persona: int) -> set[str]:
    """Keys whose activations stay under ``--keep sample:N``: the default persona's, and N spread over each role."""
    keys: set[str] = set()
    by_persona: dict[str, list[str]] = {}
    for row in run.plan.rows:
        by_persona.setdefault(row.persona, []).append(row.key)
    for persona, mine in by_persona.items():
        if persona == DEFAULT:
            keys.update(mine)
        elif per_persona:
            step = max(1, len(mine) // per_persona)
            keys.update(mine[::step][:per_persona])
    return keys
