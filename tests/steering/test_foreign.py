"""Files of other people: the same model behaviour from them, and what they cannot say refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from persona_axis.errors import StorageError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import ModelIdentity
from persona_axis.model.loading import ChatModel
from persona_axis.steering import interventions as iv
from persona_axis.steering.capping_config import experiment_id, export_capping, import_capping
from persona_axis.steering.control_vector import export_control_vector, import_control_vector
from persona_axis.steering.foreign import export_axis, import_axis, import_vectors
from persona_axis.steering.hooks import cap, held
from persona_axis.steering.policy import Policy
from tests.steering.reference_files import (
    MODEL,
    N_LAYERS,
    WIDTH,
    RunsCode,
    capped_by_the_reference,
    capping_config,
    random_vectors,
)

IDS = torch.arange(3, 33).reshape(2, 15)
Tiny = Callable[..., ChatModel]


@torch.inference_mode()
def logits(chat: ChatModel) -> Tensor:
    return chat.model(input_ids=IDS, use_cache=False).logits.clone()


def nameless(policy: Policy) -> Policy:
    """For the tiny models, which are not the one that the files are for."""
    return Policy(policy.interventions, policy.provenance, policy.positions)


def saved(tmp_path: Path, content: Any, name: str = "capping_config.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


# ---- axes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_axis_keeps_values_sign_and_layers(tmp_path: Path, dtype: torch.dtype, wrapped: bool) -> None:
    vectors = random_vectors().to(dtype)
    content = {"axis": vectors, "metadata": {"model": "theirs", "extra": torch.ones(2)}} if wrapped else vectors
    axis = import_axis(saved(tmp_path, content, "axis.pt"), MODEL, "abc")
    assert torch.equal(axis.vectors, vectors.float())
    assert (axis.layers, axis.layer) == ((0, 1, 2, 3), 2)
    expected = ModelIdentity(MODEL, "abc", None, N_LAYERS, WIDTH)
    assert ModelIdentity.recorded(axis.metadata, WIDTH) == expected
    assert Policy.cap(axis, {1: 0.0}).model == expected
    if wrapped:
        source = axis.metadata["source"]
        assert (source["metadata"], source["metadata_left_out"]) == ({"model": "theirs"}, ["extra"])
    back = Axis.load(axis.save(tmp_path / "axis.safetensors"))
    assert back.metadata == axis.metadata
    assert back.content_hash == axis.content_hash


def test_an_axis_goes_out_as_a_raw_tensor_and_back(tmp_path: Path) -> None:
    axis = Axis(random_vectors(), (0, 1, 2, 3), 1)
    plain = torch.load(export_axis(axis, tmp_path / "a.pt"), weights_only=True)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, axis.vectors)
    half = torch.load(export_axis(axis, tmp_path / "b.pt", torch.bfloat16), weights_only=True)
    assert torch.equal(half, axis.vectors.bfloat16())
    assert import_axis(tmp_path / "a.pt", MODEL, layer=1).content_hash == axis.content_hash


@pytest.mark.parametrize(
    "axis",
    [
        Axis(random_vectors(n_layers=2), (1, 2), 1),
        Axis(random_vectors(n_layers=2), (0, 1), 1, {"identity": {"name": "m", "n_layers": 4}}),
    ],
)
def test_an_axis_without_some_layers_cannot_go_out(tmp_path: Path, axis: Axis) -> None:
    with pytest.raises(UsageError, match="tells layers by their position"):
        export_axis(axis, tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (random_vectors()[0], r"\[32\], where 2 dimensions"),
        (torch.ones(4, 8, dtype=torch.int64), "where 2 dimensions of floats"),
        (torch.full((4, 8), math.nan), "NaN or infinity"),
        (torch.cat([torch.zeros(1, 8), torch.ones(3, 8)]), "zero at layer 0"),
        ({"vector": torch.ones(4, 8)}, "is no axis: it holds vector"),
        ({"axis": [1.0]}, "is list"),
        (torch.ones(4, 8).to_sparse(), "sparse"),
    ],
)
def test_what_is_no_axis_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(StorageError, match=words):
        import_axis(saved(tmp_path, content, "axis.pt"), MODEL)


def test_a_layer_that_is_not_there_and_a_model_without_a_name_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, random_vectors(), "axis.pt")
    with pytest.raises(UsageError, match="layers 0 to 3; layer 4"):
        import_axis(file, MODEL, layer=4)
    with pytest.raises(UsageError, match="--model-id"):
        import_axis(file, "")


# ---- persona vectors --------------------------------------------------------------------------------------------


def persona_files(folder: Path, layout: str) -> Tensor:
    """Three roles and the default persona; the axis of them."""
    assistant, roles = random_vectors(9), [random_vectors(seed) for seed in range(3)]
    where = folder / "role_vectors" if layout == "hub" else folder
    where.mkdir(parents=True, exist_ok=True)
    for name, vector in zip(("bard", "cook", "default_mode_network"), roles, strict=True):
        content = {"vector": vector, "type": "pos_3", "role": name} if layout == "pipeline" else vector.bfloat16()
        torch.save(content, where / f"{name}.pt")
    if layout == "pipeline":
        torch.save({"vector": assistant, "type": "mean", "role": "default"}, folder / "default.pt")
        return assistant - torch.stack(roles).mean(0)
    torch.save(assistant.bfloat16(), folder / "default_vector.pt")
    torch.save(random_vectors(5), folder / "assistant_axis.pt")  # beside them on the Hub; no role
    return assistant.bfloat16().float() - torch.stack(roles).bfloat16().float().mean(0)


@pytest.mark.parametrize("layout", ["pipeline", "flat", "hub"])
def test_vectors_of_any_layout_make_their_axis(tmp_path: Path, layout: str) -> None:
    expected = persona_files(tmp_path, layout)
    axis = import_vectors(tmp_path, MODEL, layer=1)
    torch.testing.assert_close(axis.vectors, expected, rtol=1e-6, atol=1e-5)
    assert (axis.layer, axis.metadata["source"]["roles"]) == (1, 3)
    if layout == "hub":
        assert import_vectors(tmp_path / "role_vectors", MODEL).content_hash == axis.content_hash


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("cook.pt", {"vector": random_vectors(), "type": "mean", "role": "cook"}, r"cook\.pt is of type 'mean'"),
        ("cook.pt", {"vector": random_vectors(), "type": "pos_3", "role": "bard"}, "more than one file .* bard"),
        ("cook.pt", {"role": "cook"}, "'vector' is missing"),
        ("cook.pt", random_vectors(width=16), r"\[4, 16\].* two models"),
        ("cook.pt", random_vectors() * math.inf, "NaN or infinity"),
        ("default_vector.pt", random_vectors(), r"default_vector\.pt and .*default\.pt"),
    ],
)
def test_a_wrong_vector_is_refused(tmp_path: Path, name: str, content: Any, words: str) -> None:
    persona_files(tmp_path, "pipeline")
    torch.save(content, tmp_path / name)
    with pytest.raises(StorageError, match=words):
        import_vectors(tmp_path, MODEL)


def test_vectors_without_a_default_or_without_roles_are_refused(tmp_path: Path) -> None:
    persona_files(tmp_path, "pipeline")
    (tmp_path / "default.pt").unlink()
    with pytest.raises(StorageError, match=r"needs one vector of the default persona.*found none"):
        import_vectors(tmp_path, MODEL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="holds no role vectors"):
        import_vectors(tmp_path / "empty", MODEL)


# ---- capping configurations -------------------------------------------------------------------------------------


def caps_between(chat: ChatModel, axis: Tensor, layers: range) -> dict[int, float]:
    """Caps on the negated axis that about half of the tokens of a plain forward exceed."""
    caps = {}
    with torch.inference_mode():
        hidden = chat.model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    for layer in layers:
        v = -axis[layer].bfloat16().float()
        caps[layer] = float((hidden[layer + 1] @ (v / v.norm())).median())
    return caps


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_imported_policy_holds_a_model_as_the_reference_does(tiny: Tiny, tmp_path: Path, arch: str) -> None:
    chat, axis = tiny(arch), random_vectors()
    config = capping_config(caps_between(chat, axis, range(1, 3)), axis)
    policy = import_capping(saved(tmp_path, config), MODEL)
    with capped_by_the_reference(chat.blocks, config):
        theirs = logits(chat)
    with cap(chat, nameless(policy)):
        ours = logits(chat)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, logits(chat), atol=1e-2)
    # Neither sign alone would do.
    flipped = tuple(iv.cap(p.layer, -p.V[0], float(p.lo)) for p in policy.interventions)
    with cap(chat, Policy(flipped)):
        assert not torch.allclose(logits(chat), theirs, atol=1e-2)


def test_signs_percentiles_and_model_are_recorded(tmp_path: Path) -> None:
    axis = random_vectors()
    config = capping_config({1: -2.5, 2: 1.25}, axis)
    policy = import_capping(saved(tmp_path, config), MODEL, "abc", "layers_1:3-p0.25")
    assert policy.layers == (1, 2)
    for part, floor in zip(policy.interventions, (2.5, -1.25), strict=True):
        direction = axis[part.layer].bfloat16().float()
        torch.testing.assert_close(part.V[0], direction / direction.norm())
        assert (part.lo.tolist(), part.hi.tolist(), part.shift.tolist()) == ([floor], [math.inf], [0.0])
    assert policy.model == ModelIdentity(MODEL, "abc", None, None, WIDTH)
    said = policy.provenance
    assert (said["kind"], said["percentile_paper"], said["percentile_assistant"]) == ("cap", 25, 75)
    assert (said["source"]["file"], said["source"]["experiment"]) == ("capping_config.pt", "layers_1:3-p0.25")
    assert "note" not in said
    assert Policy.load(policy.save(tmp_path / "policy")).content_hash == policy.content_hash


@pytest.mark.parametrize(
    ("experiment", "both", "note"),
    [
        ("layers_1:3-p0.01", (1, 99), False),
        ("layers_1:3-p0.5", (50, 50), False),
        ("layers_1:3-p0.125", (12.5, 87.5), False),
        ("layers_1:2-p0.25", (25, 75), True),
        ("all_layers", (), False),
        ("layers_1:3-p25", (), False),
    ],
)
def test_what_an_id_says(tmp_path: Path, experiment: str, both: Any, note: bool) -> None:
    said = import_capping(
        saved(tmp_path, capping_config({1: 0.0, 2: 0.0}, random_vectors(), experiment)), MODEL
    ).provenance
    recorded = tuple(said[key] for key in ("percentile_paper", "percentile_assistant") if key in said)
    assert recorded == both
    assert ("note" in said) == note


def test_several_experiments_are_listed_until_one_is_named(tmp_path: Path) -> None:
    config = capping_config({1: 0.0}, random_vectors(), "layers_1:2-p0.5")
    config["experiments"].append({**config["experiments"][0], "id": "second"})
    file = saved(tmp_path, config)
    for asked in (None, "third"):
        with pytest.raises(UsageError, match=r"There are 2: layers_1:2-p0\.5, second"):
            import_capping(file, MODEL, experiment=asked)
    assert import_capping(file, MODEL, experiment="second").layers == (1,)


def two_on_a_layer(second: Tensor) -> dict[str, Any]:
    config = capping_config({1: 0.5}, random_vectors())
    config["vectors"]["other"] = {"vector": second, "layer": 1}
    config["experiments"][0]["interventions"].append({"vector": "other", "cap": -0.75})
    return config


def test_orthogonal_interventions_of_one_layer_become_one(tiny: Tiny, tmp_path: Path) -> None:
    chat = tiny("llama")
    first = -random_vectors()[1].bfloat16().float()
    second = random_vectors(3)[1]
    second -= (second @ first) / (first @ first) * first
    config = two_on_a_layer(second)
    policy = import_capping(saved(tmp_path, config), MODEL)
    assert [(p.layer, len(p.V)) for p in policy.interventions] == [(1, 2)]
    with capped_by_the_reference(chat.blocks, config):
        theirs = logits(chat)
    with held(chat, nameless(policy)):
        torch.testing.assert_close(logits(chat), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second", [random_vectors(3)[1], -random_vectors()[1]])
def test_other_interventions_of_one_layer_are_refused_with_the_reason(tmp_path: Path, second: Tensor) -> None:
    with pytest.raises(
        StorageError, match=r"Layer 1 has 2 interventions whose directions are not orthogonal.*one after"
    ):
        import_capping(saved(tmp_path, two_on_a_layer(second)), MODEL)


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    config = capping_config({1: 0.5, 2: 0.5}, random_vectors())
    change(config)
    return config


def first_vector(config: dict[str, Any]) -> dict[str, Any]:
    return config["vectors"]["layer_1/contrast_role_pos3_default1"]


def first_intervention(config: dict[str, Any]) -> dict[str, Any]:
    return config["experiments"][0]["interventions"][0]


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no cap": (lambda c: first_intervention(c).pop("cap"), "intervention 0 has no cap"),
    "cap NaN": (lambda c: first_intervention(c).update(cap=math.nan), "its cap is nan"),
    "cap text": (lambda c: first_intervention(c).update(cap="0.5"), "its cap is '0.5'"),
    "more keys": (lambda c: first_intervention(c).update(min=-3.0), "holds vector, cap, min"),
    "unknown vector": (lambda c: first_intervention(c).update(vector="v"), "names the vector 'v'"),
    "vector NaN": (lambda c: first_vector(c)["vector"].fill_(math.nan), "NaN or infinity"),
    "vector zero": (lambda c: first_vector(c)["vector"].zero_(), "zero or linearly dependent"),
    "vector 2-d": (lambda c: first_vector(c).update(vector=torch.ones(1, WIDTH)), "where 1 dimensions"),
    "other width": (lambda c: first_vector(c).update(vector=torch.ones(8)), "different widths, 8, 32"),
    "layer negative": (lambda c: first_vector(c).update(layer=-1), "has the layer -1"),
    "layer text": (lambda c: first_vector(c).update(layer="1"), "has the layer '1'"),
    "no interventions": (lambda c: c["experiments"][0].update(interventions=[]), "has no interventions"),
    "no id": (lambda c: c["experiments"][0].pop("id"), "experiment 0 has no id"),
    "two of a name": (lambda c: c["experiments"].append(c["experiments"][0]), "two experiments have the id"),
    "no vectors": (lambda c: c.pop("vectors"), "is no capping configuration"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_configuration_is_refused_with_the_file(tmp_path: Path, case: str) -> None:
    change, words = BROKEN[case]
    with pytest.raises(StorageError, match=rf"capping_config\.pt.*{words}"):
        import_capping(saved(tmp_path, broken(change)), MODEL)


# ---- capping configurations, written ----------------------------------------------------------------------------


def test_floors_go_out_and_hold_a_model_as_before(tiny: Tiny, tmp_path: Path) -> None:
    chat, axis = tiny("llama"), Axis(random_vectors(), (0, 1, 2, 3), 2)
    floors = {layer: -value for layer, value in caps_between(chat, axis.vectors, range(1, 3)).items()}
    parts = Policy.cap(axis, floors).interventions
    parts = (*parts, iv.cap(3, torch.eye(WIDTH)[:2], [0.5, -math.inf]))
    policy = Policy(parts, {"percentile_paper": 25})
    config = torch.load(export_capping(policy, tmp_path / "c.pt"), weights_only=True)
    assert config["experiments"][0]["id"] == "layers_1:4-p0.25"
    assert len(config["experiments"][0]["interventions"]) == 3  # the direction without a floor says nothing
    with capped_by_the_reference(chat.blocks, config):
        theirs = logits(chat)
    with held(chat, policy):
        torch.testing.assert_close(logits(chat), theirs, rtol=1e-4, atol=1e-4)
    back = import_capping(tmp_path / "c.pt", MODEL)
    for here, there in zip(policy.interventions, back.interventions, strict=True):
        torch.testing.assert_close(there.V, here.V[: len(there.V)])
        assert torch.equal(there.lo, here.lo[: len(there.lo)])


@pytest.mark.parametrize(
    ("layers", "said", "expected"),
    [
        ((46, 47, 48), {"percentile_paper": 25}, "layers_46:49-p0.25"),
        ((3,), {"percentile_paper": 1}, "layers_3:4-p0.01"),
        ((1, 3), {}, "layers_1,3"),
    ],
)
def test_the_id_of_what_goes_out(layers: tuple[int, ...], said: dict[str, Any], expected: str) -> None:
    assert experiment_id(Policy(tuple(iv.cap(layer, torch.ones(4), 0.0) for layer in layers), said)) == expected


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy((iv.band(1, torch.ones(4), -1.0, 1.0),)), "an upper bound"),
        (Policy((iv.ablate(1, torch.ones(4)),)), "an upper bound"),
        (Policy((iv.add(1, torch.ones(4), 1.0),)), "a shift"),
        (Policy((iv.cap(1, torch.ones(4), torch.zeros(2, 1)),)), "each sequence of a batch"),
        (Policy((iv.cap(1, torch.ones(4), -math.inf),)), "no floor at all"),
        (Policy((iv.cap(1, torch.ones(4), 0.0),), positions="reply"), "positions 'reply'"),
    ],
)
def test_what_a_configuration_cannot_say_is_refused(tmp_path: Path, policy: Policy, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export_capping(policy, tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()


# ---- damage and code --------------------------------------------------------------------------------------------

READERS = {"axis": import_axis, "capping": import_capping}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bare", [False, True])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, reader: str, bare: bool) -> None:
    marker, file = tmp_path / "ran", tmp_path / "file.pt"
    content = {"axis": random_vectors(), "vectors": {}, "experiments": [], "more": RunsCode(marker)}
    if bare:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file)
    with pytest.raises(StorageError, match=r"file\.pt is refused: .*Nothing of it was run") as refused:
        READERS[reader](file, MODEL)
    assert "weights_only" not in str(refused.value)  # no advice to load it all the same
    assert not marker.exists()
    torch.load(file, weights_only=False) if not bare else pickle.loads(file.read_bytes())
    assert marker.exists()  # it was a real one


@pytest.mark.parametrize("zipped", [True, False])
def test_every_cut_of_a_file_is_an_error(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "axis.pt"
    torch.save(random_vectors(width=8), file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        file.write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"axis\.pt"):
            import_axis(file, MODEL)
    with pytest.raises(StorageError, match="is missing"):
        import_axis(tmp_path / "absent.pt", MODEL)


# ---- control vectors --------------------------------------------------------------------------------------------


def an_adding_policy() -> Policy:
    several = iv.add(3, random_vectors(4)[:2], [1.5, -2.0])
    return Policy((iv.add(1, random_vectors()[1], -4.0), several), model=ModelIdentity(MODEL, d_model=WIDTH))


def test_a_control_vector_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    policy = an_adding_policy()
    reader = GGUFReader(export_control_vector(policy, tmp_path / "v.gguf", hint="llama"))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert reader.fields["general.name"].contents() == MODEL
    # Named by the zero-based block to whose output the vector is added.
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    for tensor, part in zip(reader.tensors, policy.interventions, strict=True):
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [WIDTH]
        zero = torch.zeros(1, WIDTH)
        np.testing.assert_allclose(tensor.data, iv.apply(zero, part)[0].numpy(), rtol=1e-6, atol=1e-6)


def test_adding_a_control_vector_steers_as_its_policy(tiny: Tiny, tmp_path: Path) -> None:
    chat = tiny("llama")
    policy = an_adding_policy()
    tensors = GGUFReader(export_control_vector(policy, tmp_path / "v.gguf")).tensors
    added = {int(tensor.name.split(".")[1]): torch.tensor(np.array(tensor.data)) for tensor in tensors}

    def add_to(layer: int) -> Any:
        return chat.blocks[layer].register_forward_hook(
            lambda block, args, out: (out[0] + added[layer], *out[1:]) if isinstance(out, tuple) else out + added[layer]
        )

    handles = [add_to(layer) for layer in added]
    try:
        theirs = logits(chat)
    finally:
        for handle in handles:
            handle.remove()
    back = nameless(import_control_vector(tmp_path / "v.gguf", MODEL))
    for ours in (nameless(policy), back):
        with held(chat, ours):
            torch.testing.assert_close(logits(chat), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy((iv.cap(1, torch.ones(4), 0.0),)), "bounds.*llama.cpp cannot hold a model"),
        (Policy((iv.ablate(1, torch.ones(4)),)), "bounds"),
        (Policy((iv.add(0, torch.ones(4), 1.0),)), "Layer 0: llama.cpp rejects"),
        (Policy((iv.add(1, torch.ones(4), 0.0),)), "adds nothing"),
        (Policy((iv.add(1, torch.ones(4), torch.ones(2, 1)),)), "each sequence of a batch"),
        (Policy((iv.add(1, torch.ones(4), 1.0),), positions="decode"), "at every token"),
    ],
)
def test_what_a_control_vector_cannot_do_is_refused(tmp_path: Path, policy: Policy, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export_control_vector(policy, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


def gguf_file(path: Path, arch: str, tensors: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(path, arch)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONES = np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("arch", "tensors", "words"),
    [
        ("llama", {"direction.1": ONES}, "architecture 'llama', not a control vector"),
        ("controlvector", {"direction.0": ONES}, r"direction\.0 .* none that llama\.cpp would load"),
        ("controlvector", {"weight": ONES}, "tensor weight"),
        ("controlvector", {"direction.1": ONES.astype(np.float16)}, "F16"),
        ("controlvector", {"direction.1": np.ones((2, 8), np.float32)}, "2 dimensions"),
        ("controlvector", {"direction.1": 0 * ONES}, r"direction\.1: .*zero"),
        ("controlvector", {"direction.1": ONES * np.float32(np.nan)}, r"direction\.1: .*NaN"),
        ("controlvector", {"direction.1": ONES, "direction.2": ONES[:4]}, "the widths 4, 8"),
        ("controlvector", {}, r"the widths \(none\)"),
    ],
)
def test_what_is_no_control_vector_is_refused(
    tmp_path: Path, arch: str, tensors: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(StorageError, match=words):
        import_control_vector(gguf_file(tmp_path / "v.gguf", arch, tensors), MODEL)


def test_every_cut_of_a_control_vector_is_an_error(tmp_path: Path) -> None:
    file = export_control_vector(an_adding_policy(), tmp_path / "v.gguf")
    whole = file.read_bytes()
    end = GGUFReader(file).tensors[-1]
    used = int(end.data_offset + end.n_bytes)  # padding may follow
    for length in [*range(0, used, 7), used - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"v\.gguf"):
            import_control_vector(file, MODEL)
