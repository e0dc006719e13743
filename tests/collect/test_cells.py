"""Sums per persona, block and verdict class: folded or whole, all layers or a few, they say the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import ScriptedEngine, ScriptedJudge, evidence_judge, open_run, small_plan, stub_chat

from persona_axis.collect import cells as cells_module
from persona_axis.collect import stored as stored_module
from persona_axis.collect.cells import (
    CELL_BYTES,
    UNJUDGED,
    Row,
    counts,
    fold_shard,
    layer_chunks,
    rows_to_keep,
    shard_cells,
    verdict_class,
)
from persona_axis.collect.judging import judge_rollouts, read_verdicts
from persona_axis.collect.means import cell_means, projections
from persona_axis.collect.plan import DEFAULT, Plan
from persona_axis.collect.rollouts import generate_rollouts
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.collect.stored import StoredLayers
from persona_axis.collect.verdicts import Verdict
from persona_axis.errors import StorageError
from persona_axis.files.shards import open_arrays
from persona_axis.model.engine import Sampling

pytestmark = pytest.mark.usefixtures("small_shards")

THRESHOLD = 0.0
ALL = slice(0, 3)
LOST = "bard/p1/q3"  # its reply has no counted token


def activation(key: str) -> np.ndarray | None:
    return None if key == LOST else np.random.default_rng(list(key.encode())).normal(size=(3, 8)) + 1


def evidence(key: str) -> float:
    return float(np.random.default_rng(list(b"e" + key.encode())).normal())


def finished(folder: Path, plan: Plan | None = None, judged: bool = True) -> RunDir:
    """64 rollouts in 8 shards, questions in 5 blocks of two, judged."""
    plan = plan or small_plan(4, 10, ("", "Help."), keep_all=False, seed=SEED)
    run = open_run(folder, plan)
    generate_rollouts(run, stub_chat(), ScriptedEngine(activation), Sampling())
    if judged:
        judge_rollouts(run, evidence_judge(lambda e: evidence(e.key)))
    return run


SEED = 1  # under this one LOST is a row of the plan


def tables(run: RunDir) -> list[list[Row]]:
    names = run.plan.personas
    expressed = [Row(DEFAULT), *(Row(name, frozenset({1})) for name in names[1:])]
    return [expressed, [Row(name) for name in names], [Row("bard", frozenset({0}))]]


def sizes(run: RunDir) -> list[list[list[float]]]:
    cells = list(shard_cells(run, "likelihood", THRESHOLD))
    return [counts(cells, table, run.plan.n_blocks).tolist() for table in tables(run)]


def means(run: RunDir, layers: slice = ALL) -> list[torch.Tensor]:
    cells = list(shard_cells(run, "likelihood", THRESHOLD))
    return cell_means(StoredLayers(run, cells, layers), tables(run), run.plan.n_blocks)


def fold_all(run: RunDir, keep: set[str] | None = None, **options: Any) -> list[bool]:
    judge = options.get("judge", "likelihood")
    return [fold_shard(run, shard, judge, THRESHOLD, keep or set()) for shard in range(run.plan.n_shards)]


def by_hand(run: RunDir, table: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Counts [rows, blocks] and mean activations [rows, blocks, layers, d]."""
    n = np.zeros((len(table), run.plan.n_blocks))
    total = np.zeros((len(table), run.plan.n_blocks, 3, 8))
    for row in run.plan.rows:
        value = activation(row.key)
        cls = int(evidence(row.key) > THRESHOLD)
        for i, wanted in enumerate(table):
            if value is not None and wanted.persona == row.persona and (not wanted.classes or cls in wanted.classes):
                n[i, row.block] += 1
                total[i, row.block] += value
    return n, total / np.maximum(n, 1)[..., None, None]


# ---- means -------------------------------------------------------------------------------------------------------


def test_means_and_counts_are_those_by_hand(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    assert any(row.key == LOST for row in run.plan.rows)
    for table, n, mean in zip(tables(run), sizes(run), means(run), strict=True):
        expected_n, expected = by_hand(run, table)
        assert mean.shape == (3, len(table), run.plan.n_blocks, 8)
        assert mean.dtype == torch.float32
        assert np.array_equal(np.array(n), expected_n)
        assert np.allclose(mean.numpy(), expected.transpose(2, 0, 1, 3), atol=1e-5)
    everyone, expressed = np.array(sizes(run)[1]), np.array(sizes(run)[0])
    assert everyone.sum() == len(run.plan.rows) - 1
    assert 0 < expressed[1:].sum() < everyone[1:].sum()


def test_a_few_layers_at_a_time_give_the_same_means(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    whole = means(run)
    parts = [means(run, slice(i, i + 1)) for i in range(3)]
    for t, table in enumerate(whole):
        assert torch.equal(torch.cat([part[t] for part in parts]), table)


def test_a_pass_reads_each_shard_once_for_all_tables(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    cells = list(shard_cells(run, "likelihood", THRESHOLD))
    run.log.counts.clear()
    cell_means(StoredLayers(run, cells, ALL), tables(run), run.plan.n_blocks)
    expected = {run.rollouts / f"{shard_name(s)}.safetensors": 1 for s in range(run.plan.n_shards)}
    assert dict(run.log.counts) == expected


@pytest.mark.parametrize(("budget", "reads"), [(1 << 30, 1), (2000, 2)])
def test_a_second_pass_reads_again_only_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, reads: int
) -> None:
    monkeypatch.setattr(stored_module, "KEPT_BYTES", budget)
    run = finished(tmp_path / "run")
    cells = list(shard_cells(run, "likelihood", THRESHOLD))
    run.log.counts.clear()
    stored = StoredLayers(run, cells, ALL)
    cell_means(stored, tables(run), run.plan.n_blocks)
    axes = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = projections(stored, axes)
    assert set(run.log.counts.values()) == {reads}
    replies = np.stack([activation(row.key) for row in run.plan.rows if row.key != LOST])
    expected = (replies * (axes / axes.norm(dim=-1, keepdim=True)).numpy()).sum(-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_without_a_judge_everything_is_unjudged(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", judged=False)
    cells = list(shard_cells(run, None, None))
    assert {cls for shard in cells for cls in shard.verdict_class} == {UNJUDGED}
    assert counts(cells, [Row(name) for name in run.plan.personas], run.plan.n_blocks).sum() == 59


def test_only_finished_shards_count(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    generate_rollouts(run, stub_chat(), ScriptedEngine(), Sampling(), range(0, 2))
    assert [cells.shard for cells in shard_cells(run, None, None)] == [0, 1]


def test_no_rollouts_are_an_error_that_names_the_run(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    with pytest.raises(StorageError, match="run holds no finished rollouts"):
        cell_means(StoredLayers(run, [], ALL), [[Row(DEFAULT)]], 8)


# ---- folding -----------------------------------------------------------------------------------------------------


def test_folded_sums_say_what_the_whole_shards_said(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    n, whole = sizes(run), means(run)
    half = run.plan.n_shards // 2
    assert all(fold_shard(run, shard, "likelihood", THRESHOLD, set()) for shard in range(half))
    for _ in ("some folded", "all folded"):
        assert sizes(run) == n
        for before, after in zip(whole, means(run), strict=True):
            assert torch.allclose(before, after, atol=1e-6)
        assert fold_all(run) == [True] * run.plan.n_shards
    cells = list(shard_cells(run, "likelihood", THRESHOLD))
    assert all(shard.folded for shard in cells)
    assert sum(sum(shard.count) for shard in cells) == 59


def test_folding_takes_the_activations_off_the_disk(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    fold_all(run)
    assert not list(run.rollouts.glob("*.safetensors"))
    for shard, cells in enumerate(shard_cells(run, "likelihood", THRESHOLD)):
        with open_arrays(run.folded, shard_name(shard)) as arrays:
            assert arrays.shape("sums") == (len(cells.count), 3, 8)
            assert arrays.shape("kept_activations") == (0, 3, 8)
    assert all(run.has_rollouts(shard) for shard in range(run.plan.n_shards))  # replies and verdicts stay
    with (
        pytest.raises(StorageError, match=r"dropped once they were folded.*another --keep"),
        open_arrays(run.rollouts, shard_name(0)),
    ):
        pass


def test_a_kill_between_folding_and_dropping_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run = finished(tmp_path / "run")
    n, whole = sizes(run), means(run)
    with monkeypatch.context() as patch:
        patch.setattr(cells_module, "drop_arrays", killed)
        with pytest.raises(KeyboardInterrupt):
            fold_shard(run, 0, "likelihood", THRESHOLD, set())
    assert (run.rollouts / f"{shard_name(0)}.safetensors").exists()
    assert sizes(run) == n  # nothing counts twice
    assert fold_all(run) == [True] * run.plan.n_shards
    assert not list(run.rollouts.glob("*.safetensors"))
    assert sizes(run) == n
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, means(run), strict=True))


def test_a_shard_with_a_failed_verdict_is_not_folded(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", judged=False)
    failed = run.plan.rows[20].key

    def decide(e: Any) -> Verdict:
        return Verdict(e.key, "failed") if e.key == failed else Verdict(e.key, "ok", evidence=evidence(e.key))

    judge_rollouts(run, ScriptedJudge(decide))
    folded = fold_all(run)
    assert folded.count(False) == 1
    assert not folded[20 // 8]
    assert len(list(run.rollouts.glob("*.safetensors"))) == 1
    judge_rollouts(run, evidence_judge(lambda e: evidence(e.key)))
    assert all(fold_all(run))


def test_folding_without_a_judge_needs_no_verdict(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", judged=False)
    everyone = [Row(name) for name in run.plan.personas]

    def mean() -> torch.Tensor:
        return cell_means(StoredLayers(run, list(shard_cells(run, None, None)), ALL), [everyone], run.plan.n_blocks)[0]

    before = mean()
    assert all(fold_all(run, judge=None))
    assert torch.allclose(mean(), before, atol=1e-6)


def test_sampled_activations_stay_readable(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    keep = rows_to_keep(run, 2)
    originals = {row.key: activation(row.key) for row in run.plan.rows if row.key in keep}
    fold_all(run, keep)
    found = {}
    for shard, rows in run.plan.shards():
        with open_arrays(run.folded, shard_name(shard)) as arrays:
            numbers, values = arrays.read("kept_rows").tolist(), arrays.read("kept_activations")
        found.update({rows[n].key: value for n, value in zip(numbers, values, strict=True)})
    assert found.keys() == originals.keys()
    for key, value in found.items():
        expected = originals[key]
        assert np.array_equal(value, np.zeros((3, 8)) if expected is None else expected.astype(np.float32))


@pytest.mark.parametrize("per_persona", [0, 1, 3, 10, 99])
def test_samples_are_spread_over_each_role_and_the_default_persona_is_kept(tmp_path: Path, per_persona: int) -> None:
    run = open_run(tmp_path / "run", small_plan(4, 10, ("", "Help.")))
    kept = rows_to_keep(run, per_persona)
    mine = Counter(row.persona for row in run.plan.rows if row.key in kept)
    assert mine.pop(DEFAULT) == 20
    assert set(mine.values()) == ({min(per_persona, 10)} if per_persona else set())
    if per_persona == 3:  # both prompts, which stand one after the other
        assert {row.prompt_index for row in run.plan.rows if row.key in kept and row.persona == "bard"} == {0, 1}


# ---- memory ------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 100), st.integers(1, 3000), st.integers(1, 5000), st.integers(1, 20_000))
def test_layers_are_taken_as_many_at_a_time_as_fit(n_layers: int, n_rows: int, n_blocks: int, d_model: int) -> None:
    chunks = list(layer_chunks(n_layers, n_rows, n_blocks, d_model))
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(n_layers))
    one_layer = n_rows * n_blocks * d_model * 4
    for chunk in chunks:
        width = chunk.stop - chunk.start
        assert width * one_layer <= CELL_BYTES or width == 1
    if len(chunks) > 1:  # and no fewer than fit
        assert (chunks[0].stop + 1) * one_layer > CELL_BYTES


def test_classes_on_the_disk_are_those_of_the_verdicts(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    for shard, cells in enumerate(shard_cells(run, "likelihood", THRESHOLD)):
        verdicts = read_verdicts(run, "likelihood", shard)
        assert cells.verdict_class == [verdict_class(v, THRESHOLD) for v in verdicts]
