"""Steering a model: inside the block always, outside never, and an error where it could not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_axis.errors import ModelError, UsageError
from persona_axis.geometry.axis import Axis, project
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Request, Sampling
from persona_axis.model.layers import tapped
from persona_axis.model.loading import ChatModel
from persona_axis.steering import interventions
from persona_axis.steering.hooks import cap, held, steer
from persona_axis.steering.policy import Policy

IDS = torch.arange(3, 33).reshape(2, 15)
WIDTH = 32
LAYERS = (0, 1, 2, 3)
SLACK = 2e-3  # rounding of float32 residuals of the tiny models, whose projections are in the tens

Tiny = Callable[..., ChatModel]


@pytest.fixture(params=["llama", "gpt2"])
def chat(request: pytest.FixtureRequest, tiny: Tiny) -> ChatModel:
    return tiny(request.param)


@pytest.fixture
def axis() -> Axis:
    vectors = 3 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    return Axis(vectors, LAYERS, 2)


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    inner = model.model if isinstance(model, ChatModel) else model
    return inner(input_ids=ids, use_cache=False).logits.clone()


@contextmanager
def captured(chat: ChatModel, layers: Sequence[int] = LAYERS) -> Iterator[dict[int, Tensor]]:
    """Block outputs of the latest forward."""
    seen: dict[int, Tensor] = {}

    def keep(i: int, hidden: Tensor) -> None:
        seen[layers[i]] = hidden.clone()

    with tapped([chat.blocks[layer] for layer in layers], keep):
        yield seen


def outputs(chat: ChatModel, ids: Tensor = IDS) -> dict[int, Tensor]:
    """Block outputs as something entered inside of whatever is entered now sees them."""
    with captured(chat) as seen:
        logits(chat, ids)
    return seen


def floors_between(chat: ChatModel, axis: Axis, layers: Sequence[int]) -> dict[int, float]:
    """Floors that half of the tokens of a plain forward lie below, and no token near."""
    plain = outputs(chat)
    floors = {}
    for layer in layers:
        p = axis.project(plain[layer], layer).flatten().sort().values
        middle = len(p) // 2
        floors[layer] = float(p[middle - 1 : middle + 1].mean())
    return floors


def n_hooks(chat: ChatModel) -> int:
    """Ours: Transformers leaves hooks of its own on a model once asked for ``output_hidden_states``."""
    hooks = [hook for block in chat.blocks for hook in block._forward_hooks.values()]
    return sum(hook.__module__ == "persona_axis.model.layers" for hook in hooks)


# ---- inside and after -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [4.0, -4.0])
def test_logits_change_inside_and_are_bitwise_back_after(chat: ChatModel, axis: Axis, strength: float) -> None:
    before = logits(chat)
    with steer(chat, axis, strength=strength):
        assert not torch.allclose(logits(chat), before, atol=1e-2)
    assert torch.equal(logits(chat), before)
    assert n_hooks(chat) == 0


def test_no_strength_changes_no_bit(chat: ChatModel, axis: Axis) -> None:
    before = logits(chat)
    with steer(chat, axis), steer(chat, axis, 0, 0.0):
        assert n_hooks(chat) == 2
        assert torch.equal(logits(chat), before)


def test_a_floor_that_is_never_crossed_changes_no_bit(chat: ChatModel, axis: Axis) -> None:
    before = logits(chat)
    plain = outputs(chat)
    lowest = {layer: float(axis.project(plain[layer], layer).min()) - 1 for layer in LAYERS}
    with cap(chat, Policy.cap(axis, lowest)):
        assert torch.equal(logits(chat), before)
    with cap(chat, Policy.cap(axis, {**lowest, 1: lowest[1] + 2})):
        assert not torch.equal(logits(chat), before)


def test_half_precision_logits_without_a_crossed_floor_are_bitwise_the_same(tiny: Tiny, axis: Axis) -> None:
    chat = tiny("llama", dtype="bfloat16")
    before = logits(chat)
    with cap(chat, Policy.cap(axis, dict.fromkeys(LAYERS, -1e4))):
        assert torch.equal(logits(chat), before)


def test_a_transformers_model_is_steered_like_its_chat_model(chat: ChatModel, axis: Axis) -> None:
    with steer(chat, axis, strength=3.0):
        wrapped = logits(chat)
    with steer(chat.model, axis, strength=3.0):
        assert torch.equal(logits(chat), wrapped)
    with held(chat.model, Policy((interventions.add(2, axis.at(2), 3.0),))):
        assert torch.equal(logits(chat), wrapped)


def test_an_exception_leaves_the_model_plain(chat: ChatModel, axis: Axis) -> None:
    before = logits(chat)

    def fail_inside() -> None:
        with steer(chat, axis, strength=3.0), cap(chat, Policy.cap(axis, {1: 0.0, 3: 0.0})):
            assert n_hooks(chat) == 3
            raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        fail_inside()
    assert n_hooks(chat) == 0
    assert torch.equal(logits(chat), before)


def test_all_hooks_or_none(tiny: Tiny, axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny("llama")
    before = logits(chat)

    def refuse(*args: Any, **kwargs: Any) -> None:
        assert n_hooks(chat) == 2  # those of the layers before
        raise RuntimeError("no hook today")

    monkeypatch.setattr(chat.blocks[3], "register_forward_hook", refuse)
    policy = Policy.cap(axis, {0: 1e3, 1: 1e3, 3: 1e3})
    with pytest.raises(RuntimeError, match="no hook today"), cap(chat, policy):
        pytest.fail("entered with half of its hooks")
    assert n_hooks(chat) == 0
    assert torch.equal(logits(chat), before)


# ---- what the stream looks like ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, 0, 3])
def test_a_capture_inside_sees_the_steered_stream(chat: ChatModel, axis: Axis, layer: int | None) -> None:
    where = 2 if layer is None else layer
    plain = outputs(chat)
    with steer(chat, axis, layer, 5.0):
        steered = outputs(chat)
    torch.testing.assert_close(steered[where], plain[where] + 5 * axis.unit(where), rtol=1e-5, atol=1e-4)
    for other in LAYERS:
        if other < where:
            assert torch.equal(steered[other], plain[other])
        else:
            assert not torch.allclose(steered[other], plain[other], atol=1e-2)


def test_a_capture_outside_sees_a_layer_before_its_own_intervention(chat: ChatModel, axis: Axis) -> None:
    plain = outputs(chat)
    with captured(chat) as outer, steer(chat, axis, 1, 5.0):
        inner = outputs(chat)
    assert torch.equal(outer[1], plain[1])
    torch.testing.assert_close(inner[1], plain[1] + 5 * axis.unit(1), rtol=1e-5, atol=1e-4)
    assert torch.equal(outer[2], inner[2])
    assert not torch.allclose(outer[2], plain[2], atol=1e-2)


def test_positive_strength_is_toward_the_assistant(chat: ChatModel, axis: Axis) -> None:
    plain = axis.project(outputs(chat)[2])
    for strength in (6.0, -6.0):
        with steer(chat, axis, strength=strength):
            moved = axis.project(outputs(chat)[2])
        torch.testing.assert_close(moved, plain + strength, rtol=1e-4, atol=SLACK)


def test_capped_layers_are_at_their_floors_or_above(chat: ChatModel, axis: Axis) -> None:
    floors = floors_between(chat, axis, (1, 2, 3))
    with cap(chat, Policy.cap(axis, floors)):
        held_at = outputs(chat)
    plain = outputs(chat)
    for layer, floor in floors.items():
        p = axis.project(held_at[layer], layer)
        assert (p >= floor - SLACK).all()
        assert (p > floor + 10 * SLACK).any()  # not all were pushed onto the floor
        assert (axis.project(plain[layer], layer) < floor - 10 * SLACK).any()
    # The first capped layer: lifted where below, and the bits of the others untouched.
    below = axis.project(plain[1], 1) < floors[1]
    assert 0 < below.sum() < below.numel()
    assert torch.equal(held_at[1][~below], plain[1][~below])
    torch.testing.assert_close(axis.project(held_at[1], 1)[below], torch.full((int(below.sum()),), floors[1]))
    assert torch.equal(held_at[0], plain[0])


def test_a_half_precision_model_is_capped_to_its_rounding(tiny: Tiny, axis: Axis) -> None:
    chat = tiny("llama", dtype="bfloat16")
    floors = floors_between(chat, axis, (1, 3))
    with cap(chat, Policy.cap(axis, floors)):
        held_at = outputs(chat)
    for layer, floor in floors.items():
        assert held_at[layer].dtype == torch.bfloat16
        slack = 2.0**-8 * held_at[layer].float().norm(dim=-1)
        assert (axis.project(held_at[layer], layer) >= floor - slack).all()
        assert (axis.project(outputs(chat)[layer], layer) < floor - slack).any()


def test_several_directions_are_ablated_at_once(chat: ChatModel) -> None:
    directions = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    before = outputs(chat)[1] @ directions.T
    with held(chat, Policy((interventions.ablate(1, directions),))):
        after = outputs(chat)[1] @ directions.T
    assert before.abs().max() > 1
    assert after.abs().max() < SLACK


# ---- nesting ----------------------------------------------------------------------------------------------------


def test_strengths_add_up(chat: ChatModel, axis: Axis) -> None:
    with steer(chat, axis, strength=5.0):
        once = logits(chat)
    with steer(chat, axis, strength=2.0):
        outer_alone = logits(chat)
        with steer(chat, axis, strength=3.0):
            torch.testing.assert_close(logits(chat), once, rtol=1e-3, atol=1e-3)
        assert torch.equal(logits(chat), outer_alone)  # leaving the inner one leaves the outer one
    assert not torch.allclose(outer_alone, once, atol=1e-2)


def test_the_inner_context_sees_what_the_outer_one_did(chat: ChatModel, axis: Axis) -> None:
    plain = axis.project(outputs(chat)[2])
    floor, push = float(plain.median()), -4.0
    policy = Policy.cap(axis, {2: floor})
    with steer(chat, axis, strength=push), cap(chat, policy):
        capped_last = axis.project(outputs(chat)[2])
    with cap(chat, policy), steer(chat, axis, strength=push):
        pushed_last = axis.project(outputs(chat)[2])
    torch.testing.assert_close(capped_last, (plain + push).clamp(min=floor), rtol=1e-4, atol=SLACK)
    torch.testing.assert_close(pushed_last, plain.clamp(min=floor) + push, rtol=1e-4, atol=SLACK)


# ---- every forward, whatever calls it ---------------------------------------------------------------------------


def greedy_by_whole_forwards(chat: ChatModel, prompt: Tensor, n: int) -> list[int]:
    ids = prompt
    for _ in range(n):
        ids = torch.cat([ids, logits(chat, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
def generated(chat: ChatModel, prompt: Tensor, n: int) -> list[int]:
    out = chat.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


def test_generation_with_a_cache_is_steered_at_every_token(chat: ChatModel, axis: Axis) -> None:
    prompt = IDS[:1]
    plain = generated(chat, prompt, 10)
    with steer(chat, axis, strength=8.0):
        steered = generated(chat, prompt, 10)
        assert steered == greedy_by_whole_forwards(chat, prompt, 10)
    assert steered != plain
    assert generated(chat, prompt, 10) == plain


def test_replies_are_steered(chat: ChatModel, axis: Axis) -> None:
    plain = chat.reply("What is rain?", max_tokens=12)
    with steer(chat, axis, strength=-30.0):
        assert chat.reply("What is rain?", max_tokens=12) != plain
    assert chat.reply("What is rain?", max_tokens=12) == plain


def test_the_decoding_loop_is_steered_and_captures_the_held_stream(tiny: Tiny, axis: Axis) -> None:
    chat = tiny("llama", stop=False)
    prompts = [chat.template.prompt_ids(chat.template.messages("", q)) for q in ("Hi", "What is rain?")]
    requests = [Request(str(i), tuple(p)) for i, p in enumerate(prompts)]
    sampling = Sampling(max_tokens=8, temperature=0)

    def run() -> dict[str, Any]:
        return {r.key: r for r in DecodingLoop(chat, LAYERS, 1 << 12).generate(requests, sampling)}

    plain = run()
    floors = {layer: float(project(plain["0"].activation[layer], axis.at(layer))) + 5 for layer in (1, 3)}
    with cap(chat, Policy.cap(axis, floors)):
        capped = run()
        for request in requests:
            ids = torch.tensor([request.prompt_ids])
            assert capped[request.key].token_ids.tolist() == generated(chat, ids, 8)
    assert any(capped[key].token_ids.tolist() != plain[key].token_ids.tolist() for key in capped)
    for reply in capped.values():
        for layer, floor in floors.items():
            # The mean of tokens at the floor or above.
            assert float(project(reply.activation[layer], axis.at(layer))) >= floor - SLACK
    again = run()
    for key in plain:
        assert torch.equal(again[key].activation, plain[key].activation)


# ---- never quietly unsteered ------------------------------------------------------------------------------------


def compile_wrapper(chat: ChatModel) -> Any:
    return replace(chat, model=torch.compile(chat.model))


def compile_in_place(chat: ChatModel) -> Any:
    chat.model.compile()
    return chat


def compile_block_in_place(chat: ChatModel) -> Any:
    chat.blocks[1].compile()
    return chat


def compile_block_wrapper(chat: ChatModel) -> Any:
    chat.blocks[1] = torch.compile(chat.blocks[1])
    return chat


@pytest.mark.parametrize(
    "compiled",
    [compile_wrapper, compile_in_place, compile_block_in_place, compile_block_wrapper],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("bare", [False, True])
def test_a_compiled_model_is_refused(tiny: Tiny, axis: Axis, compiled: Callable[..., Any], bare: bool) -> None:
    """Nothing is run here, so nothing is compiled."""
    chat = compiled(tiny("llama", fresh=True))
    model = chat.model if bare else chat
    with pytest.raises(ModelError, match=r"compiled with torch\.compile.*unsteered"), steer(model, axis, strength=1.0):
        pytest.fail("entered")
    assert n_hooks(chat) == 0


def test_the_compiled_part_is_named(tiny: Tiny, axis: Axis) -> None:
    chat = compile_block_in_place(tiny("llama", fresh=True))
    with pytest.raises(ModelError, match=r"model\.layers\.1 is compiled"), steer(chat, axis, strength=1.0):
        pytest.fail("entered")


@pytest.mark.parametrize("layer", [4, 17, -1])
def test_a_layer_the_model_lacks_is_refused(chat: ChatModel, layer: int) -> None:
    axis = Axis(torch.ones(1, WIDTH), (layer,), layer)
    with pytest.raises(UsageError, match=f"names layer {layer}; the model has 0 to 3"), steer(chat, axis, strength=1.0):
        pytest.fail("entered")
    with pytest.raises(UsageError, match=f"names layer {layer}"), cap(chat, Policy.cap(axis, {layer: 0.0})):
        pytest.fail("entered")
    assert n_hooks(chat) == 0


def test_a_layer_the_axis_lacks_is_refused(chat: ChatModel) -> None:
    axis = Axis(torch.ones(2, WIDTH), (1, 2), 2)
    with pytest.raises(UsageError, match="no layer 3; it has 1, 2"), steer(chat, axis, 3, 1.0):
        pytest.fail("entered")


@pytest.mark.parametrize("width", [WIDTH - 1, 2 * WIDTH, 1])
def test_another_width_is_refused(chat: ChatModel, width: int) -> None:
    axis = Axis(torch.ones(1, width), (1,), 1)
    message = f"width {width}, the model's residual {WIDTH}"
    with pytest.raises(UsageError, match=message), steer(chat, axis, strength=1.0):
        pytest.fail("entered")


def test_a_block_that_returns_something_else_is_an_error(
    tiny: Tiny, axis: Axis, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = tiny("llama")
    plain = chat.blocks[2].forward
    monkeypatch.setattr(chat.blocks[2], "forward", lambda *args, **kwargs: {"hidden": plain(*args, **kwargs)})
    with steer(chat, axis, strength=1.0), pytest.raises(ModelError, match=r"returned dict where \[batch, tokens"):
        logits(chat)


@pytest.mark.parametrize("extra", [(), ("attention",)])
def test_a_block_may_return_a_tuple(tiny: Tiny, axis: Axis, extra: tuple[str, ...]) -> None:
    """What stands beside the residual is passed on."""

    class Block(torch.nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Any, ...]:
            return (hidden, *extra)

    chat = replace(tiny("llama"), blocks=torch.nn.ModuleList([Block() for _ in LAYERS]))
    hidden = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    with steer(chat, axis, 1, 2.0):
        output = chat.blocks[1](hidden)
    torch.testing.assert_close(output[0], hidden + 2 * axis.unit(1))
    assert output[1:] == extra
