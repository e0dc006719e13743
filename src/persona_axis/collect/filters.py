"""Which rollouts of a role count: the filter, its fallback, and roles that keep too few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from persona_axis.collect.cells import Row, ShardCells, counts
from persona_axis.collect.plan import DEFAULT
from persona_axis.errors import FitError, UsageError
from persona_axis.geometry.fit import DroppedRole

Kind = Literal["evidence", "score"]
Filter = Literal["auto", "none", "expressed", "score>=2", "score==3"]
FILTERS = ("auto", "none", "expressed", "score>=2", "score==3")
CLASSES: dict[str, frozenset[int] | None] = {
    "none": None,
    "expressed": frozenset({1}),
    "score>=2": frozenset({2, 3}),
    "score==3": frozenset({3}),
}
_NEXT = {"score==3": "score>=2", "score>=2": "none", "expressed": "none"}


@dataclass(frozen=True)
class Applied:
    """The filter as applied."""

    name: str
    note: str  # why it fell back, "" when it did not
    table: list[Row]  # the Assistant first, then the roles that stay
    dropped: list[DroppedRole]


def check_filter(name: str, kind: Kind | None) -> None:
    """Raise UsageError for an unknown filter, or one this judge gives no verdicts for."""
    if name not in FILTERS:
        raise UsageError(f"Unknown filter {name!r}; choose from {', '.join(FILTERS)}.")
    needs = {"expressed": "evidence", "score>=2": "score", "score==3": "score"}.get(name)
    if needs and needs != kind:
        other = "an LLM judge (--judge MODEL)" if needs == "score" else "--judge likelihood"
        raise UsageError(f"--filter {name!r} needs {other}.")


def apply_filter(
    cells: Sequence[ShardCells],
    personas: Sequence[str],
    n_blocks: int,
    name: str,
    kind: Kind | None,
    min_count: int,
    paper: bool,
) -> Applied:
    """Decide the filter and who stays.

    Args:
        personas: the default persona first.
        kind: what the judge gives; None when nothing was judged.
        paper: also a score-2 vector per role, for the PCA only (the paper's recipe).

    Raises:
        FitError: fewer than 3 roles stay, or the default persona has too few rollouts.
    """
    check_filter(name, kind)
    wanted = name
    if name == "auto":
        wanted = {"evidence": "expressed", "score": "score==3", None: "none"}[kind]
    applied = _try(cells, personas, n_blocks, wanted, min_count, "")
    roles = len(personas) - 1
    if name == "auto" and wanted in _NEXT and len(applied.table) - 1 < roles / 2:
        note = (
            f"{wanted} kept at least {min_count} rollouts for only {len(applied.table) - 1} of {roles} roles, "
            f"so the filter fell back to {_NEXT[wanted]}"
        )
        applied = _try(cells, personas, n_blocks, _NEXT[wanted], min_count, note)
    if len(applied.table) < 4:
        raise FitError(
            f"With filter {applied.name!r} only {len(applied.table) - 1} roles keep {min_count} rollouts; an axis "
            "needs at least 3. Use a looser --filter, a smaller --min-count, or more --questions."
        )
    if paper and kind == "score" and applied.name == "score==3":
        applied = _with_partial(applied, cells, n_blocks, min_count)
    return applied


def _try(
    cells: Sequence[ShardCells], personas: Sequence[str], n_blocks: int, name: str, min_count: int, note: str
) -> Applied:
    table = [Row(DEFAULT)]
    table += [Row(p, CLASSES[name]) for p in personas if p != DEFAULT]
    kept = counts(cells, table, n_blocks).sum(1)
    total = counts(cells, [Row(row.persona) for row in table], n_blocks).sum(1)
    if kept[0] < min_count:
        raise FitError(f"The default persona has only {int(kept[0])} rollouts; at least {min_count} are needed.")
    stays, dropped = [table[0]], []
    for row, k, n in zip(table[1:], kept[1:].tolist(), total[1:].tolist(), strict=True):
        if k >= min_count:
            stays.append(row)
        else:
            reason = f"{int(k)} of {int(n)} rollouts pass {name!r}; at least {min_count} are needed"
            dropped.append(DroppedRole(row.persona, reason))
    return Applied(name, note, stays, dropped)


def _with_partial(applied: Applied, cells: Sequence[ShardCells], n_blocks: int, min_count: int) -> Applied:
    """Add the paper's score-2 vectors (at least ``min_count`` replies), which enter the PCA but not the axis."""
    partial = [Row(row.persona, frozenset({2}), in_axis=False) for row in applied.table if row.persona != DEFAULT]
    enough = counts(cells, partial, n_blocks).sum(1) >= min_count
    table = applied.table + [row for row, e in zip(partial, enough.tolist(), strict=True) if e]
    return Applied(applied.name, applied.note, table, applied.dropped)
