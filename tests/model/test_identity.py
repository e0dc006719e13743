"""Which model something was made on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import BitsAndBytesConfig

from persona_axis.errors import UsageError
from persona_axis.model.identity import ModelIdentity
from persona_axis.model.loading import load_model
from tests.conftest import tiny_tokenizer, tiny_weights


def test_a_chat_model_says_all_of_it(tiny: Any) -> None:
    assert ModelIdentity.of(tiny("llama")) == ModelIdentity("tiny llama", "", "", 4, 32)


def test_a_bare_model_without_a_name_claims_none(tiny: Any) -> None:
    assert ModelIdentity.of(tiny("gpt2").model) == ModelIdentity("", "", "", 4, 32)


def test_a_folder_is_the_same_model_loaded_either_way(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "my model"
    tiny_weights("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    identity = ModelIdentity.of(load_model(str(folder), dtype="float32", device="cpu"))
    assert identity == ModelIdentity.of(AutoModelForCausalLM.from_pretrained(folder))
    assert (identity.name, identity.revision[:6]) == ("my model", "local-")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, ""),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq 4-bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "quanto", "weights": "int8"}, "quanto int8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 8}}, "b": {"weights": {"num_bits": 4}}},
            },
            "compressed-tensors 4/8-bit",
        ),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes 4-bit"),
        (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes 8-bit"),
    ],
)
def test_quantisation_is_method_and_bits(tiny: Any, config: Any, words: str) -> None:
    model = tiny("llama", fresh=True).model
    model.config.quantization_config = config
    assert ModelIdentity.of(model).quantisation == words


def test_what_an_axis_records() -> None:
    whole = ModelIdentity("org/model", "abc", "fp8", 4, 8)
    assert ModelIdentity.recorded({"identity": asdict(whole), "model": "other"}, 8) == whole
    assert ModelIdentity.recorded({"model": "org/model", "revision": "abc"}, 8) == ModelIdentity(
        "org/model", "abc", None, None, 8
    )
    assert ModelIdentity.recorded({"seed": 3}, 8) is None


@pytest.mark.parametrize(
    "known", ["org/model", {}, {"revision": "a"}, {"name": 5}, {"name": "m", "n_layers": "many"}, {"name": "m", "x": 1}]
)
def test_anything_else_is_refused(known: Any) -> None:
    with pytest.raises(UsageError, match="does not identify a model"):
        ModelIdentity.from_dict(known)


def test_a_user_must_name_the_model() -> None:
    assert ModelIdentity.told("org/model", d_model=8) == ModelIdentity("org/model", "", None, None, 8)
    with pytest.raises(UsageError, match="--model-id"):
        ModelIdentity.told(" ")


def test_in_words() -> None:
    assert str(ModelIdentity("m", "abc", "fp8", 4, 8)) == "m, revision abc, fp8, 4 layers, width 8"
    assert str(ModelIdentity("", "")) == "unnamed, revision not known"
