"""Policies for some positions: which tokens change, whoever runs the model, against masks made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from forwards import IDS, LAYERS, an_axis, changed_by_hand, floors_between, generated, logits, outputs
from torch import Tensor

from persona_axis.errors import ModelError, UsageError
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Engine, Request, Sampling
from persona_axis.model.fallback import GenerateEngine
from persona_axis.model.layers import text_decoder
from persona_axis.model.loading import ChatModel
from persona_axis.model.prefill import Prefiller
from persona_axis.model.reading import Passage, read_conversation, read_passages, residual_norms, score_passages
from persona_axis.steering import interventions
from persona_axis.steering.hooks import held
from persona_axis.steering.policy import Policy, Positions

Tiny = Callable[..., ChatModel]
Span = tuple[int, int]
SAMPLING = Sampling(max_tokens=9, temperature=0.8, seed=4)
CONVERSATION = (
    {"role": "system", "content": "You are a bard."},
    {"role": "user", "content": "Sing of rain!"},
    {"role": "assistant", "content": "Drip, drop, the ending."},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "Drop."},
)
EVERY: tuple[Positions, ...] = ("all", "reply", "decode")


def policy_for(chat: ChatModel, positions: Positions) -> Policy:
    """A cap that half of the tokens lie below, and a push: what is steered by mistake shows."""
    axis = an_axis()
    floors = floors_between(chat, axis, (1,))
    parts = (interventions.cap(1, axis.at(1), floors[1] + 3), interventions.add(2, axis.at(2), -5.0))
    return Policy(parts, positions=positions)


def meant(positions: Positions, n: int, prompt: int, replies: Sequence[Span] = ()) -> list[bool]:
    """The definition: of ``n`` tokens, ``prompt`` were given, among them ``replies``; the rest was generated."""
    given = [positions == "reply" and any(a <= t < b for a, b in replies) for t in range(prompt)]
    if positions == "all":
        given = [True] * prompt
    return [*given, *[True] * (n - prompt)]


def conversations(chat: ChatModel, n: int = 7) -> list[Request]:
    """Prompts of different lengths; some with earlier replies, some ending in one that was begun, prefixes shared."""
    system = (9, 30, 31, 32, 33, 34, 35)
    made = []
    for i in range(n):
        turns = [*system, *range(60 + i, 60 + 2 * i + 4)]
        replies: list[Span] = []
        for earlier in range(i % 3):
            start = len(turns)
            turns += range(100 + 9 * i + earlier, 104 + 10 * i + earlier)
            replies.append((start, len(turns)))
            turns += (40, 41)
        if i in (3, 5):
            start = len(turns)
            turns += (150 + i, 151, 152)
            replies.append((start, len(turns)))
        made.append(Request(f"r{i}", tuple(t % 250 for t in turns), len(system), tuple(replies)))
    # The same ids, as a reply in one and not in the other; all but the last token shared.
    made.append(Request("shared/reply", made[4].prompt_ids, len(made[4].prompt_ids) - 1, made[4].replies))
    made.append(Request("shared/plain", made[4].prompt_ids, len(made[4].prompt_ids) - 1))
    return made


def check_replies(chat: ChatModel, engine: Engine, requests: list[Request], policy: Policy) -> None:
    """Every captured activation and log-probability, against one forward whose meant tokens were changed by hand."""
    with held(chat, policy):
        replies = {r.key: r for r in engine.generate(requests, SAMPLING)}
    assert len(replies) == len(requests)
    for r in requests:
        reply, prompt = replies[r.key], len(r.prompt_ids)
        ids = [*r.prompt_ids, *reply.token_ids.tolist()]
        mask = meant(policy.positions, len(ids), prompt, r.replies)
        hidden, table = changed_by_hand(chat, ids, policy, mask)
        expected = table[prompt - 1 : -1].log_softmax(-1)[range(len(ids) - prompt), ids[prompt:]]
        np.testing.assert_allclose(reply.logprobs, expected.numpy(), atol=2e-3)
        if reply.n_counted:
            torch.testing.assert_close(reply.activation, hidden[:, prompt:-1].mean(1), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("positions", EVERY)
@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2"])
def test_the_decoding_loop(tiny: Tiny, arch: str, positions: Positions) -> None:
    """Batched and refilled, with prefixes computed once."""
    chat = tiny(arch)
    requests = conversations(chat)
    longest = max(len(r.prompt_ids) for r in requests)
    loop = DecodingLoop(chat, LAYERS, 3 * (longest + SAMPLING.max_tokens))
    check_replies(chat, loop, requests, policy_for(chat, positions))


def test_the_three_differ(tiny: Tiny) -> None:
    chat = tiny("llama")
    requests = conversations(chat)[4:5]
    scores = []
    for positions in EVERY:
        with held(chat, policy_for(chat, positions)):
            [reply] = DecodingLoop(chat, LAYERS, 1 << 10).generate(requests, SAMPLING)
        scores.append(reply.logprobs[:1].tolist())
    assert len(set(map(tuple, scores))) == 3


@pytest.mark.parametrize("positions", EVERY)
@pytest.mark.parametrize("arch", ["falcon", "lfm2", "llama"])
def test_the_fallback_engine(tiny: Tiny, arch: str, positions: Positions) -> None:
    chat = tiny(arch)
    requests = conversations(chat)[2:6]
    check_replies(chat, GenerateEngine(chat, LAYERS), requests, policy_for(chat, positions))


def greedy_by_hand(chat: ChatModel, prompt: Sequence[int], n: int, policy: Policy) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        mask = meant(policy.positions, len(ids), len(prompt))
        ids.append(int(changed_by_hand(chat, ids, policy, mask)[1][-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("positions", EVERY)
def test_a_reply_for_trying_things_out(tiny: Tiny, positions: Positions) -> None:
    chat = tiny("llama", stop=False)
    policy = policy_for(chat, positions)
    prompt = chat.template.prompt_ids(chat.template.messages("", "What is rain?"))
    with held(chat, policy):
        said = chat.reply("What is rain?", max_tokens=6)
    assert said == chat.decode(greedy_by_hand(chat, prompt, 6, policy))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2", "gpt_neox"])
def test_generate_that_nobody_announced(tiny: Tiny, arch: str) -> None:
    """A batch that is padded on the left, and each row of it alone."""
    chat = tiny(arch)
    policy = policy_for(chat, "decode")
    padded, mask = IDS.clone(), torch.ones_like(IDS)
    padded[1, :6], mask[1, :6] = 0, 0
    with held(chat, policy):
        rows = generated(chat, padded, 5, attention_mask=mask)
        alone = generated(chat, IDS[1:, 6:], 5)
    assert rows[0] == greedy_by_hand(chat, IDS[0].tolist(), 5, policy)
    assert alone[0] == greedy_by_hand(chat, IDS[1, 6:].tolist(), 5, policy)
    if arch != "lfm2":  # its convolutions see the padding
        assert rows[1] == alone[0]


def test_generate_with_a_static_cache(tiny: Tiny) -> None:
    chat = tiny("llama")
    policy = policy_for(chat, "decode")
    with held(chat, policy):
        said = generated(chat, IDS[:1], 5, cache_implementation="static")
    assert said[0] == greedy_by_hand(chat, IDS[0].tolist(), 5, policy)


@torch.inference_mode()
def test_a_loop_of_ones_own_over_the_decoder_by_position(tiny: Tiny) -> None:
    """Arguments count however they are passed."""
    chat = tiny("llama")
    policy = policy_for(chat, "decode")
    prompt, more = IDS[:1], IDS[1:, :2]
    decoder = text_decoder(chat.model)
    with held(chat, policy):
        out = decoder(prompt)
        steps = []
        for i in range(2):
            out = decoder(more[:, i : i + 1], None, None, out.past_key_values)
            steps.append(chat.model.lm_head(out.last_hidden_state)[0, -1])
    ids = [*prompt[0].tolist(), *more[0].tolist()]
    _, table = changed_by_hand(chat, ids, policy, meant("decode", 17, 15))
    torch.testing.assert_close(torch.stack(steps), table[15:], rtol=1e-4, atol=2e-3)


# ---- reading and scoring ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", EVERY)
@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_reading_a_conversation(tiny: Tiny, arch: str, positions: Positions) -> None:
    chat = tiny(arch)
    policy = policy_for(chat, positions)
    tokens = chat.template.tokenise(CONVERSATION)
    turns = [(s.start, s.end) for s in tokens.segments if s.role == "assistant"]
    n = len(tokens.token_ids)
    hidden, _ = changed_by_hand(chat, tokens.token_ids, policy, meant(positions, n, n, turns))
    plain = read_conversation(chat, CONVERSATION)
    with held(chat, policy):
        readings = read_conversation(chat, CONVERSATION)
    for reading, before, segment in zip(readings, plain, tokens.segments, strict=True):
        expected = hidden[:, segment.start : segment.end].mean(1)
        torch.testing.assert_close(reading.activation, expected, rtol=1e-4, atol=2e-3)
        if positions == "decode" or (positions == "reply" and segment.end <= turns[0][0]):
            torch.testing.assert_close(reading.activation, before.activation, rtol=0, atol=0)


@pytest.mark.parametrize("positions", ["all", "reply"])
def test_reading_again_gives_what_was_generated(tiny: Tiny, positions: Positions) -> None:
    """Two turns; under ``decode`` a reply is given once it is read again, and no longer changed."""
    chat = tiny("llama", stop=False)
    policy = policy_for(chat, positions)
    loop = DecodingLoop(chat, LAYERS, 1 << 10)
    with held(chat, policy):
        [first] = loop.generate([Request("first", tuple(IDS[0].tolist()))], SAMPLING)
        start = IDS.shape[1]
        said = [*IDS[0].tolist(), *first.token_ids.tolist()]
        turn = (start, len(said) - 1)  # the last token was cut, and never read
        prompt = (*said[:-1], 40, 41, 42, 43)
        [second] = loop.generate([Request("second", prompt, replies=(turn,))], SAMPLING)
        whole = (*prompt, *second.token_ids.tolist())
        spans = (turn, (len(prompt), len(whole) - 1))
        [(_, [mean, later])] = read_passages(chat, [Passage("both", whole, spans, replies=spans)])
    assert first.finish_reason == second.finish_reason == "length"
    torch.testing.assert_close(mean, first.activation, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(later, second.activation, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("positions", EVERY)
@pytest.mark.parametrize("proven", [True, False])
def test_scores_are_those_of_generation(tiny: Tiny, positions: Positions, proven: bool) -> None:
    """Teacher forcing: what is scored counts as generated, with or without computing prefixes once."""
    chat = replace(tiny("gemma3"), loop_proven=proven)
    policy = policy_for(chat, positions)
    requests = conversations(chat)
    with held(chat, policy):
        replies = {r.key: r for r in DecodingLoop(chat, LAYERS, 1 << 10).generate(requests, SAMPLING)}
        passages = []
        for r in requests:
            n = len(r.prompt_ids)
            ids = (*r.prompt_ids, *replies[r.key].token_ids.tolist())
            shared = min(r.shared_prefix, n - 1) if proven else 0
            passages.append(Passage(r.key, ids, ((n, len(ids)),), shared, r.replies))
        slots = Prefiller(chat)
        for _ in range(2):  # the second time from prefixes that are kept
            scored = dict(score_passages(chat, passages, slots=slots))
            for key, [values] in scored.items():
                np.testing.assert_allclose(values, replies[key].logprobs, atol=1e-3)
    plain = dict(score_passages(chat, passages))
    assert any(np.abs(plain[key][0] - replies[key].logprobs).max() > 0.1 for key in plain)


def test_norms_are_of_given_tokens(tiny: Tiny) -> None:
    chat = tiny("llama")
    passage = Passage("p", tuple(IDS[0].tolist()), ((3, 9),), replies=((5, 12),))
    for positions in EVERY:
        policy = policy_for(chat, positions)
        mask = meant(positions, 15, 15, passage.replies)
        hidden, _ = changed_by_hand(chat, passage.token_ids, policy, mask)
        with held(chat, policy):
            norms = residual_norms(chat, [passage])
        torch.testing.assert_close(norms, hidden[:, 3:9].norm(dim=-1).mean(1), rtol=1e-4, atol=1e-3)


# ---- never a guess ----------------------------------------------------------------------------------------------


def refused(chat: ChatModel, positions: Positions, run: Callable[[], Any], message: str) -> None:
    with held(chat, policy_for(chat, positions)), pytest.raises(ModelError, match=message):
        run()
    run()


def test_reply_needs_to_be_told(tiny: Tiny) -> None:
    chat = tiny("llama")
    message = "nobody said which tokens of this forward are theirs"
    refused(chat, "reply", lambda: logits(chat), message)
    refused(chat, "reply", lambda: generated(chat, IDS, 3), message)
    refused(chat, "reply", lambda: outputs(chat), message)


@torch.inference_mode()
def test_decode_needs_a_cache_that_tells(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny("llama")
    refused(chat, "decode", lambda: logits(chat), "without a cache they cannot be told from the prompt")
    refused(chat, "decode", lambda: generated(chat, IDS, 3, use_cache=False), "without a cache")
    cache = chat.model(input_ids=IDS).past_key_values
    refused(chat, "decode", lambda: chat.model(input_ids=IDS[:, :2], past_key_values=cache), "2 tokens at once after a")
    lookup = {"prompt_lookup_num_tokens": 3}  # proposes several tokens at once
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    refused(chat, "decode", lambda: generated(chat, ids, 8, **lookup), "tokens at once after a filled cache")
    monkeypatch.setattr(chat.model.config, "use_cache", False)
    refused(chat, "decode", lambda: chat.model(input_ids=IDS), "without a cache")


@pytest.mark.parametrize("positions", ["reply", "decode"])
def test_a_block_by_itself(tiny: Tiny, positions: Positions) -> None:
    """After a forward as well: nothing is left of what it was told."""
    chat = tiny("llama")
    layer = [torch.nn.Identity() for _ in LAYERS]
    alone = replace(chat, blocks=torch.nn.ModuleList(layer))
    hidden: Tensor = torch.zeros(1, 15, 32)
    with (
        held(alone, policy_for(chat, positions)),
        pytest.raises(UsageError, match="a decoder block was called by itself"),
    ):
        alone.blocks[1](hidden)
    with held(chat, policy_for(chat, positions)):
        list(read_passages(chat, [Passage("p", tuple(IDS[0].tolist()), ((0, 15),))]))
        rotary = chat.model.model.rotary_emb(hidden, torch.arange(15)[None])
        with pytest.raises(UsageError, match="a decoder block was called by itself"):
            chat.blocks[1](hidden, position_embeddings=rotary)


def test_a_decoder_with_another_kind_of_cache(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny("llama")
    decoder = text_decoder(chat.model)
    own = decoder.forward

    def forward(input_ids: Any = None, cache_params: Any = None, **kwargs: Any) -> Any:
        return own(input_ids, **kwargs)

    monkeypatch.setattr(decoder, "forward", forward)
    refused(chat, "decode", lambda: decoder(IDS), "LlamaModel takes no past_key_values")
