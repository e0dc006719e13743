"""Steering a model: inside the block always, outside never, and an error where it could not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from forwards import (
    IDS,
    LAYERS,
    SLACK,
    WIDTH,
    an_axis,
    captured,
    floors_between,
    generated,
    logits,
    n_hooks,
    outputs,
)
from torch import Tensor

from persona_axis.errors import ModelError, NonFiniteError, UsageError
from persona_axis.geometry.axis import Axis, project
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Request, Sampling
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import Passage, read_passages
from persona_axis.steering import interventions, op
from persona_axis.steering.hooks import _kernel_agrees, cap, held, steer
from persona_axis.steering.policy import Policy

Tiny = Callable[..., ChatModel]


@pytest.fixture(params=["llama", "gpt2"])
def chat(request: pytest.FixtureRequest, tiny: Tiny) -> ChatModel:
    return tiny(request.param)


@pytest.fixture
def axis() -> Axis:
    return an_axis()


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


def test_generation_with_a_cache_is_steered_at_every_token(chat: ChatModel, axis: Axis) -> None:
    prompt = IDS[:1]
    plain = generated(chat, prompt, 10)[0]
    with steer(chat, axis, strength=8.0):
        steered = generated(chat, prompt, 10)[0]
        assert steered == greedy_by_whole_forwards(chat, prompt, 10)
    assert steered != plain
    assert generated(chat, prompt, 10)[0] == plain


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
            assert capped[request.key].token_ids.tolist() == generated(chat, ids, 8)[0]
    assert any(capped[key].token_ids.tolist() != plain[key].token_ids.tolist() for key in capped)
    for reply in capped.values():
        for layer, floor in floors.items():
            # The mean of tokens at the floor or above.
            assert float(project(reply.activation[layer], axis.at(layer))) >= floor - SLACK
    again = run()
    for key in plain:
        assert torch.equal(again[key].activation, plain[key].activation)


# ---- never quietly unsteered ------------------------------------------------------------------------------------


def test_a_forward_that_goes_past_a_block_is_an_error(tiny: Tiny, axis: Axis) -> None:
    """As one that leaves the model early does, or the replay of a CUDA graph."""
    chat = tiny("llama", fresh=True)
    plain = outputs(chat)
    with cap(chat, Policy.cap(axis, {1: 1e3, 2: 1e3})):
        hooked, chat.blocks[2] = chat.blocks[2], tiny("llama").blocks[2]
        for run in (logits, outputs):
            with pytest.raises(ModelError, match=r"LlamaModel went past the decoder blocks of layers \[2\]"):
                run(chat)
        chat.blocks[2] = hooked
        logits(chat)
    chat.model.forward = lambda **kwargs: "replayed"
    with steer(chat, axis, strength=1.0), pytest.raises(ModelError, match=r"LlamaForCausalLM went past.*\[2\]"):
        chat.model(input_ids=IDS)
    del chat.model.forward
    assert torch.equal(outputs(chat)[3], plain[3])


def test_a_forward_that_failed_does_not_count_for_the_next(tiny: Tiny, axis: Axis) -> None:
    chat = tiny("llama", fresh=True)
    with steer(chat, axis, 3, 1.0):
        own, chat.blocks[1].forward = chat.blocks[1].forward, lambda *args, **kwargs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            logits(chat)
        chat.blocks[1].forward = own
        steered = logits(chat)
    assert not torch.allclose(steered, logits(chat), atol=1e-2)


@pytest.mark.parametrize("unit", ["norms", "", None])
def test_an_unknown_unit_is_refused(chat: ChatModel, axis: Axis, unit: Any) -> None:
    with pytest.raises(UsageError, match="choose from raw, norm"), steer(chat, axis, strength=1.0, unit=unit):
        pytest.fail("entered")


def test_a_strength_in_norms_is_so_many_residual_norms(chat: ChatModel, axis: Axis) -> None:
    known = replace(axis, metadata={"residual_norms": [1.0, 2.0, 5.0, 7.0]})
    with steer(chat, known, 2, -0.5, unit="norm"):
        in_norms = logits(chat)
    with steer(chat, axis, 2, -2.5):
        assert torch.equal(logits(chat), in_norms)


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


class Moves(torch.nn.Module):
    """Puts its input on a device, as the blocks of a model that is spread over several do."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.device)


def test_directions_follow_each_block_to_its_device(tiny: Tiny, axis: Axis) -> None:
    blocks = torch.nn.ModuleList(Moves(device) for device in ("cpu", "meta", "cpu", "cpu"))
    chat = replace(tiny("llama"), blocks=blocks)
    hidden = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    with cap(chat, Policy.cap(axis, dict.fromkeys(LAYERS, 5.0))):
        assert blocks[1](hidden).device.type == "meta"
        for layer in (0, 2):
            lifted = blocks[layer](hidden)
            assert (axis.project(lifted, layer) >= 5 - 1e-4).all()
        blocks[0].device = "meta"  # a block that moves later on
        assert blocks[0](hidden).device.type == "meta"
        blocks[0].device = "cpu"
        assert torch.equal(blocks[0](hidden).isfinite(), torch.ones(1, 3, WIDTH, dtype=torch.bool))


def test_a_first_forward_without_gradients_leaves_later_ones_theirs(tiny: Tiny, axis: Axis) -> None:
    chat = tiny("llama")
    with steer(chat, axis, strength=1.0):
        logits(chat)
        embeddings = chat.model.get_input_embeddings()(IDS).clone().requires_grad_()
        chat.model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_a_policy_can_be_entered_again_and_in_itself(chat: ChatModel, axis: Axis) -> None:
    before, policy = logits(chat), Policy((interventions.add(2, axis.at(2), 2.0),))
    with held(chat, policy):
        once = logits(chat)
        with held(chat, policy):
            twice = logits(chat)
    with steer(chat, axis, 2, 4.0):
        torch.testing.assert_close(logits(chat), twice, rtol=1e-3, atol=1e-3)
    with held(chat, policy):
        assert torch.equal(logits(chat), once)
    assert torch.equal(logits(chat), before)


def test_nan_is_not_hidden(tiny: Tiny, axis: Axis) -> None:
    """Neither a cap above it nor one below turns NaN into a number."""
    chat = tiny("llama", fresh=True)
    chat.blocks[1].mlp.down_proj.weight[0, 0] = float("nan")
    passage = Passage("p", tuple(IDS[0].tolist()), ((0, 15),))
    for floor in (-1e4, 1e4):
        policy = Policy.cap(axis, dict.fromkeys(LAYERS, floor))
        with cap(chat, policy), pytest.raises(NonFiniteError, match="first at layer 1"):
            list(read_passages(chat, [passage]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_operator_is_asked_before_it_is_relied_on(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _kernel_agrees.__wrapped__(torch.device("cpu"), dtype)
    monkeypatch.setattr(op, "intervened", lambda hidden, *policy: hidden)  # a kernel that does nothing
    with pytest.warns(UserWarning, match="fused kernel is wrong on cpu"):
        assert not _kernel_agrees.__wrapped__(torch.device("cpu"), dtype)
