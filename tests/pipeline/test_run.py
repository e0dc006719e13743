"""The whole job in one process: every stage, judges of each kind, resuming, and what is refused before work starts."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_judge import DEAD_URL, JUDGE, FakeJudge
from hypothesis import given
from hypothesis import settings as budgeted
from hypothesis import strategies as st
from tiny_runs import contents, make_roles, save_model

import persona_axis
from persona_axis import pipeline
from persona_axis.catalog.catalog import load_catalog
from persona_axis.collect.fitting import read_fit
from persona_axis.collect.judging import read_verdicts
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rundir import RunDir
from persona_axis.errors import JudgeError, ModelError, RunConflict, UsageError
from persona_axis.files.shards import open_arrays
from persona_axis.geometry.axis import Axis
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.loading import ChatModel, load_model
from persona_axis.pipeline import RunResult, plan_of, run
from persona_axis.settings import RunSettings
from tests.catalog.small import write_small_catalog

PROMISED = """
model n_layers d_model rollouts tokens seconds tokens_per_second engine layer cos_axis_pc1 cos_axis_pc1_unfiltered
pc1_share components_70 assistant_edge_distance assistant_edge_distance_in_sample reliability roles_low roles_high
filter judge estimator seed catalog_hash
"""
ROLES, ROLLOUTS = 4, 4 * 8 + 3 * 8

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tenacity, as Inspect calls it

Options = Callable[..., RunSettings]


@pytest.fixture(scope="module")
def chat(model_folder: Path) -> ChatModel:
    return load_model(str(model_folder), dtype="float32", device="cpu")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, chat: ChatModel) -> list[str]:
    """The models that a job loads; all are the one in memory."""
    asked: list[str] = []

    def load(model: str, **_: Any) -> ChatModel:
        asked.append(model)
        return chat

    monkeypatch.setattr(pipeline, "load_model", load)
    return asked


@pytest.fixture
def options(model_folder: Path, inputs: Path, tmp_path: Path, loads: list[str]) -> Options:
    return lambda **changes: options_of(model_folder, inputs, **{"out": tmp_path / "run", **changes})


def options_of(model_folder: Path, inputs: Path, out: Path, **changes: Any) -> RunSettings:
    given = {
        "model": str(model_folder),
        "out": out,
        "roles": str(inputs / "roles.jsonl"),
        "questions": str(inputs / "questions.txt"),
        "default_prompts": inputs / "neutral.json",
        "max_tokens": 6,
        "min_count": 3,
        "dtype": "float32",
        "device": "cpu",
    }
    return RunSettings(**{**given, **changes})


def no_model(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was loaded")


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k not in ("seconds", "tokens_per_second")}


def test_auto_is_what_it_was_where_the_run_began(
    options: Options, chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[str] = []
    monkeypatch.setattr(pipeline, "load_model", lambda model, dtype, **_: dtypes.append(dtype) or chat)
    run(options(dtype="auto"))
    for verdicts in (options().out / "judge").rglob("*.parquet"):  # so that a model is needed again
        verdicts.unlink()
    run(options(dtype="auto"))
    assert dtypes == ["auto", "float32"]


def test_a_catalog_that_changed_elsewhere_goes_on_with_the_run(
    options: Options, loads: list[str], tmp_path: Path
) -> None:
    folder = write_small_catalog(tmp_path / "catalog")
    planned = load_catalog(folder).content_hash()
    first = run(options(catalog=folder))
    (folder / "probes.toml").unlink()
    asked = len(loads)
    again = run(options(catalog=folder))
    assert load_catalog(folder).content_hash() != planned
    assert first.summary["catalog_hash"] == again.summary["catalog_hash"] == planned
    assert len(loads) == asked


# ---- end to end --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model_folder: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A job from the model folder to the report, judged by likelihood."""
    return run(options_of(model_folder, inputs, tmp_path_factory.mktemp("finished") / "run"))


def test_the_summary_holds_what_was_promised(finished: RunResult, model_folder: Path) -> None:
    summary = json.loads((finished.path / "summary.json").read_text())
    assert summary == finished.summary
    assert set(PROMISED.split()) <= summary.keys()
    assert (summary["model"], summary["n_layers"], summary["d_model"]) == (model_folder.name, 4, 32)
    assert (summary["rollouts"], summary["engine"], summary["layer"]) == (ROLLOUTS, "loop", 2)
    assert summary["tokens"] == sum(len(row[0]) for row in contents(finished.path).values())
    for name in ("cos_axis_pc1", "cos_axis_pc1_unfiltered", "pc1_share", "components_70", "reliability"):
        assert len(summary[name]) == 4
    assert all(-1 <= c <= 1 for c in summary["cos_axis_pc1"])
    assert sorted([*summary["roles_low"], *summary["dropped"]]) == sorted(role.name for role in make_roles(ROLES))
    assert summary["roles_low"] == summary["roles_high"][::-1]
    assert set(summary["seconds"]) >= {"load", "generate", "judge", "fit", "total"}
    assert all(summary["seconds"][stage] > 0 for stage in ("load", "generate", "judge", "fit"))
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"]["generate"], rel=0.05)
    assert summary["judge"]["name"] == "likelihood"
    assert summary["judge"]["failed"] == finished.failed_verdicts == 0
    counted = sum(n > 0 for key, (*_, n) in contents(finished.path).items() if not key.startswith(DEFAULT))
    assert summary["judge"]["kept"] + summary["judge"]["dropped"] == counted
    assert re.fullmatch("[0-9a-f]{64}", summary["catalog_hash"])


def test_the_fit_and_the_axis_read_back(finished: RunResult) -> None:
    fit = read_fit(json.loads((finished.path / "fit" / "fit.json").read_text()))
    assert fit == finished.result.fit
    assert finished.summary["assistant_edge_distance"] == fit.edge_distance.value
    axis = persona_axis.Axis.load(finished.path)
    assert axis.vectors.equal(finished.result.axis.vectors)
    assert axis.layers == (0, 1, 2, 3)
    assert axis.metadata["judge"] == "likelihood"
    assert axis.metadata["config_hash"] == finished.summary["config_hash"]


def test_the_report_is_one_file_without_a_network(finished: RunResult) -> None:
    page = finished.report.read_text()
    assert finished.report == finished.path / "report.html"
    assert page.count("Plotly") > 3
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=[\"']?https?:", page)
    for role in make_roles(ROLES):
        assert role.name in page


def test_a_finished_job_loads_no_model_and_says_the_same(
    finished: RunResult, model_folder: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {p: p.stat().st_mtime_ns for part in ("rollouts", "judge") for p in (finished.path / part).rglob("*.*")}
    monkeypatch.setattr(pipeline, "load_model", no_model)
    again = run(options_of(model_folder, inputs, finished.path))
    assert without_seconds(again.summary) == without_seconds(finished.summary)
    assert again.summary["seconds"]["generate"] == finished.summary["seconds"]["generate"]
    assert again.result.fit == finished.result.fit
    assert files
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_the_job_says_how_far_it_is(options: Options) -> None:
    stages: dict[str, list[int]] = {}

    class Listening(pipeline.Silent):
        @contextmanager
        def stage(self, name: str, total: int, tokens_each: int = 0) -> Iterator[pipeline.Stage]:
            stages[name] = heard = [total, 0, 0]

            class Counting(pipeline.Silent):
                def done(self, tokens: int = 0) -> None:
                    heard[1] += 1

                def made(self, tokens: int) -> None:
                    heard[2] += tokens

            yield Counting()

    result = run(options(), Listening())
    assert {name: heard[:2] for name, heard in stages.items()} == {
        "load model": [1, 1],
        "rollouts": [ROLLOUTS, ROLLOUTS],
        "verdicts": [ROLLOUTS, ROLLOUTS],
        "fit layers": [4, 4],
    }
    assert stages["rollouts"][2] == result.summary["tokens"]


def test_options_may_be_given_by_name(options: Options, loads: list[str]) -> None:
    settings = options(judge="none", layers=(1, 3), layer=3, max_tokens=4)
    result = run(**settings.model_dump())
    assert (result.summary["layers"], result.summary["layer"]) == ([1, 3], 3)
    assert len(loads) == 1
    with pytest.raises(ValueError, match="bogus"):
        run(out="x", bogus=1)


# ---- judges ------------------------------------------------------------------------------------------------------


def test_without_a_judge_everything_is_kept(options: Options) -> None:
    result = run(options(judge="none"))
    judge = result.summary["judge"]
    assert (judge["name"], judge["dropped"], judge["failed"]) == ("none", 0, 0)
    assert (result.summary["filter"], result.summary["null"]) == ("none", None)
    assert not (result.path / "judge").exists()
    assert result.report.exists()


def score_of(prompt: str) -> int:
    return 1 if "Question 1" in prompt else 3


def test_a_model_judges_every_role_and_decides_the_filter(options: Options, fake_judge: FakeJudge) -> None:
    fake_judge.reply = lambda prompt: f"So.\nScore: {score_of(prompt)}"
    result = run(options(judge=JUDGE, price=(1.0, 2.0)))
    assert result.summary["filter"] == "score==3"
    made = contents(result.path)
    asked = [key for key, (*_, text, _n) in made.items() if not key.startswith(DEFAULT) and text]
    assert len(fake_judge.prompts) == len(asked)
    assert all("You grade" not in prompt for prompt in fake_judge.prompts)
    assert not any("Answer me." in prompt for prompt in fake_judge.prompts)  # the default persona's
    kept = sum(n > 0 and not key.endswith("own_002") for key, (*_, n) in made.items() if not key.startswith(DEFAULT))
    assert result.summary["judge"] == {
        "name": JUDGE,
        "kept": kept,
        "dropped": sum(n > 0 for key, (*_, n) in made.items() if not key.startswith(DEFAULT)) - kept,
        "failed": 0,
    }
    job = RunDir.load(result.path)
    verdicts = [v for shard in range(job.plan.n_shards) for v in read_verdicts(job, JUDGE, shard)]
    assert {v.score for v in verdicts if not v.key.startswith(DEFAULT)} <= {1, 3, None}
    assert {v.detail for v in verdicts if v.score == 3} == {"So.\nScore: 3"}


def test_the_judges_work_is_estimated_first(options: Options, fake_judge: FakeJudge) -> None:
    notes: list[str] = []

    class Noting(pipeline.Silent):
        def note(self, text: str) -> None:
            assert not fake_judge.prompts
            notes.append(text)

    run(options(judge=JUDGE, price=(1e6, 0.0)), Noting())
    [note] = notes
    tokens = re.search(r"will read about ([\d,]+) tokens and write at most ([\d,]+), about ([\d.]+) in", note)
    assert tokens is not None
    assert float(tokens[3]) == pytest.approx(int(tokens[1].replace(",", "")))  # one per token


def test_judging_again_generates_nothing(
    options: Options, fake_judge: FakeJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(options(judge="none"))
    before = {p.name: p.read_bytes() for p in (first.path / "rollouts").iterdir()}
    monkeypatch.setattr(DecodingLoop, "generate", no_model)
    second = run(options(judge=JUDGE))
    third = run(options(judge="likelihood", filter="none"))
    assert len({r.summary["judge"]["name"] for r in (first, second, third)}) == 3
    assert {p.name: p.read_bytes() for p in (first.path / "rollouts").iterdir()} == before
    assert sorted(p.name for p in (first.path / "judge").iterdir()) == ["likelihood", "openai-api-fake-judge"]
    assert third.result.axis.vectors.equal(first.result.axis.vectors)  # same rollouts, nothing filtered


def test_failed_verdicts_are_counted_left_out_and_asked_again_alone(options: Options, fake_judge: FakeJudge) -> None:
    fake_judge.reply = lambda prompt: "I cannot say." if "Question 5" in prompt else "Score: 3"
    first = run(options(judge=JUDGE))
    garbage = [key for key, (*_, text, _n) in contents(first.path).items() if key.endswith("own_006") and text]
    asked_again = sum(not key.startswith(DEFAULT) for key in garbage)
    assert first.failed_verdicts == asked_again > 1
    assert 0 < first.summary["judge"]["failed"] <= asked_again  # those of them with an activation
    fake_judge.prompts.clear()
    fake_judge.reply = lambda prompt: "Score: 3"
    second = run(options(judge=JUDGE))
    assert len(fake_judge.prompts) == asked_again
    assert all("Question 5" in prompt for prompt in fake_judge.prompts)
    assert (second.failed_verdicts, second.summary["judge"]["failed"]) == (0, 0)
    assert second.summary["judge"]["kept"] == first.summary["judge"]["kept"] + first.summary["judge"]["failed"]


def test_a_judge_that_is_down_loses_nothing(
    options: Options, fake_judge: FakeJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BASE_URL", DEAD_URL)
    with pytest.raises(JudgeError, match=re.escape(DEAD_URL)):
        run(options(judge=JUDGE))
    made = contents(options().out)
    assert len(made) == ROLLOUTS
    monkeypatch.setattr(DecodingLoop, "generate", no_model)
    assert run(options(judge="likelihood")).summary["judge"]["failed"] == 0
    monkeypatch.setenv("FAKE_BASE_URL", fake_judge.url)
    assert run(options(judge=JUDGE)).summary["judge"]["failed"] == 0
    assert contents(options().out) == made


def test_an_unknown_judge_is_said_before_anything_is_generated(options: Options) -> None:
    pytest.importorskip("inspect_ai")
    with pytest.raises(JudgeError, match=r"'likelyhood'.*Names look like"):
        run(options(judge="likelyhood"))
    assert not list(options().out.rglob("rollouts/*"))


# ---- activations that are not kept -------------------------------------------------------------------------------


def test_folded_runs_keep_no_activations_and_resume_without_a_model(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(options(keep="none"))
    assert not list((result.path / "rollouts").glob("*.safetensors"))
    monkeypatch.setattr(pipeline, "load_model", no_model)
    again = run(options(keep="none"))
    assert without_seconds(again.summary) == without_seconds(result.summary)
    assert again.result.fit == result.result.fit


def test_sampled_runs_keep_some(options: Options) -> None:
    result = run(options(keep="sample:2"))
    job = RunDir.load(result.path)
    kept: Counter[str] = Counter()
    for shard, rows in job.plan.shards():
        with open_arrays(job.folded, f"shard-{shard:05d}") as arrays:
            kept.update(rows[n].persona for n in arrays.read("kept_rows").tolist())
    assert kept == {DEFAULT: 24, **{role.name: 2 for role in make_roles(ROLES)}}


@pytest.mark.parametrize("judge", ["likelihood", "none"])
def test_a_kill_before_folding_is_mended_without_a_model(
    options: Options, monkeypatch: pytest.MonkeyPatch, judge: str
) -> None:
    whole = run(options(keep="none", judge=judge, out=options().out.with_name("whole")))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fold_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            run(options(keep="none", judge=judge))
    assert list((options().out / "rollouts").glob("*.safetensors"))
    monkeypatch.setattr(pipeline, "load_model", no_model)
    result = run(options(keep="none", judge=judge))
    assert not list((options().out / "rollouts").glob("*.safetensors"))
    assert result.result.fit == whole.result.fit


def test_waves_change_nothing(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_axis.collect.plan.SHARD_ROWS", 8)
    one = run(options(keep="none", out=options().out.with_name("one")))
    folded: list[int] = []
    most: list[int] = []
    fold = pipeline.fold_shard

    def counting(job: RunDir, shard: int, *rest: Any) -> bool:
        most.append(len(list(job.rollouts.glob("*.safetensors"))))
        folded.append(shard)
        return fold(job, shard, *rest)

    monkeypatch.setattr(pipeline, "WAVE_BYTES", 1)
    monkeypatch.setattr(pipeline, "fold_shard", counting)
    many = run(options(keep="none"))
    assert folded == list(range(7))
    assert most == [3, 2, 1, 1, 1, 1, 1]  # the default persona's shards together, then one at a time
    assert contents(many.path) == contents(one.path)
    assert many.result.roles == one.result.roles
    assert torch.allclose(many.result.axis.vectors, one.result.axis.vectors, atol=1e-4)  # batches round differently


def test_sums_by_one_judge_are_not_fitted_with_another(options: Options) -> None:
    run(options(keep="none"))
    for judge in ("none", "openai/gpt"):
        with pytest.raises(UsageError, match=r"sums by the verdicts of --judge likelihood.*needs another --out"):
            run(options(keep="none", judge=judge))


def test_a_large_plan_asks_what_to_keep(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LARGE_RUN_BYTES", ROLLOUTS * 4 * 32 * 4 - 1)
    with pytest.raises(UsageError, match=r"56 rollouts.*--keep all, --keep sample:20.*--layers"):
        run(options())
    assert not list(options().out.rglob("rollouts/*"))
    assert run(options(keep="all", judge="none")).summary["rollouts"] == ROLLOUTS
    monkeypatch.setattr(pipeline, "LARGE_RUN_BYTES", ROLLOUTS * 4 * 32 * 4)
    assert run(options(out=options().out.with_name("other"), judge="none")).summary["rollouts"] == ROLLOUTS


# ---- resuming and refusing ---------------------------------------------------------------------------------------


def test_another_configuration_is_refused_with_the_differences(options: Options) -> None:
    run(options(judge="none"))
    before = contents(options().out)
    with pytest.raises(RunConflict) as caught:
        run(options(judge="none", max_tokens=7, seed=5))
    said = str(caught.value).splitlines()
    assert "  max_tokens: 6 there, 7 asked for" in said
    assert "  seed: 0 there, 5 asked for" in said
    assert len(said) == 4
    assert contents(options().out) == before


def test_what_does_not_touch_the_rollouts_may_change(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    run(options(judge="none"))
    monkeypatch.setattr(pipeline, "load_model", no_model)
    other = run(options(judge="none", estimator="paper", layer=1, min_count=2, batch_tokens=64))
    assert (other.summary["estimator"], other.summary["layer"]) == ("paper", 1)


def test_other_weights_are_not_mixed_in(model_folder: Path, inputs: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "judge_rollouts", no_model)
        with pytest.raises(AssertionError):
            run(options_of(model, inputs, tmp_path / "run"))
    save_model(model, stop=False)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ModelError, match=r"holds rollouts of model at revision local-.*Name that revision"):
        run(options_of(model, inputs, tmp_path / "run"))


def test_a_model_that_the_loop_cannot_drive_is_generated_with_and_said_so(inputs: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", arch="lfm2")
    notes: list[str] = []

    class Noting(pipeline.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    result = run(options_of(model, inputs, tmp_path / "run", max_tokens=4), Noting())
    assert result.summary["engine"] == "generate"
    assert "conv" in result.summary["engine_reason"]
    assert any("one reply at a time" in note and "conv" in note for note in notes)
    assert any("model.generate" in note for note in result.summary["notes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"min_count": 9}, "8 rollouts per role and 24 of the default persona, fewer than --min-count 9"),
        ({"layer": 4}, "--layer 4 was not captured; captured are 0, 1, 2, 3"),
        ({"layers": (0, 1), "layer": 2}, "--layer 2 was not captured"),
        ({"filter": "score==3"}, "needs an LLM judge"),
        ({"prompts": (2,)}, "has prompts 0 to 1, not 2"),
        ({"budget": 34}, "at least 35 rollouts"),
    ],
)
def test_what_can_only_fail_is_refused_before_it_is_made(options: Options, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(options(**change))
    assert not list(options().out.rglob("rollouts/*"))


def test_too_few_default_rollouts_for_the_null_are_refused_first(options: Options, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Be kind.")
    with pytest.raises(UsageError, match=r"8 rollouts of the default persona; the likelihood judge needs 20"):
        run(options(default_prompts=tmp_path / "prompt.txt"))
    assert run(options(default_prompts=tmp_path / "prompt.txt", judge="none")).summary["rollouts"] == 40


def test_a_mispelt_first_try_does_not_block_the_folder(options: Options, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run(options(layer=7, max_tokens=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "load_model", load_model)
        with pytest.raises(ModelError, match="neither a model folder"):
            run(options(model=str(tmp_path / "mispelt")))
    assert run(options(judge="none")).summary["rollouts"] == ROLLOUTS


# ---- settings and plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 1},
        {"temperature": -0.1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"keep": "some"},
        {"keep": "sample:x"},
        {"filter": "best"},
        {"estimator": "mean"},
        {"budget": 0},
        {"min_count": 0},
        {"dtype": "int8"},
        {"chat_template": Path("nowhere.jinja")},
        {"judge_requests_per_minute": 0},
        {"unknown": 1},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    RunSettings(out=Path("x"))
    with pytest.raises(ValueError, match=next(iter(change))):
        RunSettings(out=Path("x"), **change)


def test_only_what_decides_the_rollouts_belongs_to_the_configuration(tmp_path: Path) -> None:
    base = RunSettings(out=Path("x")).generation()
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    inside: dict[str, Any] = {
        "model": "m",
        "revision": "r",
        "dtype": "float32",
        "chat_template": template,
        "max_tokens": 9,
        "temperature": 0.1,
        "top_p": 0.5,
        "seed": 1,
        "layers": (1,),
        "keep": "none",
    }
    for name, value in inside.items():
        assert RunSettings(out=Path("x"), **{name: value}).generation() != base, name
    outside = {"judge": "none", "filter": "none", "min_count": 2, "layer": 3, "batch_tokens": 64, "device": "cpu"}
    assert RunSettings(out=Path("y"), estimator="paper", keep="all", **outside).generation() == base  # type: ignore[arg-type]


@budgeted(max_examples=30, deadline=None)
@given(
    budget=st.integers(60, 600),
    own=st.booleans(),
    design=st.sampled_from(["rotated", "crossed"]),
    prompts=st.sampled_from([None, (0,), (0, 2)]),
)
def test_a_budget_holds_for_the_whole_plan(budget: int, own: bool, design: Any, prompts: Any) -> None:
    settings = RunSettings(
        out=Path("x"), roles="4", budget=budget, own_questions=own, design=design, prompts=prompts, default_prompts=None
    )
    try:
        plan, _ = plan_of(settings)
    except UsageError as error:
        least = re.search(r"at least (\d+) rollouts", str(error))
        assert least is not None
        assert int(least[1]) > budget
        return
    assert len(plan.rows) <= budget
    assert len(plan.personas) == 5
    questions = {row.question_id for row in plan.rows if row.category != "own"}
    full, _ = plan_of(settings.model_copy(update={"budget": None}))
    cut = len({row.question_id for row in full.rows if row.category != "own"}) - len(questions)
    one_more = sum(row.category != "own" for row in plan.rows) // len(questions)
    assert cut == 0 or len(plan.rows) + one_more > budget


# ---- the demo ----------------------------------------------------------------------------------------------------


def test_the_demo_answers_plain_steered_and_capped(
    tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"DEMO_ROLES": 4, "DEMO_QUESTIONS": 6, "DEMO_TOKENS": 6, "HELD_ROLES": 2}.items():
        monkeypatch.setattr(pipeline, name, value)
    result = pipeline.demo(tmp_path / "run")
    assert loads == ["embedded"]
    assert result.summary["rollouts"] == 4 * 6 + 5 * 6
    page = result.report.read_text()
    for word in ("Steered", "Capped", "75th percentile", "perplexity"):
        assert word in page
    held = [role.name for role in result.result.fit.ranking[:2]]
    assert held == result.summary["roles_low"][:2]


# ---- residual norms ----------------------------------------------------------------------------------------------


def test_the_axis_knows_the_residual_norms_of_default_replies(options: Options, chat: ChatModel) -> None:
    """Mean over the reply's tokens of the norm of each block's output, in a plain forward."""
    result = run(options())
    rows = [row for row in RunDir.load(result.path).plan.rows if row.persona == DEFAULT]
    said = contents(result.path)
    norms: list[list[float]] = [[] for _ in chat.blocks]
    for row in rows:
        ids, reason, *_ = said[row.key]
        reply = ids[: len(ids) - (reason == "stop")]
        prompt = chat.template.prompt_ids(chat.template.messages(row.system_prompt, row.question))
        with torch.inference_mode():
            hidden = chat.model.model(torch.tensor([[*prompt, *reply]]), output_hidden_states=True).hidden_states
        for layer in range(chat.n_layers - 1):  # Transformers' last one is after the final norm
            norms[layer] += hidden[layer + 1][0, len(prompt) :].norm(dim=-1).tolist()
    axis = Axis.load(result.path)
    for layer in range(chat.n_layers - 1):
        assert axis.norm_at(layer) == pytest.approx(sum(norms[layer]) / len(norms[layer]), rel=1e-4)


def test_norms_that_a_kill_forestalled_are_measured_on_resuming(options: Options) -> None:
    first = Axis.load(run(options()).path)
    (options().out / "facts" / "norms.json").unlink()
    again = Axis.load(run(options()).path)
    assert again.metadata["residual_norms"] == first.metadata["residual_norms"]
