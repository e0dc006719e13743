"""From a finished run to a policy: which layers to cap at which floors, chosen on one half, judged on the other.

``DIR/calibration/calibration.json`` holds every candidate with its figures and their intervals, the choice, the rule,
the pool and the split; ``DIR/calibration/policy/`` is the chosen policy. Figures are journalled as they are measured
(``measured-*.journal``): a calibration that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from persona_axis.catalog.transcripts import read_transcripts
from persona_axis.collect.filters import Kind
from persona_axis.collect.fitting import FitSettings
from persona_axis.collect.judging import read_exchanges, read_verdicts
from persona_axis.collect.means import percentiles
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange
from persona_axis.errors import UsageError
from persona_axis.files.atomic import make_folder, remove_stale_temps, write_json
from persona_axis.geometry.axis import Axis
from persona_axis.model.engine import Engine, Sampling
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import Passage
from persona_axis.settings import CalibrationSettings
from persona_axis.steering.artifact import TOOL_VERSION
from persona_axis.steering.calibration import (
    RULE,
    Candidate,
    Rung,
    choose,
    floors,
    fronts,
    paper_percentile,
    rungs,
    windows,
)
from persona_axis.steering.policy import Policy
from persona_axis.study.half import Half, HalfFit, fit_half, halves
from persona_axis.study.ledger import Ledger
from persona_axis.study.measures import Measures, Pressure, neutral_passages
from persona_axis.study.sweep import Material, Outcome, Sweep, spread_neutral, spread_rows
from persona_axis.study.tasks import task_scores, tasks_record

FORMAT = "persona-axis/calibration/1"
LIKELIHOOD = "likelihood"  # the measure of pressure when none is passed in


class Counter(Protocol):
    """Is told after each measurement of a candidate."""

    def done(self) -> None: ...


Stage = Callable[[int], AbstractContextManager[Counter]]  # how many measurements are ahead -> their counter


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a calibration found.

    Attributes:
        path: ``DIR/calibration``.
        axis: fitted on half A.
        outcomes: of every candidate on half A, in the last round it reached.
        finalists: on half B, those of the last round.
        chosen: by the rule; None when no finalist is fluent.
        record: what ``calibration.json`` holds.
    """

    path: Path
    axis: Axis
    outcomes: dict[Candidate, Outcome]
    finalists: dict[Candidate, Outcome]
    chosen: Candidate | None
    record: dict[str, Any]


def calibrate_run(
    run: RunDir,
    axis: Axis,
    chat: ChatModel,
    engine: Engine,
    sampling: Sampling,
    settings: CalibrationSettings,
    stage: Stage,
    kind: Kind | None,
    pressure: Pressure | None = None,
) -> Calibration:
    """Sweep caps over windows of layers and percentiles; write ``DIR/calibration``.

    Args:
        run: finished, with every verdict.
        axis: the run's own; says how it was fitted.
        chat, engine, sampling: as the run was generated.
        stage: is asked for a counter once the number of measurements is known.
        kind: what the run's judge gives.
        pressure: another measure than the likelihood judge's evidence; has a ``name``.

    Raises:
        UsageError: too few roles or questions to halve, no kept activations, a window that is none, or a pressure
            without a name.
        FitError: half of the run is too little for an axis, or shows no pressure.
    """
    meta, measure = axis.metadata, pressure_name(pressure)
    seed = int(meta["seed"])
    a, b = halves(run.plan, seed)
    fit_settings = FitSettings(meta["filter"], meta["min_count"], meta["estimator"], None, seed)
    judge = None if kind is None else meta["judge"]
    fitted = fit_half(run, a, judge, kind, fit_settings, axis.layers, axis.vectors.shape[1])
    axis_a = Axis(fitted.axes, axis.layers, axis.layer, {**meta, "half": "A", "pool": pool_record(fitted)})
    policies = candidates(axis_a, fitted, settings, chat.n_layers)

    exchanges = list(read_exchanges(run))
    evidence = evidence_of(run, judge) if kind == "evidence" and judge else {}
    theirs = own_neutral(chat, settings.neutral) if settings.neutral else None
    measures = Measures(chat, engine, sampling, run.plan.neutral_prompts, pressure)
    materials = [
        material(run, half, measures, exchanges, evidence, theirs, i, seed, settings) for i, half in enumerate((a, b))
    ]
    rounds = rungs(len(policies), len(materials[0].rows), len(materials[0].passages))
    steps = sum(r.candidates for r in rounds) + rounds[-1].candidates

    folder = run.path / "calibration"
    make_folder(folder)
    remove_stale_temps(folder)
    plain_tasks = task_scores(folder, chat, None, settings, seed) if settings.tasks else {}
    identity = measuring_hash(run, chat, sampling, theirs, pressure)
    ledgers = [Ledger(folder / f"measured-{half}-{identity[:12]}.journal", identity) for half in "AB"]
    with ExitStack() as stack:
        for ledger in ledgers:
            stack.callback(ledger.close)
        counter = stack.enter_context(stage(steps))
        sweeps = [
            Sweep(measures, ledger, m, evidence, seed, counter.done)
            for ledger, m in zip(ledgers, materials, strict=True)
        ]
        outcomes = sweeps[0].halving(policies, rounds, settings.max_perplexity)
        finalists = last_round(outcomes, rounds)
        whole = len(materials[1].rows), len(materials[1].passages)
        judged = {c: sweeps[1].outcome(c, policies[c], *whole) for c in finalists}
    best = choose([outcomes[c].scored for c in finalists], settings.max_perplexity)
    chosen = best.candidate if best else None
    tasks = {}
    if settings.tasks and chosen is not None:
        tasks = tasks_record(plain_tasks, task_scores(folder, chat, policies[chosen], settings, seed))
    record = calibration_record(run, axis_a, fitted, settings, measure, (a, b), rounds, outcomes, judged, chosen, tasks)
    found = Calibration(folder, axis_a, outcomes, judged, chosen, record)
    write_calibration(found, policies)
    return found


def last_round(outcomes: dict[Candidate, Outcome], rounds: Sequence[Rung]) -> list[Candidate]:
    """Who met every prompt of half A."""
    return [c for c, o in outcomes.items() if o.prompts == rounds[-1].prompts]


def candidates(axis: Axis, fitted: HalfFit, settings: CalibrationSettings, n_layers: int) -> dict[Candidate, Policy]:
    """Every window of layers at every percentile, as a policy.

    By default from a third of the model's depth on: in the first third no cap held anything on the embedded model, and
    the paper's best windows lie at 0.7 and more.
    """
    layers = settings.layers or tuple(layer for layer in axis.layers if layer >= n_layers / 3)
    widths = settings.widths or sorted({max(1, round(n_layers / 8)), max(1, round(n_layers / 4))})
    found = {}
    for window in windows(sorted(set(layers)), widths, settings.stride):
        for percentile in settings.percentiles:
            candidate = Candidate(window, percentile)
            found[candidate] = Policy.cap(
                axis,
                floors(fitted.pool, axis.layers, candidate),
                positions=settings.positions,
                percentile_assistant=percentile,
                percentile_paper=paper_percentile(percentile),
                pool=len(fitted.pool),
            )
    return found


def pool_record(fitted: HalfFit) -> dict[str, Any]:
    """What the floors refer to."""
    return {
        **percentiles(fitted.pool),
        "roles": fitted.pool_roles,
        "traits": 0,
        "default": fitted.pool_default,
        "scores": "all",
        "cross_fitted": True,
    }


def evidence_of(run: RunDir, judge: str) -> dict[str, float]:
    """The likelihood judge's verdicts, by rollout."""
    verdicts = (v for shard in range(run.plan.n_shards) for v in read_verdicts(run, judge, shard))
    return {v.key: v.evidence for v in verdicts if v.evidence is not None}


def own_neutral(chat: ChatModel, path: Path) -> list[Passage]:
    """A user's conversations: every assistant turn is a neutral reply.

    Raises:
        UsageError: no assistant turn in them.
    """
    passages = []
    for number, transcript in enumerate(read_transcripts(path)):
        tokens = chat.template.tokenise(transcript.messages)
        spans = tuple((s.start, s.end) for s in tokens.segments if s.role == "assistant" and s.part == "content")
        if spans:
            passages.append(Passage(f"{path.name}/{number}", tokens.token_ids, spans, replies=spans))
    if len(passages) < 2:
        raise UsageError(
            f"{path} holds {len(passages)} conversations with an assistant turn; at least one for each half is needed."
        )
    return passages


def material(
    run: RunDir,
    half: Half,
    measures: Measures,
    exchanges: Sequence[Exchange],
    evidence: dict[str, float],
    theirs: Sequence[Passage] | None,
    which: int,
    seed: int,
    settings: CalibrationSettings,
) -> Material:
    """What candidates are measured on in a half (0 is A); ``theirs`` are a user's own neutral passages, of both."""
    mine = {row.key for row in run.plan.rows if half.holds(row)}
    inside = {e.key: e for e in exchanges if e.key in mine}
    default = [e for e in inside.values() if e.persona == DEFAULT and e.reply_ids]
    default = spread_neutral(default, seed, settings.neutral_replies)
    if theirs is None:
        passages = neutral_passages(measures.chat, default)
    else:
        passages = list(theirs[which::2])[: settings.neutral_replies]
    rows = spread_rows(run.plan, half, seed, settings.prompts)
    return Material(
        rows, {row.key: inside[row.key] for row in rows}, passages, measures.neutral_fluency(default, evidence)
    )


def measuring_hash(
    run: RunDir, chat: ChatModel, sampling: Sampling, theirs: Sequence[Passage] | None, pressure: Pressure | None
) -> str:
    """Over everything beside a policy that decides what is measured of it."""
    parts = {
        "run": run.config_hash,
        "revision": chat.revision,
        "dtype": chat.dtype,
        "sampling": asdict(sampling),
        "pressure": pressure_name(pressure),
        "neutral": None if theirs is None else [(p.key, p.token_ids, p.spans) for p in theirs],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pressure_name(pressure: Pressure | None) -> str:
    """What a measure's figures are kept under.

    Raises:
        UsageError: it has no name of its own, so that a resume could take another measure's figures for its own.
    """
    if pressure is None:
        return LIKELIHOOD
    name = getattr(pressure, "name", None)
    if not isinstance(name, str) or name in ("", LIKELIHOOD):
        raise UsageError(
            "A pressure function needs a name that says what it measures (measure.name = 'harm'): figures are kept "
            "under it, so that a calibration that was stopped goes on."
        )
    return name


# ---- what is written ---------------------------------------------------------------------------------------------


def outcome_record(o: Outcome) -> dict[str, Any]:
    return {
        "pressure": {
            "reduction": asdict(o.reduction),
            "held": o.pressure,
            "plain": o.plain_pressure,
            "prompts": o.prompts,
            "missing": o.missing,
            "by_role": {role: {"plain": plain, "held": held} for role, (plain, held) in o.by_role.items()},
        },
        "capability": {
            "perplexity_ratio": asdict(o.perplexity_ratio),
            "top1_agreement": asdict(o.top1_agreement),
            "mean_kl": asdict(o.mean_kl),
            "replies": o.neutral_replies,
        },
        "fluent": not o.objections,
        "fluency": {
            "objections": o.objections,
            "held": asdict(o.held_fluency),
            "plain": asdict(o.plain_fluency),
            "neutral": asdict(o.neutral_fluency),
        },
    }


def calibration_record(
    run: RunDir,
    axis: Axis,
    fitted: HalfFit,
    settings: CalibrationSettings,
    measure: str,
    split: tuple[Half, Half],
    rounds: Sequence[Rung],
    outcomes: dict[Candidate, Outcome],
    judged: dict[Candidate, Outcome],
    chosen: Candidate | None,
    tasks: dict[str, Any],
) -> dict[str, Any]:
    """``calibration.json``: a candidate's figures are half A's, ``held_out`` is half B's."""
    # Who met fewer prompts has figures too rough to lie before those who met all.
    levels = dict(zip(judged, fronts([outcomes[c].scored for c in judged]), strict=True))

    def entry(candidate: Candidate) -> dict[str, Any]:
        outcome = outcomes[candidate]
        return {
            "layers": list(candidate.layers),
            "percentile_paper": paper_percentile(candidate.percentile),
            "percentile_assistant": candidate.percentile,
            "floors": [float(i.lo[0]) for i in outcome.policy.interventions],
            "policy_hash": outcome.policy.content_hash,
            "front": levels.get(candidate) == 0,
            **outcome_record(outcome),
            "held_out": outcome_record(judged[candidate]) if candidate in judged else None,
        }

    return {
        "format": FORMAT,
        "version": TOOL_VERSION,
        "run": {"config_hash": run.config_hash, "model": axis.metadata["model"], "revision": axis.metadata["revision"]},
        "axis_hash": axis.content_hash,
        "filter": fitted.filter,
        "dropped_roles": [d.name for d in fitted.dropped],
        "positions": settings.positions,
        "pressure": measure,
        "candidates": [entry(c) for c in outcomes],
        "chosen": entry(chosen) if chosen else None,
        "tasks": tasks,
        "rule": RULE.format(limit=settings.max_perplexity),
        "max_perplexity": settings.max_perplexity,
        "rounds": [asdict(r) for r in rounds],
        "pool": axis.metadata["pool"],
        "split": {
            "seed": axis.metadata["seed"],
            **{name: {"roles": list(h.roles), "blocks": sorted(h.blocks)} for name, h in zip("AB", split, strict=True)},
        },
    }


def write_calibration(found: Calibration, policies: dict[Candidate, Policy]) -> None:
    """The record last: it says which policy the folder holds."""
    found.axis.save(found.path / "axis.safetensors")
    if found.chosen is None:
        shutil.rmtree(found.path / "policy", ignore_errors=True)
    else:
        chosen = policies[found.chosen]
        held_out = found.record["chosen"]["held_out"]
        provenance = {**chosen.provenance, "calibration": {"rule": found.record["rule"], "held_out": held_out}}
        Policy(chosen.interventions, provenance, chosen.positions, chosen.model).save(found.path / "policy")
    write_json(found.path / "calibration.json", found.record)
