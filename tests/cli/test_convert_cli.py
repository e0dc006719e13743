"""``persona-axis convert``: every kind of source, every format, and a message that says what was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from persona_axis.geometry.axis import Axis
from persona_axis.steering import interventions as iv
from persona_axis.steering.policy import Policy
from tests.cli.conftest import Invoke
from tests.steering.reference_files import MODEL, RunsCode, capping_config, random_vectors

NAMED = ("--model-id", MODEL, "--revision", "abc")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with one source of every kind."""
    folder = tmp_path / "sources"
    (folder / "vectors").mkdir(parents=True)
    torch.save(random_vectors().bfloat16(), folder / "axis.pt")
    torch.save(capping_config({1: -1.5, 2: 0.25}, random_vectors()), folder / "capping_config.pt")
    for seed, name in enumerate(("default", "bard", "cook")):
        kind = "mean" if name == "default" else "pos_3"
        torch.save({"vector": random_vectors(seed), "type": kind, "role": name}, folder / "vectors" / f"{name}.pt")
    axis = Axis(random_vectors(), (0, 1, 2, 3), 2, {"model": MODEL, "revision": "abc"})
    axis.save(folder / "axis.safetensors")
    axis.save(folder / "run" / "fit" / "axis.safetensors")
    Policy.cap(axis, {1: 1.5, 2: -0.25}, percentile_paper=25, percentile_assistant=75).save(folder / "caps")
    Policy((iv.add(2, axis.at(), -3.0),)).save(folder / "calibrated" / "calibration" / "policy")
    return folder


def test_a_capping_configuration_becomes_a_policy_and_goes_back(invoke: Invoke, sources: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "policy", tmp_path / "back.pt"
    done = invoke("convert", sources / "capping_config.pt", "--to", "persona-axis", "--out", out, *NAMED)
    assert (done.code, done.err) == (0, "")
    for words in (
        "(reference capping configuration)",
        f"{out} (policy)",
        "org/model, revision abc",
        "layers  1, 2 (2); positions: all",
        "percentile 75 toward the Assistant; the reference's p0.25 (percentile 25 along the negated axis)",
        "    1     +1.5000       -1.5000",
        "    2     -0.2500       +0.2500",
    ):
        assert words in done.out
    assert len(done.out.splitlines()) < 24
    policy = Policy.load(out)
    assert policy.content_hash[:16] in done.out
    assert invoke("convert", out, "--to", "reference", "--out", back, "--experiment", "mine").code == 0
    config = torch.load(back, weights_only=True)
    assert [e["id"] for e in config["experiments"]] == ["mine"]
    assert [i["cap"] for i in config["experiments"][0]["interventions"]] == [-1.5, 0.25]


@pytest.mark.parametrize("name", ["axis.pt", "vectors"])
def test_an_axis_is_imported_with_its_model(invoke: Invoke, sources: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "axis.safetensors"
    done = invoke("convert", sources / name, "--to", "persona-axis", "--out", out, "--layer", "1", *NAMED)
    assert (done.code, "layers  0 to 3; analysed: 1" in done.out) == (0, True)
    axis = Axis.load(out)
    assert (axis.layer, axis.metadata["model"], axis.metadata["revision"]) == (1, MODEL, "abc")


@pytest.mark.parametrize("name", ["axis.safetensors", "run"])
def test_an_axis_goes_out(invoke: Invoke, sources: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "axis.pt"
    assert invoke("convert", sources / name, "--to", "reference", "--out", out).code == 0
    assert torch.load(out, weights_only=True).dtype == torch.float32
    half = tmp_path / "half.pt"
    assert invoke("convert", sources / name, "--to", "reference", "--out", half, "--dtype", "bfloat16").code == 0
    assert torch.load(half, weights_only=True).dtype == torch.bfloat16


def test_control_vectors(invoke: Invoke, sources: Path, tmp_path: Path) -> None:
    from_policy, from_axis, back = tmp_path / "p.gguf", tmp_path / "a.gguf", tmp_path / "back"
    done = invoke("convert", sources / "calibrated", "--to", "gguf", "--out", from_policy, "--model-hint", "llama")
    assert (done.code, "--control-vector" in done.out) == (0, True)
    assert GGUFReader(from_policy).fields["controlvector.model_hint"].contents() == "llama"
    steps = ("--layer", "1-2", "--strength", "-3")
    assert invoke("convert", sources / "axis.safetensors", "--to", "gguf", "--out", from_axis, *steps).code == 0
    assert [t.name for t in GGUFReader(from_axis).tensors] == ["direction.1", "direction.2"]
    assert invoke("convert", from_axis, "--to", "persona-axis", "--out", back, *NAMED).code == 0
    unit = random_vectors()[2] / random_vectors()[2].norm()
    part = Policy.load(back).interventions[1]
    torch.testing.assert_close(part.shift @ part.V, -3 * unit, rtol=1e-5, atol=1e-5)


def test_a_long_policy_still_fits_a_screen(invoke: Invoke, sources: Path, tmp_path: Path) -> None:
    long = Policy(tuple(iv.band(layer, torch.ones(4), -1.0, 2.0) for layer in range(80))).save(tmp_path / "long")
    done = invoke("convert", long, "--to", "persona-axis", "--out", tmp_path / "copy")
    assert "... 64 more" in done.out
    assert len(done.out.splitlines()) <= 24
    assert "+2.0000" in done.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("axis.pt", "--to", "persona-axis", "--out", "a.safetensors"), "Name it with --model-id"),
        (("caps", "--to", "onnx", "--out", "x"), "Unknown format 'onnx'"),
        (("caps", "--to", "gguf", "--out", "x.gguf"), "llama.cpp cannot hold a model"),
        (("caps", "--to", "gguf", "--out", "x.bin"), "ending in .gguf"),
        (("caps", "--to", "persona-axis", "--out", "x.safetensors"), "a policy is a folder"),
        (("caps", "--to", "reference", "--out", "x.pt", "--model-id", "m"), "--model-id does not apply"),
        (("caps", "--to", "reference", "--out", "x.pt", "--layer", "1"), "--layer does not apply"),
        (("caps", "--to", "reference", "--out", "x.pt", "--dtype", "float32"), "--dtype does not apply"),
        (("run", "--to", "gguf", "--out", "x.gguf"), "say where and how much"),
        (("run", "--to", "gguf", "--out", "x.gguf", "--layer", "0", "--strength", "1"), "Layer 0: llama.cpp rejects"),
        (("run", "--to", "reference", "--out", "x.pt", "--experiment", "e"), "--experiment does not apply"),
        (("run", "--to", "reference", "--out", "x.pt", "--dtype", "int8"), "choose from float32, bfloat16"),
        (("calibrated", "--to", "reference", "--out", "x.pt"), "a shift"),
        (("axis.pt", "--to", "reference", "--out", "x.pt", "--layer", "1,2", *NAMED), "one analysed layer"),
        (
            ("capping_config.pt", "--to", "persona-axis", "--out", "x", "--experiment", "e", *NAMED),
            "There are 1: layers_1:3-p0.25",
        ),
    ],
)
def test_wrong_usage_is_one_message_and_writes_nothing(
    invoke: Invoke, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], words: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = invoke("convert", sources / argv[0], *argv[1:])
    assert (done.code, words in done.message, done.out) == (2, True, "")
    assert list(Path().iterdir()) == []


def test_nothing_is_overwritten(invoke: Invoke, sources: Path, tmp_path: Path) -> None:
    for to, name in (("reference", "x.pt"), ("persona-axis", "x")):
        assert invoke("convert", sources / "caps", "--to", to, "--out", tmp_path / name).code == 0
        again = invoke("convert", sources / "caps", "--to", to, "--out", tmp_path / name)
        assert (again.code, "exists. Name another --out" in again.message) == (2, True)


def test_files_that_are_nothing_known_are_one_message(invoke: Invoke, sources: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    torch.save({"x": 1}, tmp_path / "x.pt")
    torch.save(RunsCode(tmp_path / "ran"), tmp_path / "code.pt")
    (tmp_path / "cut.pt").write_bytes((sources / "axis.pt").read_bytes()[:200])
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    edited = sources / "caps" / "policy.json"
    edited.write_text(json.dumps({**json.loads(edited.read_text()), "layers": [1, 3]}))
    for source, words in (
        (tmp_path / "absent.pt", "does not exist"),
        (tmp_path / "empty", "no run folder, policy folder or folder of persona vectors"),
        (tmp_path / "x.pt", "holds x: no axis and no capping configuration"),
        (tmp_path / "code.pt", "Nothing of it was run"),
        (tmp_path / "cut.pt", "cut.pt is damaged"),
        (tmp_path / "notes.txt", "notes.txt"),
        (tmp_path / "bad.gguf", "bad.gguf is damaged"),
        (sources / "vectors" / "bard.pt", "name its folder"),
        (sources / "caps", "policy.safetensors holds"),
    ):
        options = () if source.name == "caps" else NAMED
        done = invoke("convert", source, "--to", "persona-axis", "--out", tmp_path / "out", *options)
        assert (done.code, words in done.message) == (1, True), done.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
