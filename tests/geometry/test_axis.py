"""The axis: its sign, its projections, leaving roles out, and the file it lives in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from persona_worlds import slow_axis, world
from safetensors.torch import save_file

from persona_axis.errors import StorageError, UsageError
from persona_axis.geometry.axis import (
    FORMAT,
    Axis,
    assistant_axis,
    cosine,
    leave_one_out_axes,
    project,
    weighted_mean,
)


def some_axis(**changes: Any) -> Axis:
    vectors = 3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return Axis(**{"vectors": vectors, "layers": (1, 4, 6), "layer": 4, **changes})


def test_higher_is_more_like_the_assistant() -> None:
    direction = torch.zeros(16)
    direction[3] = 6
    vectors = world(11, 1, 16, seed=0, spread=0.5, assistant=direction).personas
    axis = assistant_axis(vectors[0], vectors[1:].mean(0))
    torch.testing.assert_close(axis, vectors[0] - vectors[1:].mean(0), rtol=0, atol=0)
    assert cosine(axis, direction) > 0.9
    projections = project(vectors, axis)
    assert projections[0] > projections[1:].max() + 3


def test_the_projection_is_in_units_of_the_residual() -> None:
    random = torch.Generator().manual_seed(1)
    hidden, vector = torch.randn(4, 5, 8, generator=random), torch.randn(8, generator=random)
    expected = hidden.double().numpy() @ vector.double().numpy() / np.linalg.norm(vector.double().numpy())
    np.testing.assert_allclose(project(hidden, vector).numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(project(hidden, 100 * vector), project(hidden, vector))
    torch.testing.assert_close(project(2 * hidden, vector), 2 * project(hidden, vector))
    assert project(vector, vector) == pytest.approx(float(vector.norm()), rel=1e-6)


def test_projections_of_half_precision_residuals_are_float32() -> None:
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    axis = Axis(torch.randn(1, 64, generator=torch.Generator().manual_seed(3)), (0,), 0)
    assert axis.project(hidden).dtype == torch.float32
    torch.testing.assert_close(axis.project(hidden), axis.project(hidden.float()), rtol=0, atol=0)


def test_cosine_is_the_normalised_inner_product() -> None:
    a, b = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(4))
    expected = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(cosine(a, b), expected)


def test_weighted_mean_counts_a_role_as_often_as_it_was_drawn() -> None:
    vectors = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(5))
    weights = torch.tensor([[2.0, 0, 1], [1, 1, 4]])
    expected = torch.stack([v.repeat_interleave(w.long(), 0).mean(0) for v, w in zip(vectors, weights, strict=True)])
    torch.testing.assert_close(weighted_mean(vectors, weights), expected)


def test_leaving_a_role_out_is_fitting_the_axis_without_it() -> None:
    random = torch.Generator().manual_seed(6)
    assistant = torch.randn(3, 5, generator=random)
    roles = torch.randn(3, 6, 5, generator=random)
    counts = torch.randint(0, 4, (3, 6), generator=random).float()  # as a bootstrap draws them
    counts[:, :2] = 1
    axes = leave_one_out_axes(assistant, roles, counts)
    assert axes.shape == (3, 6, 5)
    for draw in range(3):
        vectors = torch.cat([assistant[draw, None], roles[draw]]).double().numpy()
        for role in range(6):
            expected = slow_axis(vectors, counts[draw].numpy(), without=role)
            np.testing.assert_allclose(axes[draw, role].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_an_axis_answers_for_its_layers() -> None:
    axis = some_axis()
    hidden = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(7))
    assert torch.equal(axis.at(), axis.vectors[1])
    assert torch.equal(axis.at(6), axis.vectors[2])
    assert float(axis.unit(1).norm()) == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(axis.unit(1) * axis.at(1).norm(), axis.at(1))
    torch.testing.assert_close(axis.project(hidden), hidden @ axis.unit(4))
    torch.testing.assert_close(axis.project(hidden, 6), hidden @ axis.unit(6))


@pytest.mark.parametrize("layer", [0, 2, -1, 7])
def test_a_layer_that_was_not_captured_is_an_error(layer: int) -> None:
    axis = some_axis()
    for ask in (axis.at, axis.unit, lambda at: axis.project(torch.zeros(8), at)):
        with pytest.raises(UsageError, match=rf"no layer {layer}; it has 1, 4, 6"):
            ask(layer)


def test_residuals_of_another_width_are_an_error() -> None:
    with pytest.raises(UsageError, match="width 9 on an axis of width 8"):
        some_axis().project(torch.zeros(2, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 4)}, "one vector per layer"),
        ({"vectors": torch.zeros(8)}, "one vector per layer"),
        ({"layer": 5}, "Layer 5 is not among"),
    ],
)
def test_an_axis_that_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        some_axis(**changes)


# ---- files ------------------------------------------------------------------------------------------------------


def test_an_axis_comes_back_from_its_file(tmp_path: Path) -> None:
    metadata = {"model": "tiny", "pool": {"n": 12, "percentiles": {"75": [1.5, None, -2.0]}}, "note": "größer"}
    axis = some_axis(metadata=metadata)
    path = axis.save(tmp_path / "axis.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["axis.safetensors"]
    back = Axis.load(str(path))
    assert torch.equal(back.vectors, axis.vectors)
    assert back.vectors.dtype == torch.float32
    assert (back.layers, back.layer, back.metadata) == ((1, 4, 6), 4, metadata)


def test_the_file_names_its_format(tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(some_axis().save(tmp_path / "a")), "pt") as f:
        header = json.loads(f.metadata()["persona_axis"])
    assert header == {"format": FORMAT, "layers": [1, 4, 6], "layer": 4}


def test_metadata_cannot_overwrite_what_the_axis_is(tmp_path: Path) -> None:
    axis = some_axis(metadata={"layer": 6, "layers": [0], "format": "other", "model": "tiny"})
    back = Axis.load(axis.save(tmp_path / "a"))
    assert (back.layers, back.layer, back.metadata) == ((1, 4, 6), 4, {"model": "tiny"})


def test_other_dtypes_and_strides_are_stored_as_float32(tmp_path: Path) -> None:
    axis = some_axis(vectors=torch.randn(8, 3, generator=torch.Generator().manual_seed(8)).double().T)
    back = Axis.load(axis.save(tmp_path / "a"))
    assert torch.equal(back.vectors, axis.vectors.float())


def test_a_run_folder_stands_for_its_axis(tmp_path: Path) -> None:
    axis = some_axis()
    (tmp_path / "fit").mkdir()
    axis.save(tmp_path / "fit" / "axis.safetensors")
    assert torch.equal(Axis.load(tmp_path).vectors, axis.vectors)


def test_a_missing_axis_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"fit/axis\.safetensors"):
        Axis.load(tmp_path)
    with pytest.raises(StorageError, match=r"nowhere\.safetensors"):
        Axis.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 40, -20])
def test_a_damaged_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = some_axis().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"Cannot read an axis from .*a\.safetensors"):
        Axis.load(path)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"axis": torch.zeros(1, 4)}, None),
        ({"axis": torch.zeros(1, 4)}, {"persona_axis": json.dumps({"format": "persona-axis/policy/1"})}),
        ({"weight": torch.zeros(1, 4)}, {"persona_axis": json.dumps({"format": FORMAT, "layers": [0], "layer": 0})}),
    ],
)
def test_another_kind_of_file_is_an_error(tmp_path: Path, tensors: Any, metadata: Any) -> None:
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(StorageError, match="not an axis written by this package"):
        Axis.load(tmp_path / "other.safetensors")


def test_unreadable_metadata_is_an_error(tmp_path: Path) -> None:
    save_file({"axis": torch.zeros(1, 4)}, tmp_path / "a", {"persona_axis": "{"})
    with pytest.raises(StorageError, match="Cannot read an axis"):
        Axis.load(tmp_path / "a")
