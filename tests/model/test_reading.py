"""Reading given tokens: means and log-probabilities against plain forwards, and against capture while generating."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import block_outputs, by_key, longest_prompt, relative_error, requests_for, scripted, state_of

from persona_axis.errors import ModelError, NonFiniteError, TemplateError
from persona_axis.model import prefill
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Engine, Request, Sampling
from persona_axis.model.fallback import GenerateEngine
from persona_axis.model.loading import ChatModel
from persona_axis.model.prefill import Prefiller
from persona_axis.model.reading import (
    Passage,
    length_batches,
    read_conversation,
    read_passages,
    residual_norms,
    score_passages,
)

TOKENS = [(7 * i * i + 3 * i + 5) % 250 for i in range(60)]
CONVERSATION = (
    {"role": "system", "content": "You are a bard."},
    {"role": "user", "content": "Sing of rain!"},
    {"role": "assistant", "content": "Drip, drop, the ending."},
    {"role": "user", "content": "Again."},
)


def passages(n: int = 6) -> list[Passage]:
    """Different lengths in no order, one or two spans each; spans touch, nest and reach both ends."""
    made = []
    for i in range(n):
        length = (17 * i) % 40 + 12
        tokens = tuple(TOKENS[i : i + 1] * 3 + TOKENS[: length - 3])
        spans = ((1, 5), (5, length), (2, 4))[: 1 + i % 3]
        made.append(Passage(f"p{i}", tokens, spans))
    return made


def reread(chat: ChatModel, engine: Engine, requests: list[Request], sampling: Sampling) -> set[str]:
    """Compare every captured activation with the re-read one; how replies ended."""
    replies = by_key(engine.generate(requests, sampling))
    wanted = []
    for r in requests:
        reply = replies[r.key]
        if reply.n_counted:
            start = len(r.prompt_ids) + reply.content_start
            ids = (*r.prompt_ids, *reply.token_ids.tolist())
            wanted.append(Passage(r.key, ids, ((start, start + reply.n_counted),)))
    assert wanted
    read = dict(read_passages(chat, wanted))
    for key, means in read.items():
        assert means.shape == (1, chat.n_layers, chat.d_model)
        assert relative_error(replies[key].activation, means[0]) < 1e-4
    return {replies[p.key].finish_reason for p in wanted}


class TestCapturedEqualsReread:
    def test_tiny_models(self, tiny: Any, loop_arch: str) -> None:
        chat = tiny(loop_arch)
        requests = requests_for(chat, shared=True)
        engine = DecodingLoop(chat, tuple(range(chat.n_layers)), 3 * (longest_prompt(requests) + 18))
        sampling = Sampling(max_tokens=18, temperature=0.8, seed=2)
        assert reread(chat, engine, requests, sampling) == {"stop", "length"}

    def test_fallback(self, tiny: Any, fallback_arch: str) -> None:
        chat = tiny(fallback_arch)
        engine = GenerateEngine(chat, tuple(range(chat.n_layers)))
        sampling = Sampling(max_tokens=18, temperature=0.8, seed=2)
        assert reread(chat, engine, requests_for(chat), sampling) == {"stop", "length"}

    def test_smollm(self, smollm: ChatModel) -> None:
        questions = ["Is fire hot? Answer with one word.", "What is rain?"]
        requests = requests_for(smollm, questions, "You answer with one word.", shared=True)
        engine = DecodingLoop(smollm, tuple(range(smollm.n_layers)), 1 << 14)
        assert reread(smollm, engine, requests, Sampling(max_tokens=10, temperature=0)) == {"stop", "length"}

    def test_after_thinking(self, tiny: Any) -> None:
        chat = tiny("llama", template="thinking", thinking=True, stop=False)
        chain = [chat.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "\nab"]
        chain = [chain[0], chat.think_start_id, chain[1], chat.think_end_id, chain[2]]
        with scripted(chat, dict(itertools.pairwise(chain))):
            engine = DecodingLoop(chat, tuple(range(chat.n_layers)), 1 << 14)
            assert reread(chat, engine, requests_for(chat), Sampling(max_tokens=12, temperature=0)) == {"length"}


class TestMeans:
    def test_against_hidden_states(self, tiny: Any, loop_arch: str) -> None:
        chat = tiny(loop_arch)
        for p in passages(3):
            with torch.inference_mode():
                out = chat.model(input_ids=torch.tensor([p.token_ids]), output_hidden_states=True)
            by_hook, _ = block_outputs(chat, p.token_ids)
            [(_, means)] = read_passages(chat, [p])
            for mean, (a, b) in zip(means, p.spans, strict=True):
                # hidden_states[0] is the embedding; the last entry comes after the final norm, so hooks take its place.
                blocks = [h[0, a:b].mean(0) for h in out.hidden_states[1 : chat.n_layers]]
                expected = torch.stack([*blocks, by_hook[-1, a:b].mean(0)])
                assert relative_error(mean, expected) < 1e-5

    def test_batches_change_nothing(self, tiny: Any, loop_arch: str) -> None:
        chat = tiny(loop_arch)
        together = dict(read_passages(chat, passages()))
        for batch_tokens in (1, 80):
            for key, means in read_passages(chat, passages()[::-1], batch_tokens=batch_tokens):
                assert relative_error(means, together[key]) < 1e-5
        assert list(together) == [p.key for p in sorted(passages(), key=lambda p: len(p.token_ids))]

    def test_some_layers(self, tiny: Any) -> None:
        chat = tiny("llama")
        every = dict(read_passages(chat, passages()))
        for key, means in read_passages(chat, passages(), layers=[2, 0]):
            torch.testing.assert_close(means, every[key][:, [0, 2]])

    def test_bfloat16_is_summed_in_float32(self, tiny: Any) -> None:
        chat = tiny("llama", dtype="bfloat16")
        hidden, _ = block_outputs(chat, TOKENS)
        [(_, means)] = read_passages(chat, [Passage("p", tuple(TOKENS), ((0, 60),))])
        assert means.dtype == torch.float32
        torch.testing.assert_close(means[0], hidden.double().mean(1).float(), rtol=1e-5, atol=1e-5)

    def test_the_head_is_not_run(self, tiny: Any) -> None:
        chat = tiny("llama")
        ran = []
        handle = chat.model.lm_head.register_forward_hook(lambda *args: ran.append(1))
        list(read_passages(chat, passages()))
        handle.remove()
        assert not ran

    def test_results_can_be_changed(self, tiny: Any) -> None:
        [(_, means)] = read_passages(tiny("llama"), passages(1))
        means.mul_(2)

    @pytest.mark.parametrize("span", [(3, 3), (4, 2), (-1, 2), (0, 61)])
    def test_wrong_spans(self, tiny: Any, span: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="bad: span"):
            list(read_passages(tiny("llama"), [Passage("bad", tuple(TOKENS), (span,))]))

    def test_wrong_layers(self, tiny: Any) -> None:
        with pytest.raises(ModelError, match="layers 0 to 3"):
            list(read_passages(tiny("llama"), passages(), layers=[4]))

    def test_nothing_to_read(self, tiny: Any) -> None:
        assert list(read_passages(tiny("llama"), [])) == []

    def test_nan(self, tiny: Any) -> None:
        chat = tiny("llama", fresh=True)
        before = state_of(chat)
        # Not in a query: PyTorch's CPU attention turns a query of NaN into an output of 0.
        chat.blocks[1].mlp.down_proj.weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"p0 .*first at layer 1"):
            list(read_passages(chat, passages(1)))
        assert state_of(chat) == before

    def test_length_batches(self) -> None:
        given = [Passage(str(i), tuple(range(n)), ()) for i, n in enumerate((5, 9, 3, 50, 4))]
        batches = list(length_batches(given, 12))
        assert [[len(p.token_ids) for p in batch] for batch in batches] == [[3, 4], [5], [9], [50]]
        assert list(length_batches([], 12)) == []


class TestNorms:
    def _expected(self, chat: ChatModel, given: list[Passage]) -> list[float]:
        norms: list[list[float]] = [[] for _ in chat.blocks]
        for p in given:
            hidden, _ = block_outputs(chat, p.token_ids)
            for t in sorted({t for a, b in p.spans for t in range(a, b)}):
                for layer, row in enumerate(hidden[:, t]):
                    norms[layer].append(float(row.double().norm()))
        return [sum(values) / len(values) for values in norms]

    @pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "lfm2"])
    def test_against_a_loop(self, tiny: Any, arch: str) -> None:
        """A token in two spans counts once."""
        chat = tiny(arch)
        expected = self._expected(chat, passages())
        for batch_tokens in (1, 80, 8192):
            norms = residual_norms(chat, passages(), batch_tokens=batch_tokens)
            assert norms.dtype == torch.float32
            np.testing.assert_allclose(norms, expected, rtol=1e-5)
        np.testing.assert_allclose(residual_norms(chat, passages(), layers=[3, 1]), expected[1::2], rtol=1e-5)

    def test_bfloat16(self, tiny: Any) -> None:
        chat = tiny("llama", dtype="bfloat16")
        np.testing.assert_allclose(residual_norms(chat, passages(1)), self._expected(chat, passages(1)), rtol=1e-5)

    def test_of_tokens_not_of_their_mean(self, tiny: Any) -> None:
        chat = tiny("llama")
        [(_, [mean])] = read_passages(chat, [Passage("p", tuple(TOKENS), ((0, 60),))])
        assert (residual_norms(chat, [Passage("p", tuple(TOKENS), ((0, 60),))]) > mean.norm(dim=-1)).all()

    def test_the_result_can_be_changed(self, tiny: Any) -> None:
        residual_norms(tiny("llama"), passages(1)).mul_(2)

    def test_nan(self, tiny: Any) -> None:
        chat = tiny("llama", fresh=True)
        chat.blocks[2].mlp.down_proj.weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="first at layer 2"):
            residual_norms(chat, passages())

    @pytest.mark.parametrize("given", [[], [Passage("p", tuple(TOKENS), ())], [Passage("p", tuple(TOKENS), ((9, 9),))]])
    def test_nothing_to_measure(self, tiny: Any, given: list[Passage]) -> None:
        with pytest.raises(ValueError, match=r"No span|p: span 9:9"):
            residual_norms(tiny("llama"), given)

    def test_passages_without_a_span_are_passed_over(self, tiny: Any) -> None:
        chat = tiny("llama")
        given = [*passages(2), Passage("none", tuple(TOKENS), ())]
        np.testing.assert_allclose(residual_norms(chat, given), residual_norms(chat, passages(2)), rtol=1e-5)


class TestConversations:
    @pytest.mark.parametrize("template", ["chatml", "no_system", "spaced"])
    def test_every_message(self, tiny: Any, template: str) -> None:
        chat = tiny("qwen3", template=template)
        tokens = chat.template.tokenise(CONVERSATION)
        hidden, _ = block_outputs(chat, tokens.token_ids)
        readings = read_conversation(chat, CONVERSATION)
        folded = template != "chatml"
        assert [r.message for r in readings] == [1, 2, 3] if folded else [0, 1, 2, 3]
        for reading, segment in zip(readings, tokens.segments, strict=True):
            assert (reading.role, reading.part) == (CONVERSATION[reading.message]["role"], "content")
            assert reading.n_tokens == segment.end - segment.start
            assert relative_error(reading.activation, hidden[:, segment.start : segment.end].mean(1)) < 1e-5

    def test_later_turns_change_nothing(self, tiny: Any) -> None:
        chat = tiny("llama")
        whole = read_conversation(chat, CONVERSATION)
        for n in (1, 2, 3):
            for a, b in zip(read_conversation(chat, CONVERSATION[:n]), whole, strict=False):
                assert relative_error(a.activation, b.activation) < 1e-5

    def test_thinking_is_read_apart(self, tiny: Any) -> None:
        chat = tiny("llama", template="thinking")
        given = [CONVERSATION[1], {"role": "assistant", "content": "<think>Hm.</think>Drip."}]
        readings = read_conversation(chat, given)
        assert [(r.message, r.part, r.n_tokens) for r in readings] == [
            (0, "content", len(chat.tokenizer("Sing of rain!")["input_ids"])),
            (1, "thinking", 3),
            (1, "content", 5),
        ]

    def test_no_content(self, tiny: Any) -> None:
        with pytest.raises(TemplateError, match="no content to read"):
            read_conversation(tiny("llama"), [{"role": "user", "content": ""}])

    def test_layers(self, tiny: Any) -> None:
        readings = read_conversation(tiny("llama"), CONVERSATION, layers=[1])
        assert {tuple(r.activation.shape) for r in readings} == {(1, 32)}


class TestScores:
    """Log-probabilities against log_softmax of `model(...)`, with and without a shared prefix."""

    def _expected(self, chat: ChatModel, p: Passage) -> list[np.ndarray]:
        with torch.inference_mode():
            logits = chat.model(input_ids=torch.tensor([p.token_ids]), use_cache=False).logits[0].double()
        table = logits.log_softmax(-1)
        return [np.array([float(table[i - 1, p.token_ids[i]]) for i in range(a, b)]) for a, b in p.spans]

    def _check(self, chat: ChatModel, given: list[Passage], scored: dict[str, list[np.ndarray]]) -> None:
        assert set(scored) == {p.key for p in given}
        for p in given:
            for ours, theirs in zip(scored[p.key], self._expected(chat, p), strict=True):
                assert ours.dtype == np.float32
                np.testing.assert_allclose(ours, theirs, atol=1e-4)

    def _shared(self) -> list[Passage]:
        """Two prefixes and none, replies of different lengths."""
        made = []
        for i, (prefix, n) in enumerate([(20, 9), (20, 4), (31, 1), (0, 12), (31, 14), (20, 2)]):
            tokens = (*TOKENS[:prefix], *TOKENS[50 - n - i : 50])
            start = max(prefix + 1, 1)
            made.append(Passage(f"s{i}", (*tokens, 7), ((start, len(tokens) + 1),), prefix))
        return made

    @pytest.mark.parametrize("batch_tokens", [64, 8192])
    def test_tiny_models(self, tiny: Any, loop_arch: str, batch_tokens: int) -> None:
        chat = tiny(loop_arch)
        self._check(chat, passages(), dict(score_passages(chat, passages(), batch_tokens)))
        for proven in (True, False):
            subject = replace(chat, loop_proven=proven)
            self._check(chat, self._shared(), dict(score_passages(subject, self._shared(), batch_tokens)))

    def test_fallback_models(self, tiny: Any, fallback_arch: str) -> None:
        chat = tiny(fallback_arch)
        self._check(chat, self._shared(), dict(score_passages(chat, self._shared())))

    def test_smollm(self, smollm: ChatModel) -> None:
        given = [*self._shared()[:2], *passages(1)]
        proven = replace(smollm, loop_proven=True)
        self._check(smollm, given, dict(score_passages(proven, given)))

    def test_a_shared_prefix_is_computed_once(self, tiny: Any) -> None:
        chat = replace(tiny("llama"), loop_proven=True)
        computed = []

        def count(decoder: Any, args: Any, kwargs: Any) -> None:
            computed.append(kwargs["input_ids"].numel())

        handle = chat.model.model.register_forward_pre_hook(count, with_kwargs=True)
        slots = Prefiller(chat)
        given = [p for p in self._shared() if p.shared == 31]
        rests = 2 * max(len(p.token_ids) - 31 for p in given)
        try:
            first = dict(score_passages(chat, given, slots=slots))
            assert sum(computed) == 31 + rests
            computed.clear()
            again = dict(score_passages(chat, given, slots=slots))
            assert sum(computed) == rests, "kept from call to call"
        finally:
            handle.remove()
        for key in first:
            np.testing.assert_array_equal(first[key][0], again[key][0])
        self._check(chat, given, again)

    def test_forgotten_prefixes_are_computed_again(self, tiny: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(prefill, "PREFIX_BYTES", 1)
        chat = replace(tiny("mistral"), loop_proven=True)
        slots = Prefiller(chat)
        for _ in range(2):
            for p in self._shared():
                self._check(chat, [p], dict(score_passages(chat, [p], slots=slots)))
            assert len(slots.prefixes) == 1

    def test_prefixes_in_use_are_not_forgotten(self, tiny: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr(prefill, "PREFIX_BYTES", 1)
        chat = replace(tiny("llama"), loop_proven=True)
        slots = Prefiller(chat)
        ends = {shared: Passage(f"p{shared}", tuple(TOKENS[:40]), ((39, 40),), shared) for shared in (10, 20, 30)}
        for used in ((10, 20), (10, 30), (30, 20)):  # the oldest is wanted again, beside a new one
            given = [ends[n] for n in used]
            self._check(chat, given, dict(score_passages(chat, given, slots=slots)))
            assert {len(ids) for ids, _ in slots.prefixes} == set(used)

    def test_the_model_is_plain_between_passages(self, tiny: Any) -> None:
        chat = replace(tiny("gpt_oss"), loop_proven=True)
        before = state_of(chat)
        for _ in score_passages(chat, self._shared(), batch_tokens=1):
            assert state_of(chat) == before
        assert state_of(chat) == before

    @pytest.mark.parametrize(("span", "shared"), [((0, 4), 0), ((5, 9), 5), ((2, 9), 5)])
    def test_nothing_before_the_span(self, tiny: Any, span: tuple[int, int], shared: int) -> None:
        with pytest.raises(ValueError, match="bad: a scored span needs a token"):
            list(score_passages(tiny("llama"), [Passage("bad", tuple(TOKENS), (span,), shared)]))

    def test_generated_logprobs_are_the_scores(self, tiny: Any) -> None:
        chat = tiny("gemma2")
        requests = requests_for(chat)
        engine = DecodingLoop(chat, (0,), 1 << 14)
        for reply in engine.generate(requests, Sampling(max_tokens=12, temperature=0.7, seed=3)):
            prompt = requests[int(reply.key[1:])].prompt_ids
            ids = (*prompt, *reply.token_ids.tolist())
            [(_, [scores])] = score_passages(chat, [Passage("p", ids, ((len(prompt), len(ids)),))])
            np.testing.assert_allclose(reply.logprobs, scores, atol=1e-4)
