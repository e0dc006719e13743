"""Models compiled with ``torch.compile``: steered inside the block, compiled and plain outside, by what they do.

Compiling the whole tiny model takes seconds, a block of it a few tenths: most tests share one compiled model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from forwards import IDS, LAYERS, an_axis, generated, logits, outputs
from torch import Tensor

from persona_axis.errors import ModelError
from persona_axis.geometry.axis import Axis
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Request, Sampling
from persona_axis.model.loading import ChatModel
from persona_axis.steering import interventions
from persona_axis.steering.hooks import cap, held, steer
from persona_axis.steering.policy import Policy, Positions

Tiny = Callable[..., ChatModel]
Call = Callable[[], Tensor]
STRENGTH = 6.0


class Backend:
    """Runs the graphs that Dynamo made as they are, and counts; ``ran`` shows that code was compiled at all."""

    def __init__(self) -> None:
        self.ran = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run

    def __deepcopy__(self, memo: Any) -> Backend:
        return self


@pytest.fixture(scope="module", autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend()


@pytest.fixture
def axis() -> Axis:
    return an_axis()


@pytest.fixture
def plain(tiny: Tiny) -> ChatModel:
    """The weights of all models here, never compiled."""
    return tiny("llama")


@pytest.fixture
def chat(tiny: Tiny) -> ChatModel:
    """One to compile."""
    return tiny("llama", fresh=True)


@pytest.fixture(scope="module")
def whole(tiny: Tiny, backend: Backend) -> tuple[ChatModel, Call]:
    """One that is compiled, and its logits by way of ``torch.compile``'s wrapper."""
    chat = tiny("llama", fresh=True)
    return chat, wrapped(chat, fullgraph=True, backend=backend)


# ---- the ways to compile ----------------------------------------------------------------------------------------


def wrapped(chat: ChatModel, **options: Any) -> Call:
    compiled = torch.compile(chat.model, **options)
    return lambda: logits(compiled)


def in_place(chat: ChatModel, **options: Any) -> Call:
    chat.model.compile(**options)
    return lambda: logits(chat)


def decoder_wrapped(chat: ChatModel, **options: Any) -> Call:
    chat.model.model = torch.compile(chat.model.model, **options)
    return lambda: logits(chat)


def block_in_place(chat: ChatModel, **options: Any) -> Call:
    chat.blocks[2].compile(**options)
    return lambda: logits(chat)


def block_wrapped(chat: ChatModel, **options: Any) -> Call:
    chat.blocks[2] = torch.compile(chat.blocks[2], **options)
    return lambda: logits(chat)


def every_block(chat: ChatModel, **options: Any) -> Call:
    for block in chat.blocks:
        block.compile(**options)
    return lambda: logits(chat)


def part_of_a_block(chat: ChatModel, **options: Any) -> Call:
    chat.blocks[2].mlp = torch.compile(chat.blocks[2].mlp, **options)
    return lambda: logits(chat)


def users_function(chat: ChatModel, **options: Any) -> Call:
    def twice(ids: Tensor) -> Tensor:
        return 2 * chat.model(input_ids=ids, use_cache=False).logits

    compiled = torch.compile(twice, **options)

    @torch.inference_mode()
    def call() -> Tensor:
        return compiled(IDS).clone() / 2

    return call


WAYS = (wrapped, in_place, decoder_wrapped, block_in_place, block_wrapped, every_block, part_of_a_block, users_function)


def check(call: Call, chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend | None = None) -> None:
    """What a compiled model says before, inside and after a block, against a plain model of the same weights."""
    expected = logits(plain)
    with steer(plain, axis, strength=STRENGTH):
        steered = logits(plain)
    assert not torch.allclose(expected, steered, atol=1e-1)
    before = call()
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-4)
    with steer(chat, axis, strength=STRENGTH):
        ran = backend.ran if backend else 0
        torch.testing.assert_close(call(), steered, rtol=1e-4, atol=1e-4)
        assert backend is None or backend.ran == ran  # uncompiled
    assert torch.equal(call(), before)
    assert backend is None or backend.ran > ran


# ---- entered after compiling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_entered_after_compiling(chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend, way: Any) -> None:
    check(way(chat, fullgraph=True, backend=backend), chat, plain, axis, backend)


def test_with_autograd_graphs(chat: ChatModel, plain: ChatModel, axis: Axis) -> None:
    check(every_block(chat, fullgraph=True, backend="aot_eager"), chat, plain, axis)


def test_with_graph_breaks(chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend) -> None:
    inner = chat.blocks[2].mlp.forward

    def forward(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    chat.blocks[2].mlp.forward = forward
    check(block_in_place(chat, backend=backend), chat, plain, axis, backend)


def test_without_any_guard(chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend) -> None:
    """As servers compile: nothing is checked before compiled code runs again."""
    unchecked = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    check(block_in_place(chat, fullgraph=True, backend=backend, options=unchecked), chat, plain, axis)


def test_a_chat_model_around_a_compiled_one(
    whole: tuple[ChatModel, Call], plain: ChatModel, axis: Axis, backend: Backend
) -> None:
    compiled = torch.compile(whole[0].model, fullgraph=True, backend=backend)
    around = replace(whole[0], model=compiled)
    check(lambda: logits(around), around, plain, axis, backend)
    said = around.reply("What is rain?", max_tokens=8)
    with steer(around, axis, strength=-30.0), steer(plain, axis, strength=-30.0):
        assert around.reply("What is rain?", max_tokens=8) == plain.reply("What is rain?", max_tokens=8) != said
    assert around.reply("What is rain?", max_tokens=8) == said


def test_generate_that_compiles_for_its_static_cache(
    chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend
) -> None:
    from transformers import CompileConfig

    as_on_gpus = CompileConfig(backend=backend, fullgraph=True, mode=None)
    as_on_gpus._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": as_on_gpus}
    expected, ran = generated(plain, IDS[:1], 5), backend.ran
    assert generated(chat, IDS[:1], 5, **options) == expected
    assert backend.ran > ran
    with steer(chat, axis, strength=-30.0), steer(plain, axis, strength=-30.0):
        ran = backend.ran
        assert generated(chat, IDS[:1], 5, **options) == generated(plain, IDS[:1], 5) != expected
        assert backend.ran == ran
    assert generated(chat, IDS[:1], 5, **options) == expected


@pytest.mark.parametrize("positions", ["all", "decode"])
def test_the_compiled_text_decoder_of_a_wrapper(tiny: Tiny, axis: Axis, positions: Positions) -> None:
    """Nothing is run outside of the block, so nothing is compiled."""
    chat, plain = tiny("gemma3_vision", fresh=True), tiny("gemma3_vision")
    chat.model.model.language_model = torch.compile(chat.model.model.language_model, fullgraph=True, backend="eager")
    policy = Policy((interventions.add(2, axis.at(2), -40.0),), positions=positions)
    with held(chat.model, policy), held(plain, policy):
        said = generated(chat, IDS[:1], 5)
        assert said == generated(plain, IDS[:1], 5)
    assert said != generated(plain, IDS[:1], 5)


# ---- compiled at other times ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [wrapped, block_in_place], ids=lambda way: way.__name__)
def test_compiled_and_run_inside_the_block(
    chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend, way: Any
) -> None:
    """Nothing of the block stays in what is compiled after it."""
    torch._dynamo.reset()
    with steer(chat, axis, strength=STRENGTH):
        ran = backend.ran
        call = way(chat, fullgraph=True, backend=backend)
        inside = call()
        assert not torch.allclose(inside, logits(plain), atol=1e-1)
        assert backend.ran == ran
    check(call, chat, plain, axis, backend)
    with steer(chat, axis, strength=STRENGTH):
        assert torch.equal(call(), inside)


def test_left_and_entered_again(whole: tuple[ChatModel, Call], plain: ChatModel, axis: Axis, backend: Backend) -> None:
    chat, call = whole
    for _ in range(3):
        check(call, chat, plain, axis, backend)


def test_a_second_instance_of_a_compiled_class(
    chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend, tiny: Tiny
) -> None:
    """Compiled code belongs to the class: a second model runs what was compiled for the first."""
    check(block_in_place(chat, fullgraph=True, backend=backend), chat, plain, axis, backend)
    second = tiny("llama", fresh=True)
    call = block_in_place(second, fullgraph=True, backend=backend)
    before = call()
    with steer(chat, axis, strength=STRENGTH):
        torch.testing.assert_close(call(), before)  # the other one is not steered
        assert not torch.allclose(logits(chat), before, atol=1e-1)
    check(call, second, plain, axis, backend)


def test_nested(whole: tuple[ChatModel, Call], plain: ChatModel, axis: Axis) -> None:
    chat, call = whole
    before = call()
    with steer(chat, axis, strength=2.0), steer(plain, axis, strength=2.0):
        outer = call()
        with steer(chat, axis, 1, strength=-4.0), steer(plain, axis, 1, strength=-4.0):
            torch.testing.assert_close(call(), logits(plain))
        assert torch.equal(call(), outer)
        torch.testing.assert_close(outer, logits(plain))
    assert torch.equal(call(), before)


def test_an_exception_inside(whole: tuple[ChatModel, Call], plain: ChatModel, axis: Axis, backend: Backend) -> None:
    chat, call = whole

    def fail_inside() -> None:
        with steer(chat, axis, strength=STRENGTH):
            raise KeyError("user")

    with pytest.raises(KeyError):
        fail_inside()
    check(call, chat, plain, axis, backend)


def test_a_policy_that_could_not_be_entered(
    whole: tuple[ChatModel, Call], plain: ChatModel, axis: Axis, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, call = whole
    with monkeypatch.context() as patched:
        patched.setattr(chat.blocks[3], "register_forward_hook", None)
        with pytest.raises(TypeError), cap(chat, Policy.cap(axis, {1: 0.0, 3: 0.0})):
            pytest.fail("entered")
    check(call, chat, plain, axis, backend)


@pytest.mark.parametrize("left_first", ["here", "there"])
def test_blocks_of_two_threads_that_overlap(
    whole: tuple[ChatModel, Call], plain: ChatModel, axis: Axis, backend: Backend, left_first: str
) -> None:
    """Code stays uncompiled until the last block is left, whichever it is."""
    chat, call = whole
    before = call()
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def hold_there() -> None:
        with steer(chat, axis, 1, strength=-STRENGTH):
            entered.set()
            leave.wait(10)
        left.set()

    def expect(**strengths: float) -> None:
        with ExitStack() as stack:
            for layer, strength in strengths.items():
                stack.enter_context(steer(plain, axis, int(layer[1:]), strength))
            expected = logits(plain)
        ran = backend.ran
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
        assert backend.ran == ran

    thread = threading.Thread(target=hold_there)
    with steer(chat, axis, strength=STRENGTH):
        thread.start()
        assert entered.wait(10)
        expect(l1=-STRENGTH, l2=STRENGTH)
        if left_first == "there":
            leave.set()
            assert left.wait(10)
            expect(l2=STRENGTH)
    if left_first == "here":
        expect(l1=-STRENGTH)
        leave.set()
        assert left.wait(10)
    thread.join()
    assert torch.equal(call(), before)
    check(call, chat, plain, axis, backend)


# ---- the user's own stance --------------------------------------------------------------------------------------


def test_the_users_stance_comes_back(whole: tuple[ChatModel, Call], axis: Axis) -> None:
    chat, call = whole
    before = call()
    compiled = torch.compile(chat.model, fullgraph=True, backend="eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        with steer(chat, axis, strength=STRENGTH), steer(chat, axis, strength=STRENGTH):
            assert not torch.allclose(call(), before, atol=1e-1)
            logits(compiled)
        assert torch.equal(call(), before)
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            logits(compiled)
    assert torch.equal(call(), before)


def test_a_stance_changed_inside_lasts_until_the_next_block(chat: ChatModel, axis: Axis, backend: Backend) -> None:
    before = every_block(chat, fullgraph=True, backend=backend)()
    with steer(chat, axis, strength=STRENGTH):
        steered, ran = logits(chat), backend.ran
        torch.compiler.set_stance("default")
        with steer(chat, axis, 1, strength=0.0):
            assert torch.equal(logits(chat), steered)
        assert torch.equal(logits(chat), steered)
        assert backend.ran == ran
    assert torch.equal(logits(chat), before)
    assert backend.ran > ran


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_entering_in_compiled_code_is_refused(chat: ChatModel, axis: Axis, tiny: Tiny, elsewhere: bool) -> None:
    """Also when a block is entered already, which leaves code running that began before."""
    policy = Policy.cap(axis, {2: 1e3})
    other = tiny("gpt2")

    def outer(ids: Tensor) -> Tensor:
        if elsewhere:
            enter()
        with cap(chat, policy):
            return chat.model(input_ids=ids, use_cache=False).logits

    @torch._dynamo.disable
    def enter() -> None:
        entered.set()
        assert go_on.wait(10)

    entered, go_on, stop = threading.Event(), threading.Event(), threading.Event()

    def hold_the_other() -> None:
        entered.wait(10)
        with steer(other, axis, strength=1.0):
            go_on.set()
            stop.wait(10)

    thread = threading.Thread(target=hold_the_other)
    thread.start()
    if not elsewhere:
        entered.set()
        assert go_on.wait(10)
        stop.set()
        thread.join()
    with pytest.raises(ModelError, match="from inside a function that is compiled"):
        torch.compile(outer, backend="eager")(IDS)
    stop.set()
    thread.join()


# ---- reading a compiled model -----------------------------------------------------------------------------------


def test_captures_of_compiled_blocks_are_of_the_forward_under_way(
    chat: ChatModel, plain: ChatModel, backend: Backend
) -> None:
    """Code compiled while a capture was entered would keep it, and ignore the next one."""
    every_block(chat, fullgraph=True, backend=backend)
    for ids in (IDS, IDS + 40, IDS):
        expected = outputs(plain, ids)
        for layer, hidden in outputs(chat, ids).items():
            torch.testing.assert_close(hidden, expected[layer])
        logits(chat, ids)
    assert backend.ran > 0


def test_the_decoding_loop_captures_from_compiled_blocks(
    chat: ChatModel, plain: ChatModel, axis: Axis, backend: Backend
) -> None:
    every_block(chat, fullgraph=True, backend=backend)
    logits(chat)
    requests = [Request(str(n), tuple(range(5, 5 + n))) for n in (4, 9)]

    def run(of: ChatModel) -> dict[str, Any]:
        loop = DecodingLoop(of, LAYERS, 1 << 10)
        return {r.key: r for r in loop.generate(requests, Sampling(max_tokens=6, temperature=0))}

    for strength in (0.0, 8.0):
        with steer(chat, axis, strength=strength), steer(plain, axis, strength=strength):
            ours, theirs = run(chat), run(plain)
        for key, reply in theirs.items():
            assert ours[key].token_ids.tolist() == reply.token_ids.tolist()
            torch.testing.assert_close(ours[key].activation, reply.activation)
