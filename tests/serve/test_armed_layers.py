"""The operator after every decoder layer: which modules get it, and what it sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layered_models import (
    KINDS,
    N_LAYERS,
    Fused,
    Plain,
    PPMissingLayer,
    Seen,
    WithVision,
    a_model,
    inputs,
    streams,
    watching,
)
from small_policies import WIDTH
from torch import Tensor, nn

from persona_axis.errors import ModelError
from persona_axis.serve.vllm import layers
from persona_axis.serve.vllm.layers import arm, armed, stream_of, vllm_layers

# ---- which modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_are_the_one_list_of_that_length(kind: type[nn.Module]) -> None:
    model = a_model(kind)
    assert vllm_layers(model, N_LAYERS) == dict(enumerate(model.model.layers))


def test_a_vision_tower_is_not_the_language_model() -> None:
    model = WithVision(Fused)
    assert vllm_layers(model, N_LAYERS) == dict(enumerate(model.language_model.model.layers))


def test_lists_inside_of_layers_are_not_layers() -> None:
    class Experts(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_LAYERS))

    model = a_model(Experts)
    assert list(vllm_layers(model, N_LAYERS).values()) == list(model.model.layers)


@pytest.mark.parametrize("name", ["PPMissingLayer", "StageMissingLayer"])
def test_layers_of_a_pipeline_stage_keep_their_global_numbers(name: str) -> None:
    model = a_model()
    model.model.layers[0] = type(name, (PPMissingLayer,), {})()
    blocks, seen = vllm_layers(model, N_LAYERS), Seen()
    assert list(blocks) == [1, 2]
    arm(blocks, watching(seen))
    model(inputs())
    assert [layer for layer, _ in seen] == [1, 2]
    assert armed(blocks) == (1, 2)


def test_no_list_or_several_are_refused_with_what_was_seen() -> None:
    with pytest.raises(ModelError, match=r"its 7 decoder layers \(0 lists match\). Saw model.layers of 3"):
        vllm_layers(a_model(), 7)
    with pytest.raises(ModelError, match="no ModuleList at all"):
        vllm_layers(nn.Linear(2, 2), 2)
    both = WithVision(Fused)
    both.get_language_model = lambda: both  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"2 lists match.*vision_tower.layers of 3, language_model.model.layers of 3"):
        vllm_layers(both, N_LAYERS)


# ---- what it sees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_sees_the_stream_after_every_layer(kind: type[nn.Module]) -> None:
    seen, model = Seen(), a_model(kind)
    blocks = vllm_layers(model, N_LAYERS)
    assert armed(blocks) == ()
    arm(blocks, watching(seen))
    assert armed(blocks) == (0, 1, 2)
    model(inputs())
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for (_, stream), wanted in zip(seen, streams(a_model(kind), inputs()), strict=True):
        torch.testing.assert_close(stream, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_changes_is_what_the_next_layer_reads(kind: type[nn.Module]) -> None:
    model = a_model(kind)
    arm(vllm_layers(model, N_LAYERS), lambda hidden, residual, layer: hidden.add_(layer + 1.0))
    wanted = streams(a_model(kind), inputs(), lambda layer, h: h + (layer + 1.0))
    torch.testing.assert_close(model(inputs()), wanted[-1])


def test_an_armed_layer_stays_the_layer_that_it_was() -> None:
    model = a_model()
    before = dict(model.named_parameters())
    arm(vllm_layers(model, N_LAYERS), watching([]))
    assert dict(model.named_parameters()).keys() == before.keys()
    block = model.model.layers[1]
    assert isinstance(block, Fused)
    assert (type(block).__name__, type(block).__module__) == ("Fused", Fused.__module__)
    assert not hasattr(Fused, "persona_axis")  # other models of the class are left alone


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3), None), "NoneType"),
        (torch.zeros(1, 2, 3), r"\[1, 2, 3\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), r"\[2, 3\], \[2, 4\]"),
        ((torch.zeros(2, 3), "x"), "str"),
        ((), "tuple"),
        (None, "NoneType"),
        ([torch.zeros(2, 3)], "list"),
        ({"hidden": torch.zeros(2, 3)}, "dict"),
    ],
)
def test_a_layer_that_returns_something_else_is_refused(output: Any, says: str) -> None:
    class Odd(Plain):
        def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
            return output

    with pytest.raises(ModelError, match=f"A layer Odd returned .*{says}.*PERSONA_AXIS_DISABLE=1"):
        stream_of(output, "Odd")
    model = a_model(Odd)
    arm(vllm_layers(model, N_LAYERS), watching([]))
    with pytest.raises(ModelError, match="A layer Odd returned"):
        model(inputs())


def test_models_of_one_process_do_not_mix() -> None:
    one, other = a_model(seed=1), a_model(seed=2)
    seen: dict[str, Seen] = {"one": [], "other": []}
    for name, model in (("one", one), ("other", other)):
        number = layers.next_model()
        arm(vllm_layers(model, N_LAYERS), watching(seen[name]))
        assert layers.next_model() == number + 1
    other(inputs())
    assert [layer for layer, _ in seen["other"]] == [0, 1, 2]
    assert seen["one"] == []
    one(inputs())
    assert len(seen["other"]) == len(seen["one"]) == N_LAYERS


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    """As vLLM does to offload weights: the class's forward, which has the operator, would not run."""
    model, seen = a_model(), Seen()
    block = model.model.layers[1]
    block.forward = block.forward
    with pytest.raises(ModelError, match="Layer 1 has a forward of its own"):
        arm(vllm_layers(model, N_LAYERS), watching(seen))
    model(inputs())
    assert seen == []
