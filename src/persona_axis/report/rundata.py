"""From a finished run to what the summary and the report show."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from persona_axis.collect.cells import UNJUDGED, Row, shard_cells, verdict_class
from persona_axis.collect.filters import CLASSES, Kind
from persona_axis.collect.judging import read_exchanges, read_verdicts
from persona_axis.collect.likelihood import Null
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.collect.verdicts import Exchange, Verdict
from persona_axis.files.shards import read_rows
from persona_axis.geometry.fit import Fit
from persona_axis.report.data import EvidenceGroup, EvidenceSummary, HeldDemo, HeldRow, ReportData, SampleRollout
from persona_axis.settings import RunSettings
from persona_axis.study.holding import Held

ENDS = 10
SAMPLED_ROLES = 3  # from each end of the ranking


def summarise(
    run: RunDir,
    settings: RunSettings,
    fit: Fit,
    seconds: dict[str, float],
    kind: Kind | None,
    null: Null | None,
) -> dict[str, Any]:
    """The content of ``summary.json``; per-layer lists are in the order of ``layers``."""
    facts = run.facts("model")
    tokens = count_tokens(run)
    names = [role.name for role in fit.ranking]
    generate = seconds.get("generate", 0.0)
    return {
        "model": facts["name"],
        "revision": facts["revision"],
        "dtype": facts["dtype"],
        "device": facts["device"],
        "n_layers": facts["n_layers"],
        "d_model": facts["d_model"],
        "rollouts": len(run.plan.rows),
        "tokens": tokens,
        "seconds": {k: round(seconds.get(k, 0.0), 3) for k in ("load", "generate", "judge", "fit", "hold", "total")},
        "tokens_per_second": round(tokens / generate, 1) if generate else None,
        "engine": facts["engine"],
        "engine_reason": facts["engine_reason"],
        "ignored_generation_settings": facts["ignored_generation_settings"],
        "layers": fit.layers,
        "layer": fit.layer,
        "most_reliable_layer": fit.most_reliable_layer,
        "cos_axis_pc1": [f.cos_axis_pc1.value for f in fit.per_layer],
        "cos_axis_pc1_unfiltered": [f.cos_axis_pc1_unfiltered for f in fit.per_layer],
        "pc1_share": [f.pc_shares[0] for f in fit.per_layer],
        "components_70": [f.components_70 for f in fit.per_layer],
        "assistant_edge_distance": fit.edge_distance.value,
        "assistant_edge_distance_in_sample": fit.edge_distance_in_sample,
        "reliability": [f.reliability for f in fit.per_layer],
        "roles_low": names[:ENDS],
        "roles_high": names[::-1][:ENDS],
        "dropped": {role.name: role.reason for role in fit.dropped},
        "filter": fit.filter,
        "judge": judge_counts(run, settings.judge, kind, null, fit.filter),
        "null": null.to_dict() if null else None,
        "estimator": fit.estimator,
        "seed": settings.seed,
        "catalog_hash": run.catalog_hash,
        "config_hash": run.config_hash,
        "notes": _notes(fit, facts),
    }


def _notes(fit: Fit, facts: dict[str, Any]) -> list[str]:
    notes = []
    if fit.filter_note:
        notes.append(fit.filter_note)
    if facts["engine_reason"]:
        notes.append(f"Generated with model.generate: {facts['engine_reason']}")
    return notes


def count_tokens(run: RunDir) -> int:
    """Tokens generated, end-of-turn tokens included."""
    total = 0
    for shard in range(run.plan.n_shards):
        table = read_rows(run.rollouts, shard_name(shard), ["reply_ids"], config_hash=run.config_hash, log=run.log)
        column = table["reply_ids"].combine_chunks()
        total += len(column.values) if len(column) else 0
    return total


def judge_counts(run: RunDir, name: str, kind: Kind | None, null: Null | None, applied: str) -> dict[str, Any]:
    """Role rollouts kept, dropped and failed under the filter as applied."""
    threshold = null.threshold if null else None
    kept = dropped = failed = 0
    for cells in shard_cells(run, None if kind is None else name, threshold):
        for persona, cls, n in zip(cells.persona, cells.verdict_class, cells.count, strict=True):
            if persona == DEFAULT:
                continue
            if Row(persona, CLASSES[applied]).takes(persona, cls):
                kept += n
            else:
                dropped += n
            failed += n * (cls == UNJUDGED and kind is not None)
    return {"name": name, "kept": kept, "dropped": dropped, "failed": failed}


def report_data(
    run: RunDir,
    judge_name: str,
    fit: Fit,
    summary: dict[str, Any],
    kind: Kind | None,
    null: Null | None,
    held: Held | None,
) -> ReportData:
    """Everything the report shows. Texts are read shard by shard; only those shown are held."""
    collector = _Collector(fit, kind, null)
    for exchange, verdict in _judged(run, None if kind is None else judge_name):
        collector.add(exchange, verdict)
    groups = {row.persona: row.group for row in run.plan.rows}
    return ReportData(
        title=f"Assistant Axis of {summary['model']}",
        summary=summary,
        fit=fit,
        samples=collector.samples(),
        evidence=collector.evidence(groups) if kind is not None else None,
        held=held_section(held) if held else None,
    )


def _judged(run: RunDir, judge_name: str | None) -> Any:
    exchanges = read_exchanges(run)
    for shard, rows in run.plan.shards():
        if not run.has_rollouts(shard):
            continue
        verdicts = read_verdicts(run, judge_name, shard) if judge_name else [None] * len(rows)
        for verdict in verdicts:
            yield next(exchanges), verdict


class _Collector:
    """Picks the rollouts worth showing and tallies the judge's numbers."""

    def __init__(self, fit: Fit, kind: Kind | None, null: Null | None) -> None:
        self.fit = fit
        self.kind = kind
        self.null = null
        self.classes = CLASSES[fit.filter]
        ranked = [role.name for role in fit.ranking]
        middle = ranked[len(ranked) // 2 : len(ranked) // 2 + 1]
        self.shown = [*ranked[:SAMPLED_ROLES], *middle, *ranked[-SAMPLED_ROLES:], DEFAULT]
        self.found: dict[str, list[SampleRollout]] = {name: [] for name in self.shown}
        self.numbers: dict[str, list[float]] = {}
        self.kept: dict[str, int] = {}
        self.total: dict[str, int] = {}

    def add(self, e: Exchange, v: Verdict | None) -> None:
        threshold = self.null.threshold if self.null else None
        cls = UNJUDGED if v is None else verdict_class(v, threshold)
        number = None if v is None else (v.evidence if self.kind == "evidence" else v.score)
        kept = e.persona == DEFAULT or self.classes is None or cls in self.classes
        self.total[e.persona] = self.total.get(e.persona, 0) + 1
        self.kept[e.persona] = self.kept.get(e.persona, 0) + kept
        if number is not None:
            self.numbers.setdefault(e.persona, []).append(float(number))
        if e.persona in self.found:
            name = "score" if self.kind == "score" else "evidence"
            self.found[e.persona].append(
                SampleRollout(e.persona, e.system_prompt, e.question, e.reply, number, name, kept, "")  # type: ignore[arg-type]
            )

    def samples(self) -> list[SampleRollout]:
        """Strongest, median and weakest of each shown persona."""
        out = []
        for name in self.shown:
            ordered = sorted(self.found[name], key=lambda s: (s.number is None, -(s.number or 0.0)))
            if ordered:
                out += [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})]
        return out

    def evidence(self, groups: dict[str, str]) -> EvidenceSummary:
        by_group: dict[str, list[str]] = {}
        for persona in self.total:
            by_group.setdefault(groups[persona] or DEFAULT, []).append(persona)
        made = [
            EvidenceGroup(
                group,
                [x for p in personas for x in self.numbers.get(p, [])],
                sum(self.kept[p] for p in personas),
                sum(self.total[p] for p in personas),
            )
            for group, personas in by_group.items()
        ]
        if self.kind == "evidence" and self.null:
            note = f"95th percentile of {self.null.n} default replies between neutral prompts"
            return EvidenceSummary("evidence", made, self.null.threshold, note)
        bar = {"score==3": 3.0, "score>=2": 2.0}.get(self.fit.filter)
        return EvidenceSummary("score", made, bar, self.fit.filter if bar else "")


def held_section(held: Held) -> HeldDemo:
    """The report's view of the steer-and-cap demonstration: one row per role."""
    layers = held.policy.layers
    pool = held.policy.provenance["pool"]
    first: dict[str, HeldRow] = {}
    for r in held.rows:
        row = HeldRow(r.row.persona, r.row.question, r.replies["plain"], r.replies["steered"], r.replies["capped"])
        first.setdefault(r.row.persona, row)
    description = (
        f"Capped: layers {layers[0]}-{layers[-1]}, floor at the 75th percentile toward the Assistant (the paper's "
        f"25th on its negated axis) of {pool:,} replies' projections. Steered: {held.strength:+.1f} along the axis at "
        "its analysed layer, one Assistant-to-roles distance away from the Assistant."
    )
    return HeldDemo(description, list(first.values()), held.mean_evidence, held.perplexity_ratio)


def held_summary(held: Held) -> dict[str, Any]:
    """The demonstration's figures for ``summary.json``: evidence in nats per token."""
    return {
        "layers": list(held.policy.layers),
        "percentile_assistant": held.policy.provenance["percentile_assistant"],
        "percentile_paper": held.policy.provenance["percentile_paper"],
        "steering_strength": held.strength,
        "rollouts": len(held.rows),
        "mean_evidence": {way: asdict(interval) for way, interval in held.mean_evidence.items()},
        "perplexity_ratio": held.perplexity_ratio,
    }
