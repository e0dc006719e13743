"""The loop is used where it proves itself, and nowhere else; the fallback then does the same by `generate`."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import (
    block_outputs,
    by_key,
    expected_activation,
    generate_greedily,
    relative_error,
    requests_for,
    scripted,
    state_of,
    tokens_of,
)

from persona_axis.errors import ModelError, NonFiniteError
from persona_axis.model import attention, cache, decode, selfcheck
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Sampling
from persona_axis.model.fallback import GenerateEngine
from persona_axis.model.loading import ChatModel
from persona_axis.model.selfcheck import choose_engine, loop_objection

GREEDY = Sampling(max_tokens=12, temperature=0)
SAMPLED = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=3)


def fallback(chat: ChatModel, layers: tuple[int, ...] | None = None) -> GenerateEngine:
    return GenerateEngine(chat, tuple(range(chat.n_layers)) if layers is None else layers)


class TestChosen:
    def test_architectures(self, tiny: Any, loop_arch: str) -> None:
        chat = tiny(loop_arch, fresh=True)
        before = state_of(chat)
        assert not chat.loop_proven
        choice = choose_engine(chat, None, 4096)
        assert choice.reason == ""
        assert isinstance(choice.engine, DecodingLoop)
        assert (choice.engine.name, choice.engine.layers) == ("loop", (0, 1, 2, 3))
        assert chat.loop_proven
        assert state_of(chat) == before

    def test_smollm(self, smollm: ChatModel, monkeypatch: Any) -> None:
        # A smaller check is enough here, and quicker.
        monkeypatch.setattr(selfcheck, "_QUESTIONS", selfcheck._QUESTIONS[:3])
        monkeypatch.setattr(selfcheck, "CHECK_TOKENS", 4)
        choice = choose_engine(smollm, (20, 10), 4096)
        assert (choice.engine.name, choice.reason, choice.engine.layers) == ("loop", "", (10, 20))

    def test_bfloat16_is_checked_on_a_float32_copy(self, tiny: Any, monkeypatch: Any) -> None:
        chat = tiny("llama", dtype="bfloat16", fresh=True)
        subjects = []
        inner = selfcheck._subject

        def noted(given: ChatModel) -> Any:
            subjects.append(inner(given)[0])
            return subjects[-1], 1e-3

        monkeypatch.setattr(selfcheck, "_subject", noted)
        choice = choose_engine(chat, None, 4096)
        assert choice.engine.name == "loop"
        [subject] = subjects
        assert subject.dtype == "float32"
        assert subject.blocks[0] is subject.model.model.layers[0]
        assert chat.dtype == "bfloat16"
        assert choice.engine.chat is chat  # type: ignore[attr-defined]

    def test_blocks_named_by_path_are_found_in_the_copy(self, tiny: Any) -> None:
        chat = tiny("llama", dtype="bfloat16", fresh=True)
        chat.model.model.towers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
        assert loop_objection(chat) == ""

    def test_the_models_own_generation_settings_play_no_part(self, tiny: Any) -> None:
        # `generate` would take them over, and a repetition penalty (Qwen2.5 has one) would look like a broken loop.
        chat = tiny("llama", fresh=True)
        plain = tokens_of(fallback(chat).generate(requests_for(chat), GREEDY))
        config = chat.model.generation_config
        config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens = 5.0, 1, 9
        assert loop_objection(chat) == ""
        assert tokens_of(fallback(chat).generate(requests_for(chat), GREEDY)) == plain
        assert chat.model.generation_config is config
        followed = {r.key: generate_greedily(chat, r, 12) for r in requests_for(chat)}
        assert followed != plain, "the settings do matter"

    def test_wrong_layers(self, tiny: Any) -> None:
        with pytest.raises(ModelError, match="layers 0 to 3"):
            choose_engine(tiny("llama"), (7,), 4096)


class TestRefused:
    def test_its_own_attention(self, tiny: Any) -> None:
        choice = choose_engine(tiny("falcon", fresh=True), (1, 2), 4096)
        assert (choice.engine.name, choice.engine.layers) == ("generate", (1, 2))
        assert "does not let its attention be chosen" in choice.reason

    def test_other_state(self, tiny: Any) -> None:
        choice = choose_engine(tiny("lfm2"), None, 4096)
        assert choice.engine.name == "generate"
        assert choice.reason == "its blocks keep state the loop does not manage (conv)"
        assert not tiny("lfm2").loop_proven

    def test_positions_ignored(self, tiny: Any) -> None:
        chat = tiny("llama", fresh=True)
        forward = chat.model.model.forward

        def without_positions(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        chat.model.model.forward = without_positions
        choice = choose_engine(chat, None, 4096)
        assert choice.engine.name == "generate"
        assert "differ from generate's" in choice.reason or "does not accept" in choice.reason
        plain = tiny("llama")
        requests = requests_for(plain)
        assert tokens_of(choice.engine.generate(requests, GREEDY)) == {
            r.key: generate_greedily(plain, r, GREEDY.max_tokens) for r in requests
        }

    def test_a_soft_cap_that_sdpa_leaves_out(self, tiny: Any) -> None:
        chat = tiny("gemma2", fresh=True)
        chat.model.set_attn_implementation("sdpa")
        assert "differ from generate's" in loop_objection(chat)
        chat.model.set_attn_implementation("eager")
        assert loop_objection(chat) == ""

    def test_a_head_that_does_more(self, tiny: Any) -> None:
        # Greedy tokens are the same; log-probabilities are not.
        chat = tiny("llama", fresh=True)

        def sharpen(model: Any, args: Any, output: Any) -> None:
            output.logits *= 1.7

        handle = chat.model.register_forward_hook(sharpen)
        assert "log-probabilities differ" in loop_objection(chat)
        handle.remove()
        assert loop_objection(chat) == ""

    @pytest.mark.parametrize("layer", [0, 2])
    def test_damaged_weights_are_named_when_generating(self, tiny: Any, layer: int) -> None:
        # Whatever engine is chosen: NaN is the model's fault and must neither pass nor look like a foreign forward.
        chat = tiny("llama", stop=False, fresh=True)
        chat.blocks[layer].mlp.down_proj.weight[0, 0] = float("nan")
        choice = choose_engine(chat, None, 4096)
        assert "does not accept" not in choice.reason
        with pytest.raises(NonFiniteError, match=rf"Rollout q0 .*first at layer {layer} "):
            list(choice.engine.generate(requests_for(chat)[:1], GREEDY))


class TestABrokenLoopIsNoticed:
    """Each way of breaking it makes the check refuse it; otherwise the check proves nothing."""

    def test_attention(self, tiny: Any, monkeypatch: Any) -> None:
        right = attention.slot_attention

        def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            return right(module, query, key, value, mask, **(kwargs | {"scaling": 0.1}))

        monkeypatch.setattr(attention, "slot_attention", wrong)
        choice = choose_engine(tiny("llama", fresh=True), None, 4096)
        assert choice.engine.name == "generate"
        assert "differ from generate's" in choice.reason

    def test_window(self, tiny: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(attention, "_windowed", lambda mask, window: mask)
        assert "differ from generate's" in loop_objection(tiny("mistral"))

    def test_mask(self, tiny: Any, monkeypatch: Any) -> None:
        see_all = lambda positions, width: torch.zeros(len(positions), 1, positions.shape[1], width)  # noqa: E731
        monkeypatch.setattr(decode, "causal_mask", see_all)
        assert "differ from generate's" in loop_objection(tiny("llama"))

    def test_positions(self, tiny: Any, monkeypatch: Any) -> None:
        right = cache.SlotCache.begin_prefill

        def shifted(self: Any, slots: Any, starts: Any, width: int) -> Any:
            return right(self, slots, starts, width) * 2

        monkeypatch.setattr(cache.SlotCache, "begin_prefill", shifted)
        assert "differ from generate's" in loop_objection(tiny("llama"))

    def test_storage(self, tiny: Any, monkeypatch: Any) -> None:
        right = cache.SlotCache.begin_decode

        def off_by_one(self: Any, lengths: Any, width: int) -> None:
            right(self, lengths - 1, width)

        monkeypatch.setattr(cache.SlotCache, "begin_decode", off_by_one)
        assert "differ from generate's" in loop_objection(tiny("llama"))

    def test_an_exception_is_the_reason(self, tiny: Any, monkeypatch: Any) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise IndexError("no such slot")

        monkeypatch.setattr(cache.SlotCache, "begin_decode", refuse)
        chat = tiny("llama")
        before = state_of(chat)
        assert "IndexError: no such slot" in loop_objection(chat)
        assert state_of(chat) == before


class TestFallback:
    def test_greedy_tokens_counts_and_activations(self, tiny: Any, fallback_arch: str) -> None:
        chat = tiny(fallback_arch)
        requests = requests_for(chat)
        before = state_of(chat)
        made: list[int] = []
        replies = by_key(fallback(chat).generate(requests, GREEDY, made.append))
        assert state_of(chat) == before
        assert made == [len(r.token_ids) for r in replies.values()]
        assert {r.finish_reason for r in replies.values()} == {"stop", "length"}
        for request in requests:
            reply = replies[request.key]
            tokens = reply.token_ids.tolist()
            assert tokens == generate_greedily(chat, request, GREEDY.max_tokens)
            assert (tokens[-1] in chat.stop_ids) == (reply.finish_reason == "stop")
            assert (reply.n_counted, reply.content_start) == (len(tokens) - 1, 0)
            _, logits = block_outputs(chat, [*request.prompt_ids, *tokens])
            start = len(request.prompt_ids)
            scored = logits[start - 1 : -1].log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
            np.testing.assert_allclose(reply.logprobs, scored.numpy(), atol=1e-4)
            if reply.n_counted:
                assert relative_error(reply.activation, expected_activation(chat, request, reply)) < 1e-4
            else:
                assert reply.activation is None

    def test_the_same_as_the_loop(self, tiny: Any) -> None:
        chat = tiny("qwen3")
        requests = requests_for(chat)
        loop = by_key(DecodingLoop(chat, (1, 3), 1 << 14).generate(requests, GREEDY))
        for key, reply in by_key(fallback(chat, (1, 3)).generate(requests, GREEDY)).items():
            assert reply.token_ids.tolist() == loop[key].token_ids.tolist()
            assert (reply.n_counted, reply.finish_reason) == (loop[key].n_counted, loop[key].finish_reason)
            np.testing.assert_allclose(reply.logprobs, loop[key].logprobs, atol=1e-4)
            if reply.n_counted:
                assert relative_error(reply.activation, loop[key].activation) < 1e-4

    def test_sampled_rollouts_are_their_own(self, tiny: Any) -> None:
        chat = tiny("falcon")
        requests = requests_for(chat)
        torch.manual_seed(0)
        state = torch.random.get_rng_state()
        forward = tokens_of(fallback(chat).generate(requests, SAMPLED))
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are not used up"
        torch.manual_seed(1)
        assert tokens_of(fallback(chat).generate(requests[::-1], SAMPLED)) == forward
        other = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=4)
        assert tokens_of(fallback(chat).generate(requests, other)) != forward

    def test_thinking(self, tiny: Any) -> None:
        chat = tiny("llama", template="thinking", thinking=True, stop=False)
        newline, a, b, c = (chat.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "\nabc")
        open_, close, end = chat.think_start_id, chat.think_end_id, chat.tokenizer.eos_token_id
        requests = requests_for(chat)[:2]
        for said, limit in (
            ([open_, a, close, b, c, end], 12),
            ([open_, a, close, b, c], 5),
            ([open_, a, close, b], 4),
            ([open_, a, close], 3),
            ([open_, a], 2),
            ([a, b, c, end], 12),
        ):
            with scripted(chat, dict(itertools.pairwise([newline, *said]))):
                sampling = Sampling(max_tokens=limit, temperature=0)
                ours = by_key(fallback(chat).generate(requests, sampling))
                theirs = by_key(DecodingLoop(chat, (0, 1, 2, 3), 1 << 14).generate(requests, sampling))
            for key, reply in ours.items():
                loop = theirs[key]
                assert reply.token_ids.tolist() == loop.token_ids.tolist() == said
                assert (reply.n_counted, reply.content_start) == (loop.n_counted, loop.content_start)
                assert (reply.activation is None) == (loop.activation is None) == (reply.n_counted == 0)
                if reply.n_counted:
                    assert relative_error(reply.activation, loop.activation) < 1e-4

    @pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
    def test_nan(self, tiny: Any, sampling: Sampling) -> None:
        chat = tiny("falcon", stop=False, fresh=True)
        chat.blocks[2].mlp.dense_4h_to_h.weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"Rollout q0 .*first at layer 2 \(of 2"):
            list(fallback(chat).generate(requests_for(chat)[:1], sampling))

    def test_abandoned_and_failing(self, tiny: Any) -> None:
        chat = tiny("falcon", fresh=True)
        before = state_of(chat)
        config = copy.deepcopy(chat.model.generation_config.to_dict())
        replies = fallback(chat).generate(requests_for(chat), GREEDY)
        next(replies)
        assert state_of(chat) == before
        replies.close()

        def fail(*args: Any) -> None:
            raise KeyboardInterrupt

        handle = chat.blocks[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            list(fallback(chat).generate(requests_for(chat), GREEDY))
        handle.remove()
        assert state_of(chat) == before
        assert chat.model.generation_config.to_dict() == config

    def test_results_can_be_changed(self, tiny: Any) -> None:
        [reply] = fallback(tiny("qwen3")).generate(requests_for(tiny("qwen3"))[1:2], GREEDY)
        reply.activation.mul_(2)
