"""The whole job: plan, rollouts, verdicts, fit, report. The only place that joins the stages.

Each stage is a function of its own package and resumes by itself; this page says in which order they run and what
they are given. Nothing finished is done again: a model is loaded only when a stage still needs it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from persona_axis.catalog.catalog import load_catalog, read_default_prompts
from persona_axis.collect.cells import fold_shard, rows_to_keep
from persona_axis.collect.filters import Kind, check_filter
from persona_axis.collect.fitting import FitResult, FitSettings, analysed_layer, fit_run
from persona_axis.collect.judging import judge_rollouts, null_of, read_exchanges, unjudged
from persona_axis.collect.likelihood import NULL_REPLIES, LikelihoodJudge, Null
from persona_axis.collect.origin import load_origin
from persona_axis.collect.plan import DEFAULT, Plan, PlanRow, fit_budget, make_plan
from persona_axis.collect.rollouts import generate_rollouts
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Judge
from persona_axis.errors import ModelError, StorageError, UsageError
from persona_axis.files.atomic import write_json
from persona_axis.geometry.axis import Axis
from persona_axis.model.engine import LOOP, Engine, Sampling, engine_named
from persona_axis.model.identity import RECORDED, ModelIdentity
from persona_axis.model.loading import ChatModel, key_value_bytes, load_model
from persona_axis.model.reading import residual_norms
from persona_axis.model.selfcheck import EngineChoice, choose_engine
from persona_axis.report.html import write_report
from persona_axis.report.rundata import held_summary, report_data, summarise
from persona_axis.settings import CalibrationSettings, RunSettings
from persona_axis.study.calibrate import Calibration, calibrate_run
from persona_axis.study.holding import Held, hold_demo
from persona_axis.study.measures import Measures, Pressure, neutral_passages

if TYPE_CHECKING:
    from persona_axis.llm.client import LLMClient

DEFAULT_QUESTIONS = 60  # with every role 16,500 rollouts; the whole catalog would be 66,000
LARGE_RUN_BYTES = 20_000_000_000
WAVE_BYTES = 4_000_000_000  # activations on disk between two folds, when they are not kept
DEMO_ROLES = 36
DEMO_QUESTIONS = 16
DEMO_TOKENS = 24
NORM_REPLIES = 64  # default replies, at most, that the residual norms come from
HELD_ROLES = 12  # roles farthest from the Assistant that the demo tries to hold


class Stage(Protocol):
    """A stage under way."""

    def done(self, tokens: int = 0) -> None:
        """One step is finished; a rollout's has that many tokens."""
        ...

    def made(self, tokens: int) -> None:
        """Tokens made by the steps under way."""
        ...


class Reporter(Protocol):
    """Who is told how far the job is."""

    def stage(self, name: str, total: int, tokens_each: int = 0) -> AbstractContextManager[Stage]:
        """A stage of ``total`` steps, each of at most ``tokens_each`` tokens."""
        ...

    def note(self, text: str) -> None: ...


class Silent:
    """Tells nobody. Implements :class:`Reporter` and :class:`Stage`."""

    @contextmanager
    def stage(self, name: str, total: int, tokens_each: int = 0) -> Iterator[Stage]:
        yield self

    def note(self, text: str) -> None:
        pass

    def done(self, tokens: int = 0) -> None:
        pass

    def made(self, tokens: int) -> None:
        pass


@dataclass(frozen=True, eq=False)
class RunResult:
    """A finished job; everything in it is also in the folder."""

    path: Path
    summary: dict[str, Any]
    result: FitResult
    report: Path
    failed_verdicts: int


def run(settings: RunSettings | None = None, reporter: Reporter | None = None, **options: Any) -> RunResult:
    """From a chat model to its Assistant Axis. Resumes what ``out`` already holds.

    Args:
        settings: a :class:`RunSettings`, or its fields as keyword arguments (``run(model=..., out=...)``).
        reporter: is told about progress; None is silence.

    Returns:
        The fit, and where the report is. ``failed_verdicts`` > 0 means that the judge failed on some rollouts; run
        again to retry those.

    Raises:
        UsageError, RunConflict: wrong options, or a folder of another configuration.
        ModelError, JudgeError, FitError, StorageError, NonFiniteError: that stage failed; finished work is kept.
    """
    return _Job(settings or RunSettings(**options), reporter or Silent()).run()


def demo(out: Path | str, reporter: Reporter | None = None) -> RunResult:
    """The whole job on the embedded model, then its role prompts answered plain, steered and capped."""
    settings = RunSettings(
        model="embedded",
        out=Path(out),
        roles=str(DEMO_ROLES),
        questions=str(DEMO_QUESTIONS),
        max_tokens=DEMO_TOKENS,
        min_count=5,
    )
    return _Job(settings, reporter or Silent(), with_held=True).run()


def calibrate(
    path: Path | str,
    settings: CalibrationSettings | None = None,
    reporter: Reporter | None = None,
    pressure: Pressure | None = None,
    **options: Any,
) -> Calibration:
    """From a finished run to a policy, chosen by a stated rule and judged on what it was not chosen on.

    Resumes what ``path/calibration`` already holds.

    Args:
        path: a run folder.
        settings: a :class:`CalibrationSettings`, or its fields as keyword arguments.
        reporter: is told about progress; None is silence.
        pressure: another measure of how far a reply under a role prompt is its role, than the likelihood judge's
            evidence; takes exchanges, gives a number for each by key. Its ``name`` is recorded.

    Raises:
        UsageError: wrong options, a run that is not finished, or one too small to halve.
        ModelError, FitError, StorageError: that stage failed; what was measured is kept.
    """
    reporter = reporter or Silent()
    settings = settings or CalibrationSettings(**options)
    run, axis = _finished(Path(path))
    for layer in settings.layers or ():
        axis.at(layer)
    kind = judge_kind(axis.metadata["judge"])
    left = 0 if kind is None else unjudged(run, axis.metadata["judge"])
    if left:
        raise UsageError(f"{run.path} is not finished: {left} rollouts have no verdict. Repeat persona-axis run first.")
    facts, made = run.facts("model"), run.configuration
    with reporter.stage("load model", 1) as stage:
        chat = load_origin(path, axis, dtype=facts["dtype"], device=settings.device)
        stage.done()
    check_identity(run, chat)
    engine = choose_engine(chat, (axis.layer,), settings.batch_tokens or default_batch_tokens(chat)).engine
    sampling = Sampling(made["max_tokens"], made["temperature"], made["top_p"], made["seed"])

    def sweep(steps: int) -> AbstractContextManager[Stage]:
        return reporter.stage("candidates", steps)

    return calibrate_run(run, axis, chat, engine, sampling, settings, sweep, kind, pressure)


def _finished(path: Path) -> tuple[RunDir, Axis]:
    """A run with its axis; UsageError when there is none."""
    try:
        run = RunDir.load(path)
    except FileNotFoundError as e:
        raise UsageError(str(e)) from e
    if not (run.fit / "axis.safetensors").exists():
        raise UsageError(f"{path} is not finished: it has no axis yet. Repeat persona-axis run first.")
    return run, Axis.load(path)


def check_identity(run: RunDir, chat: ChatModel) -> None:
    """Raise ModelError unless the model is the one that made a run's rollouts."""
    known = run.facts("model")
    if known and known["revision"] != chat.revision:
        raise ModelError(
            f"{run.path} holds rollouts of {known['name']} at revision {known['revision']}; the model loaded now is "
            f"{chat.name} at {chat.revision}. Name that revision, or another --out."
        )


def plan_of(settings: RunSettings) -> tuple[Plan, str]:
    """The plan that settings describe, and the content hash of its catalog."""
    catalog = load_catalog(settings.catalog)
    roles = catalog.select_roles(settings.roles)
    asked = settings.questions or min(DEFAULT_QUESTIONS, len(catalog.questions))
    questions = catalog.select_questions(asked)
    prompts = read_default_prompts(settings.default_prompts) if settings.default_prompts else catalog.default_prompts
    if settings.budget is not None:
        asks = [1 if settings.design == "rotated" else len(settings.prompts or role.prompts) for role in roles]
        # A role's own question is also put to the default persona, once.
        own = sum(len(role.questions) * (ask + 1) for role, ask in zip(roles, asks, strict=True))
        fixed = own if settings.own_questions else 0
        questions = fit_budget(settings.budget, questions, sum(asks) + len(prompts), fixed)
    plan = make_plan(
        roles,
        questions,
        prompts,
        design=settings.design,
        prompts=settings.prompts,
        own_questions=settings.own_questions,
        keep_all=settings.keep_all,
        seed=settings.seed,
    )
    return plan, catalog.content_hash()


class _Job:
    """One run of the job."""

    def __init__(self, settings: RunSettings, reporter: Reporter, with_held: bool = False) -> None:
        self.settings = settings
        self.reporter = reporter
        self.with_held = with_held
        self.kind = judge_kind(settings.judge)
        check_filter(settings.filter, self.kind)
        if settings.engine != LOOP:
            engine_named(settings.engine)  # a wrong name is said first
        plan, catalog_hash = plan_of(settings)
        check_enough(plan, settings)
        self.dir = RunDir.open(settings.out, settings.generation(), plan, catalog_hash)
        self.sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, settings.seed)
        self.seconds: dict[str, float] = dict(self.dir.facts("seconds"))
        self._chat: ChatModel | None = None
        self._engine: EngineChoice | None = None
        self.failed = 0
        self._check_folded()

    def run(self) -> RunResult:
        started, before = time.monotonic(), self.seconds.get("total", 0.0)
        try:
            try:
                self._collect()
            finally:
                if self._engine is not None:
                    self._engine.engine.close()
            self._measure_norms()
            result = self._fit()
            held = self._hold(result) if self.with_held else None
        except BaseException:
            with suppress(StorageError):  # a full disk must not hide what went wrong first
                self._write_seconds(before + time.monotonic() - started)
            raise
        self._write_seconds(before + time.monotonic() - started)
        return self._report(result, held)

    def _write_seconds(self, total: float) -> None:
        self.seconds["total"] = total
        self.dir.write_facts("seconds", self.seconds)

    # ---- rollouts and verdicts --------------------------------------------------------------------------

    def _collect(self) -> None:
        """Generate, judge and (when activations are not kept) fold, wave by wave."""
        plan = self.dir.plan
        missing = [shard for shard in range(plan.n_shards) if not self.dir.has_rollouts(shard)]
        if missing:
            self._check_size()
        if not missing and not self._unjudged():
            if not self.settings.keep_all:
                self._fold(range(plan.n_shards))  # a kill may have come before
            return
        with self._judge_client() as client:
            for wave in self._waves():
                if any(shard in missing for shard in wave):
                    self._generate(wave)
                if self.kind is not None:
                    self._judge(wave, client)
                if not self.settings.keep_all:
                    self._fold(wave)

    def _waves(self) -> list[range]:
        plan = self.dir.plan
        if self.settings.keep_all:
            return [range(plan.n_shards)]
        chat = self._model()
        row_bytes = len(self._choice().engine.layers) * chat.d_model * 4
        step = max(1, WAVE_BYTES // (row_bytes * 64))
        # The default persona's shards go together: the likelihood judge's null comes from all of them.
        first = max(row.shard for row in plan.rows if row.persona == DEFAULT) + 1
        starts = [0, *range(max(first, step), plan.n_shards, step)]
        return [range(a, b) for a, b in zip(starts, [*starts[1:], plan.n_shards], strict=True)]

    def _generate(self, shards: range) -> None:
        chat, engine = self._model(), self._choice().engine
        todo = [row for row in self.dir.plan.rows if row.shard in shards and not self.dir.has_rollouts(row.shard)]
        shown = self.reporter.stage("rollouts", len(todo), self.settings.max_tokens)
        with self._timed("generate"), shown as stage:
            generate_rollouts(self.dir, chat, engine, self.sampling, shards, stage.done, stage.made)
        self._measure_norms()

    def _measure_norms(self) -> None:
        """Once in a run: while the model is there, or on resuming one that was killed after its last reply."""
        if not self.dir.facts("norms"):
            layers = tuple(self.dir.facts("model")["layers"])
            self.dir.write_facts("norms", default_norms(self.dir, self._model(), layers))

    def _judge(self, shards: range, client: LLMClient | None) -> None:
        judge = self._make_judge(client)
        with self._timed("judge"), self.reporter.stage("verdicts", self._unjudged()) as stage:
            judged = judge_rollouts(self.dir, judge, shards, stage.done)
        self.failed += judged.failed

    def _fold(self, shards: range) -> None:
        keep = rows_to_keep(self.dir, self.settings.sampled_activations)
        threshold = self._threshold()
        self.dir.write_facts("folded", {"judge": self.settings.judge})
        for shard in shards:
            fold_shard(self.dir, shard, None if self.kind is None else self.settings.judge, threshold, keep)

    def _check_folded(self) -> None:
        """Sums by one judge's verdicts say nothing about another's."""
        folded = self.dir.facts("folded")
        if folded and folded["judge"] != self.settings.judge:
            raise UsageError(
                f"{self.dir.path} keeps no activations but their sums by the verdicts of --judge {folded['judge']}; "
                f"--judge {self.settings.judge} needs another --out. Runs with --keep all can be judged again."
            )

    def _unjudged(self) -> int:
        return 0 if self.kind is None else unjudged(self.dir, self.settings.judge)

    def _make_judge(self, client: LLMClient | None) -> Judge:
        if client is None:
            return LikelihoodJudge(self._model(), self.dir.plan.neutral_prompts)
        return self._llm_judge(client)

    @contextmanager
    def _judge_client(self) -> Iterator[LLMClient | None]:
        """The LLM judge's client, opened first: an unknown judge is said before anything is generated for it."""
        if self.kind != "score":
            yield None
            return
        from persona_axis.llm.client import LLMClient

        with LLMClient(
            self.settings.judge,
            max_connections=self.settings.judge_connections,
            requests_per_minute=self.settings.judge_requests_per_minute,
        ) as client:
            yield client

    def _llm_judge(self, client: LLMClient) -> Judge:
        from persona_axis.collect.llm_judge import LLMJudge, cost, estimate_tokens

        chat = self._model()
        estimate = estimate_tokens(list(read_exchanges(self.dir)), lambda text: len(chat.tokenizer(text)["input_ids"]))
        price = self.settings.price
        money = f", about {cost(estimate, price):.2f} in your price's currency" if price else ""
        self.reporter.note(
            f"{self.settings.judge} will read about {estimate.input_tokens:,} tokens and write at most "
            f"{estimate.output_tokens:,}{money} (counted with the model's own tokenizer)."
        )
        return LLMJudge(client)

    def _threshold(self) -> float | None:
        if self.kind != "evidence":
            return None
        return self._null().threshold

    def _null(self) -> Null:
        known = self.dir.facts("null")
        if known:
            return Null(**known)
        null = null_of(self.dir, self.settings.judge)
        self.dir.write_facts("null", null.to_dict())
        return null

    # ---- the model --------------------------------------------------------------------------------------

    def _model(self) -> ChatModel:
        """The model, loaded at first need; its identity must be the one that made the rollouts."""
        if self._chat is None:
            s = self.settings
            template = s.chat_template.read_text() if s.chat_template else None
            # What `auto` was where the run began: another machine must not go on in another dtype.
            dtype = self.dir.facts("model").get("dtype", "auto") if s.dtype == "auto" else s.dtype
            with self._timed("load"), self.reporter.stage("load model", 1) as stage:
                self._chat = load_model(
                    s.model,
                    dtype=dtype,
                    device=s.device,
                    revision=s.revision,
                    chat_template=template,
                    trust_remote_code=s.trust_remote_code,
                )
                stage.done()
            check_identity(self.dir, self._chat)
            if dtype == "auto" and self._chat.upcast:
                self.reporter.note("Computing in float32: this CPU would emulate 16-bit arithmetic, slower.")
        return self._chat

    def _choice(self) -> EngineChoice:
        """The engine; the self-check happens here."""
        if self._engine is None:
            chat, batch_tokens = self._model(), self._batch_tokens()
            with self._timed("load"):
                self._engine = own = choose_engine(chat, self.settings.layers, batch_tokens)
                if self.settings.engine != LOOP:
                    start = engine_named(self.settings.engine)
                    self._engine = EngineChoice(start(chat, own.engine.layers, batch_tokens))
            analysed_layer(self.settings.layer, self._engine.engine.layers, chat.n_layers)  # said before generating
            if self._engine.reason:
                self.reporter.note(
                    f"Generating with model.generate, one reply at a time: the fast loop cannot drive this model, "
                    f"because {self._engine.reason}."
                )
            self.dir.write_facts("model", self._model_facts(chat, self._engine))
        return self._engine

    def _loop(self) -> Engine:
        """What generates under hooks, whoever made the rollouts."""
        if self.settings.engine == LOOP:
            return self._choice().engine
        return choose_engine(self._model(), self.settings.layers, self._batch_tokens()).engine

    def _batch_tokens(self) -> int:
        return self.settings.batch_tokens or default_batch_tokens(self._model())

    def _model_facts(self, chat: ChatModel, choice: EngineChoice) -> dict[str, Any]:
        return {
            "name": chat.name,
            "revision": chat.revision,
            RECORDED: asdict(ModelIdentity.of(chat)),
            "n_layers": chat.n_layers,
            "d_model": chat.d_model,
            "layers": list(choice.engine.layers),
            "dtype": chat.dtype,
            "device": str(chat.model.device),
            "engine": choice.engine.name,
            "engine_reason": choice.reason,
            "ignored_generation_settings": chat.ignored_settings,
            "torch": torch.__version__,
        }

    def _check_size(self) -> None:
        """A plan whose activations are large is not started without a word from the user."""
        if self.settings.keep is not None:
            return
        self._choice()
        facts = self.dir.facts("model")
        size = len(self.dir.plan.rows) * len(facts["layers"]) * facts["d_model"] * 4
        if size > LARGE_RUN_BYTES:
            raise UsageError(
                f"This plan's activations take {size / 1e9:.0f} GB ({len(self.dir.plan.rows):,} rollouts). Say what to "
                "keep: --keep all, --keep sample:20 (per role, and the default persona's) or --keep none (sums only); "
                "or capture fewer --layers."
            )

    # ---- fit and report ---------------------------------------------------------------------------------

    def _fit(self) -> FitResult:
        s, facts = self.settings, self.dir.facts("model")
        wanted = FitSettings(s.filter, s.min_count, s.estimator, s.layer, s.seed)
        metadata = {
            "model": facts["name"],
            "revision": facts["revision"],
            RECORDED: facts.get(RECORDED),
            "catalog_hash": self.dir.catalog_hash,
            "config_hash": self.dir.config_hash,
            "judge": s.judge,
            "estimator": s.estimator,
            "filter": s.filter,
            "min_count": s.min_count,
            "seed": s.seed,
            **self.dir.facts("norms"),
        }
        with self._timed("fit"), self.reporter.stage("fit layers", len(facts["layers"])) as stage:
            return fit_run(
                self.dir,
                None if self.kind is None else s.judge,
                self.kind,
                self._threshold(),
                wanted,
                tuple(facts["layers"]),
                facts["n_layers"],
                facts["d_model"],
                metadata,
                stage.done,
            )

    def _hold(self, result: FitResult) -> Held:
        rows = held_rows(self.dir.plan, [role.name for role in result.fit.ranking[:HELD_ROLES]])
        measures = Measures(self._model(), self._loop(), self.sampling, self.dir.plan.neutral_prompts)
        with self._timed("hold"), self.reporter.stage("hold", 1) as stage:
            held = hold_demo(self.dir, measures, result.axis, rows, self.settings.seed)
            stage.done()
        return held

    def _report(self, result: FitResult, held: Held | None) -> RunResult:
        null = self._null() if self.kind == "evidence" else None
        summary = summarise(self.dir, self.settings, result.fit, self.seconds, self.kind, null)
        if held is not None:
            summary["held"] = held_summary(held)
        write_json(self.dir.path / "summary.json", summary)
        data = report_data(self.dir, self.settings.judge, result.fit, summary, self.kind, null, held)
        report = write_report(self.dir.path / "report.html", data)
        return RunResult(self.dir.path, summary, result, report, self.failed)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add to a stage's seconds, over all resumes."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


def check_enough(plan: Plan, settings: RunSettings) -> None:
    """Refuse a plan too small for its fit, whatever the replies, before the replies are made."""
    rollouts = Counter(row.persona for row in plan.rows)
    default = rollouts.pop(DEFAULT)
    third = sorted(rollouts.values())[-3]
    if min(default, third) < settings.min_count:
        raise UsageError(
            f"This plan has {third} rollouts per role and {default} of the default persona, fewer than "
            f"--min-count {settings.min_count}. Ask more --questions, or lower --min-count."
        )
    if settings.judge == "likelihood" and default < NULL_REPLIES:
        raise UsageError(
            f"This plan has {default} rollouts of the default persona; the likelihood judge needs {NULL_REPLIES} to "
            "know what chance looks like. Ask more --questions, or use more default prompts."
        )


def judge_kind(judge: str) -> Kind | None:
    """What a judge gives; None for ``none``."""
    if judge == "none":
        return None
    return "evidence" if judge == "likelihood" else "score"


def default_norms(run: RunDir, chat: ChatModel, layers: tuple[int, ...]) -> dict[str, Any]:
    """Mean residual norm at each layer over some default replies of a run; None when all of them are empty."""
    said = [e for e in islice(read_exchanges(run), NORM_REPLIES) if e.persona == DEFAULT]
    passages = neutral_passages(chat, said)
    return {"residual_norms": residual_norms(chat, passages, layers).tolist() if passages else None}


def held_rows(plan: Plan, personas: list[str], per_role: int = 2) -> list[PlanRow]:
    """A few rollouts of each persona, spread over its prompts."""
    chosen = []
    for persona in personas:
        mine = [row for row in plan.rows if row.persona == persona]
        chosen += mine[:: max(1, math.ceil(len(mine) / per_role))]
    return chosen


def default_batch_tokens(chat: ChatModel) -> int:
    """Positions of key/value storage: a third of what the device has free, at most what 256 long replies need."""
    device = chat.model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    return max(2048, min(256 * 4096, free // 3 // key_value_bytes(chat.model.config, chat.model.dtype)))


def _free_memory() -> int:
    """Available bytes of main memory."""
    import psutil

    return int(psutil.virtual_memory().available)
