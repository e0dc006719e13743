"""Running a judge over finished rollouts: verdicts per shard, journalled, failures retried on resume."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from persona_axis.collect.likelihood import Null
from persona_axis.collect.plan import DEFAULT, PlanRow
from persona_axis.collect.rollouts import content_ids
from persona_axis.collect.rundir import VERDICT_SCHEMA, RunDir, shard_name
from persona_axis.collect.verdicts import Exchange, Judge, Verdict
from persona_axis.errors import JudgeError
from persona_axis.files.atomic import make_folder, remove_stale_temps
from persona_axis.files.journal import Journal
from persona_axis.files.shards import is_complete, read_rows, write_shard

OnVerdict = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Judged:
    """Verdict counts over all rollouts judged so far."""

    ok: int
    failed: int


def judge_rollouts(
    run: RunDir, judge: Judge, shards: range | None = None, on_verdict: OnVerdict = lambda: None
) -> Judged:
    """Judge every rollout that has no verdict yet, and again those whose verdict failed.

    Raises:
        JudgeError: the judge cannot be used at all; verdicts given before are kept.
    """
    folder = run.judge(judge.name)
    make_folder(folder)
    remove_stale_temps(folder)
    ok = failed = 0
    for shard, rows in run.plan.shards():
        if (shards is not None and shard not in shards) or not run.has_rollouts(shard):
            continue
        verdicts = _judge_shard(run, judge, shard, rows, on_verdict)
        ok += sum(v.status == "ok" for v in verdicts)
        failed += sum(v.status == "failed" for v in verdicts)
    return Judged(ok, failed)


def _judge_shard(run: RunDir, judge: Judge, shard: int, rows: list[PlanRow], on_verdict: OnVerdict) -> list[Verdict]:
    folder, name = run.judge(judge.name), shard_name(shard)
    complete = is_complete(folder, name, run.config_hash)
    found = {v.key: v for v in (read_verdicts(run, judge.name, shard) if complete else [])}
    if complete and all(v.status == "ok" for v in found.values()):
        return list(found.values())
    journal = Journal(folder / f"{name}.journal", run.config_hash)
    for header, _ in journal.read():
        verdict = Verdict(**header)
        found[verdict.key] = verdict
    todo = [row for row in rows if row.key not in found or found[row.key].status == "failed"]
    for verdict in _verdicts(judge, _exchanges(run, shard, todo)):
        journal.append(asdict(verdict), {})
        found[verdict.key] = verdict
        on_verdict()
    missing = [row.key for row in rows if row.key not in found]
    if missing:
        raise JudgeError(f"Judge {judge.name} gave no verdict for {len(missing)} rollouts, e.g. {missing[0]}.")
    verdicts = [found[row.key] for row in rows]
    write_shard(folder, name, [asdict(v) for v in verdicts], VERDICT_SCHEMA, {}, run.config_hash)
    journal.delete()
    return verdicts


def _verdicts(judge: Judge, exchanges: list[Exchange]) -> Iterator[Verdict]:
    """An empty reply has no activation and enters no figure: it is put to no judge, now or on a resume."""
    for e in exchanges:
        if not e.reply_ids:
            yield Verdict(e.key, "ok", detail="the reply is empty")
    yield from judge.judge([e for e in exchanges if e.reply_ids])


def unjudged(run: RunDir, judge_name: str) -> int:
    """Rollouts of the plan without an "ok" verdict of this judge."""
    done = 0
    for shard in range(run.plan.n_shards):
        if is_complete(run.judge(judge_name), shard_name(shard), run.config_hash):
            done += sum(v.status == "ok" for v in read_verdicts(run, judge_name, shard))
    return len(run.plan.rows) - done


def read_verdicts(run: RunDir, judge_name: str, shard: int) -> list[Verdict]:
    """One shard's verdicts, in plan order."""
    table = read_rows(run.judge(judge_name), shard_name(shard), config_hash=run.config_hash)
    return [Verdict(**row) for row in table.to_pylist()]


def read_exchanges(run: RunDir) -> Iterator[Exchange]:
    """Every finished rollout, shard by shard."""
    for shard, rows in run.plan.shards():
        if run.has_rollouts(shard):
            yield from _exchanges(run, shard, rows)


def _exchanges(run: RunDir, shard: int, rows: list[PlanRow]) -> list[Exchange]:
    if not rows:
        return []
    columns = ["key", "reply_ids", "logprobs", "content_start", "finish_reason", "text"]
    table = read_rows(run.rollouts, shard_name(shard), columns, config_hash=run.config_hash, log=run.log)
    made = {r["key"]: r for r in table.to_pylist()}
    return [_exchange(row, made[row.key]) for row in rows]


def _exchange(row: PlanRow, made: dict[str, Any]) -> Exchange:
    start, reason = made["content_start"], made["finish_reason"]
    ids = content_ids(np.asarray(made["reply_ids"]), start, reason)
    logprobs = content_ids(np.asarray(made["logprobs"]), start, reason)
    return Exchange(
        key=row.key,
        persona=row.persona,
        rubric=row.rubric,
        system_prompt=row.system_prompt,
        question=row.question,
        reply=made["text"],
        reply_ids=tuple(int(i) for i in ids),
        logprob=float(logprobs.mean()) if len(logprobs) else None,
    )


def null_of(run: RunDir, judge_name: str, blocks: Collection[int] | None = None) -> Null:
    """The likelihood judge's null, from all default replies judged so far (to questions of ``blocks`` only)."""
    evidence = []
    for shard, rows in run.plan.shards():
        if all(row.persona != DEFAULT for row in rows):
            break  # the default persona comes first
        for row, verdict in zip(rows, read_verdicts(run, judge_name, shard), strict=True):
            meant = row.persona == DEFAULT and (blocks is None or row.block in blocks)
            if meant and verdict.evidence is not None:
                evidence.append(verdict.evidence)
    return Null.of(evidence)
