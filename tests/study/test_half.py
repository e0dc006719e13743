"""A run in two halves: dealt evenly, and the first fitted as if the second did not exist."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from persona_worlds import vectors_of
from tiny_runs import ScriptedEngine, ScriptedJudge, make_questions, make_roles, open_run, small_plan, stub_chat

from persona_axis.catalog.catalog import Role
from persona_axis.collect import plan as plan_module
from persona_axis.collect.cells import fold_shard, rows_to_keep
from persona_axis.collect.filters import Kind
from persona_axis.collect.fitting import FitSettings
from persona_axis.collect.judging import judge_rollouts, null_of
from persona_axis.collect.plan import DEFAULT, Plan, PlanRow, make_plan
from persona_axis.collect.rollouts import generate_rollouts
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange, Verdict
from persona_axis.errors import FitError, JudgeError, UsageError
from persona_axis.geometry.resampling import question_folds
from persona_axis.model.engine import Sampling
from persona_axis.study.half import Half, HalfFit, fit_half, halves

SEED = 3
SETTINGS = FitSettings(min_count=4, seed=SEED)
LAYERS, D = (0, 1, 2), 8

Values = Callable[[str], float]


def a_plan(**options: Any) -> Plan:
    """8 roles and 14 questions; 3 x 14 default rollouts, so that half A has 21 of them."""
    return small_plan(8, 14, seed=SEED, **options)


def numbers(key: str, *what: int) -> np.random.Generator:
    return np.random.default_rng([*what, *key.encode()])


def activation(key: str) -> np.ndarray:
    """Persona, question and noise."""
    persona, _, question = key.split("/")
    parts = (numbers(persona, 1), numbers(question, 2), numbers(key, 3))
    return sum(size * r.normal(size=(3, D)) for size, r in zip((2, 3, 1), parts, strict=True)) + 5


def evidence(key: str) -> float:
    """Default replies around 0; of the roles' three in four are above their 95th percentile."""
    persona = key.split("/")[0]
    value = numbers(key, 4).random()
    return float(0.1 * value) if persona == DEFAULT else float(0.4 * value)


def finished(
    folder: Path,
    plan: Plan | None = None,
    activate: Callable[[str], np.ndarray | None] = activation,
    said: Values = evidence,
    kind: Kind = "evidence",
) -> RunDir:
    run = open_run(folder, plan or a_plan())
    generate_rollouts(run, stub_chat(D), ScriptedEngine(activate, LAYERS, D), Sampling())

    def decide(e: Exchange) -> Verdict:
        if kind == "score":
            return Verdict(e.key, "ok", score=2 + int(said(e.key) > 0.15))
        return Verdict(e.key, "ok", evidence=said(e.key))

    judge_rollouts(run, ScriptedJudge(decide, kind=kind))
    return run


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """Sixteen rollouts per shard in this module, so that a small plan has several and one of them is mixed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHARD_ROWS", 16)
        yield


@pytest.fixture(scope="module")
def whole(small_shards: None, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run that tests only read."""
    return finished(tmp_path_factory.mktemp("half") / "run")


def fit(run: RunDir, settings: FitSettings = SETTINGS, kind: Kind | None = "evidence") -> HalfFit:
    judge = None if kind is None else "likelihood"
    return fit_half(run, halves(run.plan, SEED)[0], judge, kind, settings, LAYERS, D)


# ---- dealing -----------------------------------------------------------------------------------------------------


def grouped_plan(n_roles: int = 23, n_questions: int = 31) -> Plan:
    """Groups and categories of uneven sizes."""
    role = make_roles(1)[0]
    roles = [
        Role(f"role{i}", f"group{int(i**0.5)}", role.description, role.prompts, role.questions, role.rubric)
        for i in range(n_roles)
    ]
    questions = make_questions(n_questions, ("a", "b", "c", "a", "a", "b", "d"))
    return make_plan(roles, questions, ("", "Help."))


@pytest.mark.parametrize("seed", range(5))
def test_halves_are_disjoint_complete_and_balanced(seed: int) -> None:
    plan = grouped_plan()
    a, b = halves(plan, seed)
    assert not set(a.roles) & set(b.roles)
    assert sorted([*a.roles, *b.roles]) == sorted(set(plan.personas) - {DEFAULT})
    assert not a.blocks & b.blocks
    assert a.blocks | b.blocks == {row.block for row in plan.rows}
    assert len(a.roles) - len(b.roles) == len(a.blocks) - len(b.blocks) == 1
    group = {row.persona: row.group for row in plan.rows}
    category = {row.block: row.category for row in plan.rows}
    for of, mine, other in ((group, a.roles, b.roles), (category, a.blocks, b.blocks)):
        counts = Counter(of[key] for key in mine), Counter(of[key] for key in other)
        assert all(abs(counts[0][kind] - counts[1][kind]) <= 1 for kind in set(of.values()))


def test_the_seed_decides_and_nothing_else() -> None:
    plan = grouped_plan()
    assert halves(plan, 1) == halves(plan, 1)
    assert len({halves(plan, seed)[0].roles for seed in range(9)}) > 5
    assert len({halves(plan, seed)[0].blocks for seed in range(9)}) > 5


def test_a_half_holds_its_roles_and_the_default_persona_on_its_questions() -> None:
    plan = a_plan()
    a, b = halves(plan, SEED)
    owners = [(a.holds(row), b.holds(row)) for row in plan.rows]
    assert not any(all(pair) for pair in owners)
    default = [pair for pair, row in zip(owners, plan.rows, strict=True) if row.persona == DEFAULT]
    assert all(any(pair) for pair in default)
    assert sum(a.holds(row) for row in plan.rows) == 4 * 7 + 3 * 7


@pytest.mark.parametrize(("n_roles", "n_questions"), [(7, 14), (8, 9)])
def test_too_little_to_halve_is_refused(n_roles: int, n_questions: int) -> None:
    with pytest.raises(UsageError, match=rf"{n_roles} roles and {n_questions} questions.*at least 8 and 10"):
        halves(small_plan(n_roles, n_questions), 0)


# ---- nothing of half B -------------------------------------------------------------------------------------------


def elsewhere(key: str, half: Half, plan: Plan) -> bool:
    return not half.holds(next(row for row in plan.rows if row.key == key))


@pytest.mark.parametrize("settings", [SETTINGS, FitSettings(min_count=4, estimator="paper", seed=SEED)])
def test_half_b_decides_nothing(whole: RunDir, tmp_path: Path, settings: FitSettings) -> None:
    """Other activations, other verdicts and other empty replies in half B: the same axes, pool, filter, bit for bit."""
    plan = a_plan()
    a, _ = halves(plan, SEED)

    def other_activation(key: str) -> np.ndarray | None:
        if not elsewhere(key, a, plan):
            return activation(key)
        return None if numbers(key, 6).random() < 0.2 else 40 * numbers(key, 5).normal(size=(3, D)) - 90

    def other_evidence(key: str) -> float:
        return evidence(key) if not elsewhere(key, a, plan) else 9 - 30 * evidence(key)

    mine = fit(whole, settings)
    other = fit(finished(tmp_path / "other", plan, other_activation, other_evidence), settings)
    assert torch.equal(mine.axes, other.axes)
    assert torch.equal(mine.pool, other.pool)
    assert (mine.dropped, mine.filter) == (other.dropped, other.filter)
    assert (mine.pool_roles, mine.pool_default) == (other.pool_roles, other.pool_default) == (28, 21)


def test_half_a_decides(whole: RunDir, tmp_path: Path) -> None:
    """The counterpart: each single rollout of half A is in the pool, and its verdict moves the axis."""
    plan = a_plan()
    a, _ = halves(plan, SEED)
    mine = fit(whole)
    [kept, *_] = [row.key for row in plan.rows if a.holds(row) and row.persona != DEFAULT and evidence(row.key) > 0.2]
    no_longer = fit(finished(tmp_path / "verdict", plan, said=lambda key: -1.0 if key == kept else evidence(key)))
    assert not torch.equal(mine.axes, no_longer.axes)
    lost = fit(finished(tmp_path / "lost", plan, lambda key: None if key == kept else activation(key)))
    assert len(lost.pool) == len(mine.pool) - 1


def test_the_threshold_is_the_half_s_own(whole: RunDir) -> None:
    plan = a_plan()
    a, b = halves(plan, SEED)
    for half in (a, b):
        own = [evidence(row.key) for row in plan.rows if row.persona == DEFAULT and half.holds(row)]
        assert null_of(whole, "likelihood", half.blocks).threshold == pytest.approx(np.percentile(own, 95), rel=1e-12)


def test_too_few_default_replies_in_a_half_are_said(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", small_plan(8, 12, seed=SEED))
    with pytest.raises(JudgeError, match="Only 18 default replies"):
        fit(run)
    assert len(fit(run, FitSettings(min_count=4, filter="none", seed=SEED), kind=None).pool) == 4 * 6 + 18


# ---- the pool ----------------------------------------------------------------------------------------------------


def slow_pool(run: RunDir, half: Half, kept: Callable[[PlanRow], bool], roles: list[str], paired: bool) -> np.ndarray:
    """Reply by reply and layer by layer; ``roles`` are those of the axis."""
    rows = [row for row in run.plan.rows if half.holds(row)]
    blocks = sorted(half.blocks)
    fold = dict(zip(blocks, question_folds(len(blocks), SEED).tolist(), strict=True))
    personas = [DEFAULT, *roles]
    weights = torch.zeros(len(personas), len(blocks))
    sums = np.zeros((len(personas), len(blocks), len(LAYERS), D))
    for row in rows:
        if row.persona in personas and (row.persona == DEFAULT or kept(row)):
            place = personas.index(row.persona), blocks.index(row.block)
            weights[place] += 1
            sums[place] += activation(row.key)
    means = torch.from_numpy(sums / np.maximum(weights.numpy(), 1)[..., None, None])

    def axis(layer: int, fold_out: int | None, role_out: str | None) -> np.ndarray:
        train = weights * torch.tensor([float(fold[b] != fold_out) for b in blocks])
        vectors = vectors_of(train, means[:, :, layer], paired)
        others = [v for name, v in zip(roles, vectors[1:], strict=True) if name != role_out and np.isfinite(v).all()]
        return vectors[0] - np.mean(others, 0)

    found = np.zeros((len(rows), len(LAYERS)))
    for layer in range(len(LAYERS)):
        whole = axis(layer, None, None)
        centre = vectors_of(weights, means[:, :, layer], paired)[1:].mean(0)
        for i, row in enumerate(rows):
            own = axis(layer, fold[row.block], row.persona)
            beyond = (activation(row.key)[layer] - centre) @ own / np.linalg.norm(own)
            found[i, layer] = beyond + centre @ whole / np.linalg.norm(whole)
    return found


def expressed(run: RunDir, half: Half) -> Callable[[PlanRow], bool]:
    own = [evidence(row.key) for row in run.plan.rows if row.persona == DEFAULT and half.holds(row)]
    return lambda row: evidence(row.key) > float(np.percentile(own, 95))


@pytest.mark.parametrize("paired", [True, False])
def test_the_pool_is_the_slow_loop(whole: RunDir, paired: bool) -> None:
    a, _ = halves(whole.plan, SEED)
    found = fit(whole, FitSettings(min_count=4, estimator="paired" if paired else "paper", seed=SEED))
    assert found.filter == "expressed"
    assert not found.dropped
    expected = slow_pool(whole, a, expressed(whole, a), list(a.roles), paired)
    assert found.pool.dtype == torch.float32
    np.testing.assert_allclose(found.pool.numpy(), expected, rtol=1e-3, atol=2e-3)


def test_a_role_that_the_filter_dropped_is_in_the_pool_on_the_axis_of_the_others(tmp_path: Path) -> None:
    plan = a_plan()
    a, _ = halves(plan, SEED)
    lost = a.roles[1]

    def said(key: str) -> float:
        return -1.0 if key.startswith(f"{lost}/") else evidence(key)

    run = finished(tmp_path / "run", plan, said=said)
    found = fit(run)
    assert [d.name for d in found.dropped] == [lost]
    roles = [name for name in a.roles if name != lost]
    keep = expressed(run, a)
    expected = slow_pool(run, a, lambda row: row.persona != lost and keep(row), roles, True)
    np.testing.assert_allclose(found.pool.numpy(), expected, rtol=1e-3, atol=2e-3)


def test_the_axes_are_those_of_a_run_that_never_had_more(whole: RunDir) -> None:
    """Half A made into a run of its own and fitted by hand: Assistant minus roles, question effects removed."""
    a, _ = halves(whole.plan, SEED)
    found = fit(whole)
    blocks, personas, keep = sorted(a.blocks), [DEFAULT, *a.roles], expressed(whole, a)
    for layer in range(3):
        weights, means = torch.zeros(5, 7), torch.zeros(5, 7, D, dtype=torch.float64)
        for row in whole.plan.rows:
            if a.holds(row) and (row.persona == DEFAULT or keep(row)):
                place = personas.index(row.persona), blocks.index(row.block)
                weights[place] += 1
                means[place] += torch.from_numpy(activation(row.key)[layer])
        vectors = vectors_of(weights, means / weights.clamp(min=1)[..., None], True)
        expected = vectors[0] - vectors[1:].mean(0)
        np.testing.assert_allclose(found.axes[layer].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_an_llm_judge_s_scores_filter_too_and_every_score_is_in_the_pool(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", kind="score")
    a, _ = halves(run.plan, SEED)
    found = fit(run, FitSettings(min_count=4, estimator="paper", seed=SEED), kind="score")
    assert found.filter == "score==3"
    assert len(found.pool) == 28 + 21
    roles = list(a.roles)
    expected = slow_pool(run, a, lambda row: evidence(row.key) > 0.15, roles, False)
    # The partial rows of the paper's recipe enter the centre alone, which every axis sees alike but for its angle.
    assert np.corrcoef(found.pool[:, 1].numpy(), expected[:, 1])[0, 1] > 0.99


def test_a_half_that_is_too_thin_is_refused(whole: RunDir) -> None:
    with pytest.raises(FitError, match="roles keep 5 rollouts"):
        fit(whole, FitSettings(min_count=10, filter="expressed", seed=SEED))


# ---- what a run kept ---------------------------------------------------------------------------------------------


def folded(run: RunDir, per_role: int, threshold: float = 0.09) -> RunDir:
    keep = rows_to_keep(run, per_role)
    for shard in range(run.plan.n_shards):
        assert fold_shard(run, shard, "likelihood", threshold, keep)
    return run


def test_a_run_that_kept_sums_only_has_no_pool(tmp_path: Path) -> None:
    """The default persona's activations are kept all the same; a pool of those alone would be another pool."""
    run = folded(finished(tmp_path / "run", a_plan(keep_all=True)), 0)
    with pytest.raises(UsageError, match=r"kept sums.*--keep all, or --keep sample:N"):
        fit(run)


def test_a_run_that_kept_samples_takes_its_pool_from_them(whole: RunDir, tmp_path: Path) -> None:
    """The same axis as with everything kept, when a block is a question and the classes are the same."""
    a, _ = halves(whole.plan, SEED)
    own = [evidence(row.key) for row in whole.plan.rows if row.persona == DEFAULT and a.holds(row)]
    run = folded(finished(tmp_path / "run"), 5, float(np.percentile(own, 95)))
    mine, other = fit(run), fit(whole)
    torch.testing.assert_close(mine.axes, other.axes, rtol=1e-4, atol=1e-4)
    keys = [row.key for row in whole.plan.rows if a.holds(row)]
    kept = [i for i, key in enumerate(keys) if key in rows_to_keep(whole, 5)]
    assert len(mine.pool) == len(kept) == mine.pool_roles + mine.pool_default
    assert (mine.pool_default, math.ceil(mine.pool_roles / 4) <= 5) == (21, True)
    torch.testing.assert_close(mine.pool, other.pool[kept], rtol=1e-3, atol=1e-3)
