"""Reading, steering and capping on every architecture: blocks are found by structure, and what they do is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forwards import IDS, LAYERS, SLACK, WIDTH, an_axis, floors_between, generated, logits, outputs

from persona_axis.model.layers import decoder_layers, main_device, text_config
from persona_axis.model.loading import ChatModel
from persona_axis.steering.hooks import cap, steer
from persona_axis.steering.policy import Policy

Tiny = Callable[..., ChatModel]


@pytest.fixture
def chat(tiny: Tiny, any_arch: str) -> ChatModel:
    return tiny(any_arch)


def test_the_blocks_are_those_of_the_text_decoder(chat: ChatModel) -> None:
    assert decoder_layers(chat.model) is chat.blocks
    assert len(chat.blocks) == len(LAYERS)
    assert (chat.d_model, text_config(chat.model).hidden_size) == (WIDTH, WIDTH)
    assert main_device(chat.model) == torch.device("cpu")


@torch.inference_mode()
def test_block_outputs_are_the_models_hidden_states(chat: ChatModel) -> None:
    seen = outputs(chat)
    states = chat.model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == len(LAYERS) + 1  # embeddings first; the last comes after the final norm
    for layer in LAYERS[:-1]:
        assert torch.equal(seen[layer], states[layer + 1])
    assert not torch.allclose(seen[3], states[4], atol=1e-2)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_steer_shifts_the_projection_by_its_strength(chat: ChatModel, layer: int) -> None:
    axis, plain, before = an_axis(), outputs(chat), logits(chat)
    with steer(chat, axis, layer, 5.0):
        steered, inside = outputs(chat), logits(chat)
    moved = axis.project(steered[layer], layer) - axis.project(plain[layer], layer)
    torch.testing.assert_close(moved, torch.full_like(moved, 5.0), rtol=0, atol=SLACK)
    torch.testing.assert_close(steered[layer], plain[layer] + 5 * axis.unit(layer), rtol=1e-5, atol=1e-3)
    for other in LAYERS:
        assert torch.equal(steered[other], plain[other]) == (other < layer)
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(logits(chat), before)


def test_a_cap_holds_its_floors(chat: ChatModel) -> None:
    axis, before, plain = an_axis(), logits(chat), outputs(chat)
    floors = floors_between(chat, axis, (1, 2, 3))
    with cap(chat, Policy.cap(axis, floors)):
        capped, inside = outputs(chat), logits(chat)
    for layer, floor in floors.items():
        assert (axis.project(capped[layer], layer) >= floor - SLACK).all()
        assert (axis.project(plain[layer], layer) < floor - 5 * SLACK).any()
    below = axis.project(plain[1], 1) < floors[1]
    assert 0 < below.sum() < below.numel()
    assert torch.equal(capped[1][~below], plain[1][~below])
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(logits(chat), before)


def test_generation_is_steered_at_every_token(chat: ChatModel) -> None:
    plain = generated(chat, IDS[:1], 6)
    with steer(chat, an_axis(), strength=-40.0):
        steered = generated(chat, IDS[:1], 6)[0]
        ids = IDS[:1]
        for _ in range(6):
            ids = torch.cat([ids, logits(chat, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert steered == ids[0, 15:].tolist() != plain[0]
    assert generated(chat, IDS[:1], 6) == plain


def test_a_picture_beside_the_text(tiny: Tiny) -> None:
    """The vision tower has as many blocks; only the text decoder's are steered."""
    chat = tiny("gemma3_vision")
    ids = torch.tensor([[5, 6, 278, 279, 277, 7, 8]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return chat.model(input_ids=ids, pixel_values=pixels, use_cache=False).logits.clone()

    before = run()
    with steer(chat, an_axis(), strength=5.0):
        assert not torch.allclose(run(), before, atol=1e-2)
    assert torch.equal(run(), before)
