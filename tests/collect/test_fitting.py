"""The fit on shards with a planted axis: found, ranked in order, the same however it is computed, refused when thin."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import NAMES, ScriptedEngine, ScriptedJudge, open_run, small_plan, stub_chat

from persona_axis.collect import cells as cells_module
from persona_axis.collect.cells import fold_shard, rows_to_keep
from persona_axis.collect.filters import Kind
from persona_axis.collect.fitting import ASSISTANT, FitResult, FitSettings, analysed_layer, fit_run, read_fit
from persona_axis.collect.judging import judge_rollouts
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rollouts import generate_rollouts
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange, Verdict
from persona_axis.errors import FitError, UsageError
from persona_axis.files.arrays import open_array_file
from persona_axis.geometry.axis import Axis
from persona_axis.model.engine import Sampling

D = 16
ROLES = NAMES[:6]
PLACE = {DEFAULT: 3.0, **{name: -float(i) for i, name in enumerate(ROLES)}}  # along the planted axis
NOISE = (2.0, 0.05, 0.5)  # per layer: the middle one is the clean one
FAST = FitSettings(min_count=3, draws=50)


def direction(layer: int) -> np.ndarray:
    v = np.random.default_rng(layer).normal(size=D)
    return v / np.linalg.norm(v)


def question_effect(number: int, layer: int) -> np.ndarray:
    return 3 * np.random.default_rng([7, number, layer]).normal(size=D)


def planted(key: str) -> np.ndarray:
    """mean + persona + question + noise."""
    persona, _, question = key.split("/")
    random = np.random.default_rng(list(key.encode()))
    number = int(question[1:])
    return np.stack(
        [
            1 + PLACE[persona] * direction(layer) + question_effect(number, layer) + noise * random.normal(size=D)
            for layer, noise in enumerate(NOISE)
        ]
    )


Passes = Callable[[str], int]  # rollout key -> score, or 1/0 for expressed


def made_run(
    folder: Path, passes: Passes | None = None, kind: Kind = "evidence", activate: Any = planted, **plan: Any
) -> RunDir:
    run = open_run(folder, small_plan(len(ROLES), plan.pop("n_questions", 20), **plan))
    generate_rollouts(run, stub_chat(D), ScriptedEngine(activate, d_model=D), Sampling())
    if passes is not None:

        def decide(e: Exchange) -> Verdict:
            if kind == "score":
                return Verdict(e.key, "ok", score=None if e.persona == DEFAULT else passes(e.key))
            return Verdict(e.key, "ok", evidence=float(passes(e.key)))

        judge_rollouts(run, ScriptedJudge(decide, "judge", kind))
    return run


def fitted(
    run: RunDir, settings: FitSettings = FAST, kind: Kind | None = None, layers: tuple[int, ...] = (0, 1, 2)
) -> FitResult:
    threshold = 0.5 if kind == "evidence" else None
    judge = None if kind is None else "judge"
    return fit_run(run, judge, kind, threshold, settings, layers, 3, D, {"model": "planted"})


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return made_run(tmp_path_factory.mktemp("unjudged") / "run")


@pytest.fixture(scope="module")
def found(unjudged: RunDir) -> FitResult:
    return fitted(unjudged, replace(FAST, draws=200))


# ---- the planted axis --------------------------------------------------------------------------------------------


def test_the_planted_axis_is_found_at_every_layer(found: FitResult) -> None:
    for layer, least in enumerate((0.9, 0.999, 0.99)):
        assert cosine(found.axis.at(layer), direction(layer)) > least
    distance = PLACE[DEFAULT] - np.mean([PLACE[name] for name in ROLES])
    assert float(found.axis.at(1).norm()) == pytest.approx(distance, rel=0.02)
    assert found.fit.per_layer[1].axis_norm == pytest.approx(distance, rel=0.02)
    assert float(found.axis.project(found.assistant_vector[1], 1)) > 0


def test_roles_are_ranked_as_planted_with_intervals_around_them(found: FitResult) -> None:
    fit = found.fit
    assert [role.name for role in fit.ranking] == list(ROLES[::-1])  # ascending: farthest from the Assistant first
    for role in fit.ranking:
        assert role.projection.low < role.projection.value < role.projection.high
        assert (role.kept, role.total) == (20, 20)
    places = [role.projection.value for role in fit.ranking]
    assert np.allclose(np.diff(places), 1, atol=0.15)
    assert fit.assistant.value - places[-1] == pytest.approx(3, abs=0.2)
    # The Assistant lies beyond every role: (max - it) / range = -3 / 5.
    assert fit.edge_distance.value == pytest.approx(-0.6, abs=0.05)
    assert fit.edge_distance_in_sample == pytest.approx(-0.6, abs=0.05)
    assert fit.ranking[-1].name == "bard"
    assert {role.group for role in fit.ranking} == {"near", "far"}


def test_persona_space_is_one_line_and_the_axis_lies_on_it(found: FitResult) -> None:
    clean = found.fit.per_layer[1]
    assert clean.cos_axis_pc1.value > 0.99
    assert clean.cos_axis_pc1_unfiltered == pytest.approx(clean.cos_axis_pc1.value)
    assert clean.pc_shares[0] > 0.95
    assert sum(clean.pc_shares) == pytest.approx(1, abs=1e-4)
    assert (clean.components_70, clean.components_80, clean.components_90) == (1, 1, 1)
    assert found.fit.assistant_places[0].component == 1
    assert found.fit.assistant_places[0].edge_distance == pytest.approx(-0.6, abs=0.05)
    assistant = found.fit.points[0]
    assert assistant.name == ASSISTANT
    assert assistant.pcs[0] > max(point.pcs[0] for point in found.fit.points[1:])


def test_the_most_reliable_layer_is_the_clean_one(found: FitResult) -> None:
    reliability = [layer.reliability for layer in found.fit.per_layer]
    assert found.fit.most_reliable_layer == 1
    assert reliability[1] > 0.999
    assert reliability[0] < reliability[2] < reliability[1]
    assert np.allclose(np.diag(found.fit.layer_cosine), 1, atol=1e-5)
    assert found.fit.layer_cosine[0][1] == pytest.approx(cosine(found.axis.at(0), found.axis.at(1)), abs=1e-4)


def test_noise_widens_the_intervals(unjudged: RunDir, found: FitResult) -> None:
    noisy = fitted(unjudged, replace(FAST, layer=0, draws=200)).fit

    def width(fit: Any) -> float:
        return float(np.mean([r.projection.high - r.projection.low for r in fit.ranking]))

    assert width(noisy) > 3 * width(found.fit)


def test_the_seed_decides_everything_random(unjudged: RunDir) -> None:
    first, again, other = (fitted(unjudged, replace(FAST, seed=seed)) for seed in (0, 0, 1))
    assert first.fit == again.fit
    assert torch.equal(first.axis.vectors, other.axis.vectors)
    assert first.fit.ranking != other.fit.ranking


# ---- what is written ---------------------------------------------------------------------------------------------


def test_what_is_written_reads_back(unjudged: RunDir) -> None:
    result = fitted(unjudged)
    data = json.loads((unjudged.fit / "fit.json").read_text())
    assert read_fit(data) == result.fit
    assert data["vector_roles"] == result.roles == list(ROLES)
    assert data["metadata"]["model"] == "planted"
    axis = Axis.load(unjudged.path)
    assert torch.equal(axis.vectors, result.axis.vectors)
    assert (axis.layers, axis.layer) == ((0, 1, 2), 1)
    assert axis.metadata["model"] == "planted"
    with open_array_file(unjudged.fit / "vectors.safetensors") as arrays:
        roles, assistant = arrays.read("roles"), arrays.read("assistant")
    assert roles.shape == (6, 3, D)
    assert np.array_equal(roles, result.role_vectors.numpy())
    assert np.allclose(assistant - roles.mean(0), result.axis.vectors.numpy(), atol=1e-4)
    assert asdict(result.fit)["layers"] == [0, 1, 2]


# ---- the same however it is computed -----------------------------------------------------------------------------


def same(a: FitResult, b: FitResult) -> None:
    assert torch.allclose(a.axis.vectors, b.axis.vectors, atol=1e-4)
    assert torch.allclose(a.role_vectors, b.role_vectors, atol=1e-4)
    assert [r.name for r in a.fit.ranking] == [r.name for r in b.fit.ranking]
    for mine, other in zip(a.fit.ranking, b.fit.ranking, strict=True):
        assert mine.projection.value == pytest.approx(other.projection.value, abs=1e-3)
        assert mine.projection.low == pytest.approx(other.projection.low, abs=1e-3)
        assert (mine.kept, mine.total) == (other.kept, other.total)
    for one, two in zip(a.fit.per_layer, b.fit.per_layer, strict=True):
        assert one.reliability == pytest.approx(two.reliability, abs=1e-4)
        assert one.cos_axis_pc1.value == pytest.approx(two.cos_axis_pc1.value, abs=1e-4)
    assert a.fit.edge_distance.value == pytest.approx(b.fit.edge_distance.value, abs=1e-3)


def test_a_layer_at_a_time_gives_the_same_fit(
    unjudged: RunDir, found: FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "CELL_BYTES", 1)
    heard: list[int] = []
    unjudged.log.counts.clear()
    settings = replace(FAST, draws=200)
    chunked = fit_run(
        unjudged, None, None, None, settings, (0, 1, 2), 3, D, {"model": "planted"}, lambda: heard.append(1)
    )
    same(chunked, found)
    assert len(heard) == 3
    arrays = {p.name: n for p, n in unjudged.log.counts.items() if p.suffix == ".safetensors"}
    assert arrays
    assert set(arrays.values()) <= {3, 4}  # one slice per layer (and one pass for the pool's percentiles)


def test_folded_sums_give_the_same_fit(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", lambda key: hash_of(key) % 4 > 0, keep_all=False)
    assert run.plan.n_blocks == 5
    before = fitted(run, kind="evidence")
    assert {role.kept for role in before.fit.ranking} != {20}
    for shard in range(run.plan.n_shards):
        assert fold_shard(run, shard, "judge", 0.5, rows_to_keep(run, 0))
    same(fitted(run, kind="evidence"), before)


def hash_of(key: str) -> int:
    return int(np.random.default_rng(list(key.encode())).integers(1 << 30))


# ---- filters and estimators --------------------------------------------------------------------------------------


def one_sided(key: str) -> int:
    """The bard passes on the first half of the questions, everybody else on the second."""
    persona, _, question = key.split("/")
    return int((int(question[1:]) < 10) == (persona == "bard"))


def test_pairing_takes_out_what_was_asked(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", one_sided)
    paired = fitted(run, kind="evidence")
    assert {role.kept for role in paired.fit.ranking} == {10}
    assert paired.fit.filter == "expressed"
    assert cosine(paired.axis.at(1), direction(1)) > 0.999
    plain = fitted(run, replace(FAST, estimator="paper"), kind="evidence")
    assert cosine(plain.axis.at(1), direction(1)) < 0.95  # plain means mix the questions in
    assert [role.name for role in paired.fit.ranking] == list(ROLES[::-1])


def test_dropped_roles_are_out_of_every_figure_and_named(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", lambda key: int(not key.startswith("ghost") or key.endswith("q1")))
    result = fitted(run, kind="evidence")
    assert [(role.name, role.reason) for role in result.fit.dropped] == [
        ("ghost", "1 of 20 rollouts pass 'expressed'; at least 3 are needed")
    ]
    assert result.roles == list(ROLES[:-1])
    assert "ghost" not in {point.name for point in result.fit.points}
    assert result.role_vectors.shape == (5, 3, D)


def test_the_papers_estimator_puts_partial_vectors_into_the_space_alone(tmp_path: Path) -> None:
    def score(key: str) -> int:
        return 2 if hash_of(key) % 2 else 3

    run = made_run(tmp_path / "run", score, "score")
    result = fitted(run, replace(FAST, estimator="paper"), kind="score")
    assert (result.fit.filter, result.fit.estimator) == ("score==3", "paper")
    full, partial = {}, {}
    for row in run.plan.rows:
        store = full if row.persona == DEFAULT or score(row.key) == 3 else partial
        store.setdefault(row.persona, []).append(planted(row.key))
    means = {name: np.mean(values, 0) for name, values in full.items()}
    axis = means[DEFAULT] - np.mean([means[name] for name in ROLES], 0)
    assert np.allclose(result.axis.vectors.numpy(), axis, atol=1e-4)
    assert result.roles == list(ROLES)
    assert [role.name for role in result.fit.ranking] == sorted(ROLES, key=lambda n: role_place(result, n))
    assert len(result.fit.points) == 7  # partial vectors are on no map
    points = np.stack([means[n][1] for n in ROLES] + [np.mean(partial[n], 0)[1] for n in ROLES])
    variance = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    assert np.allclose(result.fit.per_layer[1].pc_shares, (variance / variance.sum())[:11], atol=1e-4)
    alone = fitted(run, replace(FAST, estimator="paper", filter="score>=2"), kind="score")
    assert len(alone.fit.per_layer[1].pc_shares) == 5


def role_place(result: FitResult, name: str) -> float:
    return next(role.projection.value for role in result.fit.ranking if role.name == name)


def test_paired_with_scores_has_no_partial_vectors(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", lambda key: 2 if hash_of(key) % 2 else 3, "score")
    assert len(fitted(run, kind="score").fit.per_layer[1].pc_shares) == 5


def test_replies_without_a_counted_token_enter_no_mean(tmp_path: Path) -> None:
    lost = {f"default/p{p}/q{q}" for p in range(3) for q in range(3)}
    run = made_run(tmp_path / "run", activate=lambda key: None if key in lost else planted(key))
    result = fitted(run)
    assert cosine(result.axis.at(1), direction(1)) > 0.999
    assert result.axis.metadata["pool"]["n"] == len(run.plan.rows) - 9


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_a_layer_that_was_not_captured_is_refused(unjudged: RunDir) -> None:
    with pytest.raises(UsageError, match="--layer 9 was not captured; captured are 0, 1, 2"):
        fitted(unjudged, replace(FAST, layer=9))
    assert fitted(unjudged, replace(FAST, layer=2)).fit.layer == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data())
def test_the_layer_is_the_captured_one_nearest_the_middle(n_layers: int, data: st.DataObject) -> None:
    captured = tuple(sorted(data.draw(st.sets(st.integers(0, n_layers - 1), min_size=1))))
    layer = analysed_layer(None, captured, n_layers)
    assert layer in captured
    assert abs(layer - n_layers // 2) == min(abs(c - n_layers // 2) for c in captured)
    if len(captured) == n_layers:
        assert layer == n_layers // 2


def test_too_few_roles_are_an_error_and_write_nothing(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", lambda key: int(key.startswith(("bard", "ghost"))))
    with pytest.raises(FitError, match="With filter 'expressed' only 2 roles keep 3 rollouts"):
        fitted(run, replace(FAST, filter="expressed"), kind="evidence")
    assert not run.fit.exists()


def test_too_few_default_rollouts_are_an_error(unjudged: RunDir) -> None:
    with pytest.raises(FitError, match="The default persona has only 60 rollouts; at least 61 are needed"):
        fitted(unjudged, replace(FAST, min_count=61))


def test_personas_that_share_no_question_are_an_error_of_the_paired_estimator(tmp_path: Path) -> None:
    # The default persona's replies to the bard's questions are empty: nothing links the two.
    def activate(key: str) -> np.ndarray | None:
        persona, _, question = key.split("/")
        return None if persona == DEFAULT and int(question[1:]) < 10 else planted(key)

    run = made_run(tmp_path / "run", one_sided, activate=activate)
    with pytest.raises(FitError, match=r"bard share no question with default.*--estimator paper"):
        fitted(run, kind="evidence")
    assert fitted(run, replace(FAST, estimator="paper"), kind="evidence").roles == list(ROLES)


def test_an_unknown_filter_is_refused(unjudged: RunDir) -> None:
    with pytest.raises(UsageError, match="Unknown filter 'best'"):
        fitted(unjudged, replace(FAST, filter="best"))


def first_questions(n: int) -> Passes:
    return lambda key: int(int(key.split("/q")[1]) < n)


def test_kept_rollouts_on_one_question_are_too_few_for_held_out_figures(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", first_questions(1), n_questions=5)
    with pytest.raises(FitError, match=r"too few questions for figures on held-out ones.*looser --filter"):
        fitted(run, replace(FAST, min_count=1), kind="evidence")


def test_halves_of_the_questions_without_any_role_are_left_out(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", first_questions(2), n_questions=5)
    fit = fitted(run, replace(FAST, min_count=1), kind="evidence").fit
    assert (fit.filter, {role.kept for role in fit.ranking}) == ("expressed", {2})
    assert all(math.isfinite(layer.reliability) for layer in fit.per_layer)
