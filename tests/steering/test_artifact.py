"""Policies on disk: back bit for bit, or an error that names the file."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_axis import __version__
from persona_axis.errors import NonFiniteError, StorageError, UsageError
from persona_axis.files.arrays import write_arrays
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering import interventions as iv
from persona_axis.steering.artifact import holds_policy
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.policy import POSITIONS, Policy, content_hash

MODEL = ModelIdentity("org/model", "abc", "", 12, 8)
POOL = {"n": 345, "percentiles": {"75": [1.0, 2.0, 3.0]}}


def an_axis(seed: int = 0, **metadata: Any) -> Axis:
    vectors = 5 * torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    return Axis(vectors, (2, 4, 7), 4, metadata)


def a_policy(seed: int = 0) -> Policy:
    axis = an_axis(seed, model="org/model", revision="abc", pool=POOL)
    return Policy.at_percentile(axis, [2, 7], positions="reply")


def bits(policy: Policy) -> list[Any]:
    return [
        (part.layer, *(getattr(part, name).numpy().tobytes() for name in ("V", "lo", "hi", "shift")))
        for part in policy.interventions
    ]


# ---- round trips ------------------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    width = draw(st.integers(2, 9))
    layers = sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=4)))
    number = st.floats(-1e4, 1e4, width=32)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for layer in layers:
        k = draw(st.integers(1, min(3, width)))
        V = iv.orthonormal(torch.randn(k, width, generator=random))
        ends = [sorted(draw(st.tuples(number, number))) for _ in range(k)]
        lo = torch.tensor([-math.inf if draw(st.booleans()) else low for low, _ in ends])
        hi = torch.tensor([math.inf if draw(st.booleans()) else high for _, high in ends])
        parts.append(Intervention(layer, V, lo, hi, torch.tensor(draw(st.lists(number, min_size=k, max_size=k)))))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    said = draw(st.dictionaries(text, st.none() | st.booleans() | st.integers(-9, 9) | number | text, max_size=3))
    kind = draw(st.sampled_from([{}, {"kind": "cap"}, {"kind": "mix", "pool": 7, "percentile_paper": 2.5}]))
    model = draw(st.none() | st.builds(ModelIdentity, text, text, st.none() | text, st.none() | st.integers(1, 99)))
    return Policy(tuple(parts), {**said, **kind}, draw(st.sampled_from(POSITIONS)), model)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies())
def test_what_is_loaded_is_what_was_saved(policy: Policy, tmp_path: Path) -> None:
    folder = policy.save(tmp_path / "policy")
    back = Policy.load(folder)
    assert bits(back) == bits(policy)
    assert (back.positions, back.model, back.provenance) == (policy.positions, policy.model, policy.provenance)
    assert back.content_hash == policy.content_hash


def test_saving_twice_gives_the_same_bytes_and_replaces_another(tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    first = files(a_policy().save(tmp_path / "first"))
    assert set(first) == {"policy.json", "policy.safetensors"}
    assert files(Policy.load(tmp_path / "first").save(tmp_path / "second")) == first
    a_policy(1).save(tmp_path / "second")
    assert files(a_policy().save(tmp_path / "second")) == first


def test_the_json_says_what_people_ask(tmp_path: Path) -> None:
    said = json.loads((a_policy().save(tmp_path) / "policy.json").read_text())
    axis = an_axis(model="org/model", revision="abc", pool=POOL)
    assert {key: said[key] for key in said if key not in ("content_hash", "provenance")} == {
        "format": "persona-axis/policy/1",
        "persona_axis": __version__,
        "layers": [2, 7],
        "positions": "reply",
        "model": {"name": "org/model", "revision": "abc", "quantisation": None, "n_layers": None, "d_model": 8},
        "kind": "cap",
        "pool": 345,
        "percentile_paper": 25,
        "percentile_assistant": 75,
        "axis_hash": axis.content_hash,
    }
    assert said["provenance"] == {"axis": axis.metadata}


@pytest.mark.parametrize("place", ["", "policy", "calibration/policy"])
def test_a_run_or_calibration_folder_stands_for_its_policy(tmp_path: Path, place: str) -> None:
    policy = a_policy()
    folder = policy.save(tmp_path / place)
    for path in (tmp_path, folder, folder / "policy.json", str(folder / "policy.safetensors")):
        assert Policy.load(path).content_hash == policy.content_hash
    assert holds_policy(tmp_path)


# ---- the hashes -------------------------------------------------------------------------------------------------


def test_the_content_hash_is_of_what_changes_what_a_model_says() -> None:
    V, none = torch.eye(4)[:2], torch.full((2,), math.inf)

    def hashed(layer: int = 1, V: Any = V, lo: Any = -none, hi: Any = none, shift: Any = 0 * V[:, 0]) -> str:
        return Policy((Intervention(layer, V, lo, hi, shift),)).content_hash

    one, base = torch.ones(2), hashed()
    others = [hashed(layer=2), hashed(V=V.flip(0)), hashed(lo=-one), hashed(hi=one), hashed(shift=one)]
    others += [Policy((Intervention(1, V, -none, none, 0 * one),), positions="decode").content_hash]
    assert len({base, *others}) == 7
    assert Policy((Intervention(1, V, -none, none, 0 * one),), {"kind": "x"}, model=MODEL).content_hash == base


def test_the_axis_hash_is_of_layers_and_vectors() -> None:
    axis = an_axis()
    same = Axis(axis.vectors.clone(), axis.layers, 7, {"model": "m"})
    assert same.content_hash == axis.content_hash
    assert Axis(axis.vectors, (2, 4, 8), 4).content_hash != axis.content_hash
    assert Axis(axis.vectors + 1, axis.layers, 4).content_hash != axis.content_hash


# ---- what is not an artifact ------------------------------------------------------------------------------------


def test_bounds_by_sequence_are_refused(tmp_path: Path) -> None:
    policy = Policy((iv.cap(1, torch.arange(1.0, 5), torch.zeros(3, 1)),))
    with pytest.raises(UsageError, match="Layer 1 has bounds for each of the 3 sequences of a batch"):
        policy.save(tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_what_json_or_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    part = iv.cap(1, torch.arange(1.0, 5), 0.0)
    for said, error in (({"x": {1, 2}}, UsageError), ({"kind": 5}, UsageError), ({"x": [math.nan]}, NonFiniteError)):
        with pytest.raises(error, match=r"policy\.json"):
            Policy((part,), said).save(tmp_path / "p")
    with pytest.raises(UsageError, match="counts layers from 0"):
        Policy((iv.cap(-1, torch.arange(1.0, 5), 0.0),)).save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="a policy is a folder"):
        Policy((part,)).save(tmp_path / "file")


# ---- damage -----------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "policy.json"
    said = json.loads(file.read_text())
    said.update(changes)
    file.write_text(json.dumps({key: value for key, value in said.items() if value != "gone"}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Other tensors, with the JSON's hash made to agree: as another tool might write them."""
    V, lo, hi, shift = (torch.zeros(1, 8), *(torch.zeros(1) for _ in range(3)))
    V[0, 0] = 1
    arrays = {
        f"layer_{layer}.{name}": value.numpy().copy()
        for layer in (2, 7)
        for name, value in (("V", V), ("lo", lo), ("hi", hi), ("shift", shift))
    }
    change(arrays)
    write_arrays(folder / "policy.safetensors", arrays)
    parts = [
        (layer, *(torch.from_numpy(arrays[f"layer_{layer}.{name}"]) for name in ("V", "lo", "hi", "shift")))
        for layer in (2, 7)
    ]
    edit(folder, content_hash=content_hash("reply", parts))  # type: ignore[arg-type]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "json cut": (lambda f: cut(f / "policy.json"), r"policy\.json is not valid JSON"),
    "json of something else": (lambda f: (f / "policy.json").write_text("[1]"), r"policy\.json is not a policy"),
    "json gone": (lambda f: (f / "policy.json").unlink(), r"holds policy\.safetensors but no policy\.json"),
    "tensors gone": (lambda f: (f / "policy.safetensors").unlink(), r"holds policy\.json but no policy\.safetensors"),
    "tensors cut": (lambda f: cut(f / "policy.safetensors"), r"policy\.safetensors is damaged"),
    "tensors empty": (lambda f: (f / "policy.safetensors").write_bytes(b""), r"policy\.safetensors is damaged"),
    "a bit flipped": (lambda f: flip(f / "policy.safetensors"), r"policy\.safetensors does not hold .* damaged"),
    "newer": (
        lambda f: edit(f, format="persona-axis/policy/2", persona_axis="9.1"),
        r"policy\.json has format .*2, written by persona-axis 9\.1.*Upgrade",
    ),
    "other format": (lambda f: edit(f, format="persona-axis/axis/1"), r"policy\.json is not a policy"),
    "unknown key": (lambda f: edit(f, extra=1), r"policy\.json is damaged: extra"),
    "missing key": (lambda f: edit(f, positions="gone"), r"policy\.json is damaged: positions"),
    "wrong positions": (lambda f: edit(f, positions="some"), r"policy\.json is damaged: positions"),
    "negative layer": (lambda f: edit(f, layers=[-2, 7]), r"policy\.json is damaged: layers\.0"),
    "layer as text": (lambda f: edit(f, layers=["2", 7]), r"policy\.json is damaged: layers\.0"),
    "no layers": (lambda f: edit(f, layers=[]), r"policy\.json is damaged: layers"),
    "other layers": (lambda f: edit(f, layers=[2, 8]), r"policy\.safetensors holds layer_2\.V"),
    "other positions": (lambda f: edit(f, positions="all"), r"does not hold the tensors"),
    "no model": (lambda f: edit(f, model={"revision": "a"}), r"policy\.json: .* does not identify a model"),
    "other hash": (lambda f: edit(f, content_hash="0" * 64), r"does not hold the tensors"),
    "NaN bound": (
        lambda f: rewrite(f, lambda a: a["layer_7.lo"].fill(math.nan)),
        r"policy\.safetensors: Layer 7: a bound is NaN",
    ),
    "NaN direction": (
        lambda f: rewrite(f, lambda a: a["layer_2.V"].fill(math.nan)),
        r"policy\.safetensors: Layer 2: a direction holds NaN",
    ),
    "zero direction": (
        lambda f: rewrite(f, lambda a: a["layer_2.V"].fill(0)),
        r"policy\.safetensors: Layer 2: the rows of V are not orthonormal",
    ),
    "lo above hi": (
        lambda f: rewrite(f, lambda a: a["layer_2.lo"].fill(3)),
        r"policy\.safetensors: Layer 2: a lower bound lies above",
    ),
    "bounds by sequence": (
        lambda f: rewrite(f, lambda a: a.update({"layer_2.lo": np.zeros((3, 1), np.float32)})),
        r"layer_2\.lo has shape \(3, 1\)",
    ),
    "float64": (
        lambda f: rewrite(f, lambda a: a.update({"layer_2.lo": np.zeros(1)})),
        r"layer_2\.lo holds float64",
    ),
    "no directions": (
        lambda f: rewrite(f, lambda a: a.update({"layer_2.V": np.zeros((0, 8), np.float32)})),
        r"layer_2\.V has shape \(0, 8\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    folder = a_policy().save(tmp_path / "policy")
    spoil, words = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(StorageError, match=words):
        Policy.load(folder)
    assert holds_policy(folder)


@pytest.mark.parametrize("name", ["policy.json", "policy.safetensors"])
def test_files_of_two_policies_are_refused(tmp_path: Path, name: str) -> None:
    folder = a_policy().save(tmp_path / "one")
    shutil.copy(a_policy(1).save(tmp_path / "two") / name, folder / name)
    with pytest.raises(StorageError, match=r"policy\.safetensors does not hold .* belongs to another policy"):
        Policy.load(folder)


def test_no_policy_at_all_is_said_with_the_places(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / "policy.json"):
        with pytest.raises(StorageError, match=r"No policy in .*calibration/policy"):
            Policy.load(path)
    assert not holds_policy(tmp_path)


def test_every_cut_of_either_file_is_an_error(tmp_path: Path) -> None:
    folder = a_policy().save(tmp_path / "policy")
    for name in ("policy.json", "policy.safetensors"):
        whole = (folder / name).read_bytes()
        for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):  # the JSON's last byte is its newline
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(StorageError, match=name.replace(".", r"\.")):
                Policy.load(folder)
        (folder / name).write_bytes(whole)
    Policy.load(folder)
