"""Replies token by token: the model's own, read where each token is the input, whatever was kept from before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from persona_axis.errors import NonFiniteError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.engine import Sampling
from persona_axis.model.fallback import plain_generate
from persona_axis.model.layers import tapped
from persona_axis.model.loading import ChatModel
from persona_axis.model.streaming import Hold, ReplyStream, StreamedReply
from persona_axis.model.tokens import announced, continuing
from persona_axis.steering.hooks import held, steer
from persona_axis.steering.policy import Policy, Positions

WIDTH, LAYER = 32, 2
SLACK = 2e-3  # rounding of float32 residuals of the tiny models, whose projections are in the tens
GREEDY = Sampling(max_tokens=12, temperature=0)

Tiny = Callable[..., ChatModel]


@pytest.fixture
def axis() -> Axis:
    return Axis(3 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)), (0, 1, 2, 3), LAYER)


class Recording(ReplyStream):
    """Keeps every step's logits."""

    logits: list[Tensor]

    def reply(self, *args: Any, **kwargs: Any) -> StreamedReply:
        self.logits = []
        return super().reply(*args, **kwargs)

    def _read(self, token: int) -> Tensor:
        logits = super()._read(token)
        self.logits.append(logits[0].clone())
        return logits


def prompt(chat: ChatModel, *said: str) -> tuple[int, ...]:
    """A conversation in which user and assistant alternate."""
    roles = ("user", "assistant")
    return chat.template.prompt_ids([{"role": roles[i % 2], "content": text} for i, text in enumerate(said)])


def floors(axis: Axis, chat: ChatModel, ids: Sequence[int], layers: Sequence[int]) -> dict[int, float]:
    """Medians of the tokens' projections: about half of the tokens are corrected."""
    return {layer: float(axis.project(outputs(chat, ids)[layer], layer).median()) for layer in layers}


@torch.inference_mode()
def outputs(chat: ChatModel, ids: Sequence[int]) -> list[Tensor]:
    """Every block's output for a whole sequence at once, ``[tokens, d_model]``, before what is entered later."""
    seen: list[Tensor] = []
    with tapped(chat.blocks, lambda i, hidden: seen.append(hidden[0].clone())):
        chat.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return seen


@torch.inference_mode()
def held_outputs(
    chat: ChatModel, policy: Policy, ids: Sequence[int], n_prompt: int, replies: Sequence[tuple[int, int]] = ()
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Blocks' outputs before and after a policy, and the logits, of a whole sequence at once."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    with (
        tapped(chat.blocks, lambda i, hidden: before.append(hidden[0].clone())),
        held(chat, policy),
        tapped(chat.blocks, lambda i, hidden: after.append(hidden[0].clone())),
        announced(continuing(n_prompt, replies)),
    ):
        logits = chat.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return before, after, logits


def holding(chat: ChatModel, policy: Policy) -> Hold:
    return Hold(policy.layers, lambda: held(chat, policy), policy.positions)


# ---- the plain model ---------------------------------------------------------------------------------------------


def check_plain(chat: ChatModel, axis: Axis) -> None:
    """Three turns of one conversation: generate's tokens, and projections of a forward over the whole of it."""
    stream = Recording(chat, axis)
    config = chat.model.config
    goes_back = not getattr(config, "sliding_window", None) and "conv" not in (
        getattr(config, "layer_types", None) or ()
    )
    said: list[str] = []
    for n, question in enumerate(("Who are you?", "What is the thing in there?", "Why?")):
        said.append(question)
        ids = prompt(chat, *said)
        reply = stream.reply(ids, GREEDY, f"turn {n}")
        expected = plain_generate(chat, torch.tensor([ids]), GREEDY)
        assert list(reply.token_ids) == expected.sequences[0, len(ids) :].tolist()
        assert torch.allclose(torch.stack(stream.logits), torch.cat(expected.logits), atol=SLACK)
        whole = [*ids, *reply.token_ids[:-1]]
        golden = axis.project(outputs(chat, whole)[LAYER], LAYER)[len(ids) :]
        assert reply.projections == pytest.approx(golden.tolist(), abs=SLACK)
        assert reply.n_counted == len(reply.token_ids) - 1
        assert reply.ended == ("stop" if reply.token_ids[-1] in chat.stop_ids else "length")
        assert reply.projection is None or reply.projection == pytest.approx(float(golden.mean()), abs=SLACK)
        # A random model's text is not valid UTF-8, so it comes back as other tokens; not every cache can go back there.
        if goes_back:
            assert (reply.kept_tokens > 0) == (n > 0)
        said.append(reply.text)


def test_every_architecture_and_what_is_kept(loop_arch: str, tiny: Tiny, axis: Axis) -> None:
    check_plain(tiny(loop_arch, stop=False), axis)


def test_architectures_that_the_loop_cannot_drive(fallback_arch: str, tiny: Tiny, axis: Axis) -> None:
    check_plain(tiny(fallback_arch, stop=False), axis)


@pytest.mark.parametrize("arch", ["gemma2", "mistral", "lfm2"])
def test_a_cache_that_cannot_go_back_is_continued(arch: str, tiny: Tiny, axis: Axis) -> None:
    chat = tiny(arch, stop=False)
    stream, fresh = Recording(chat, axis), Recording(chat, axis)
    ids = prompt(chat, "Longer than any window that these models have.")
    first = stream.reply(ids, GREEDY, "a")
    longer = (*ids, *first.token_ids, 7, 8, 9)
    second = stream.reply(longer, GREEDY, "a")
    assert second.kept_tokens == len(ids) + len(first.token_ids) - 1
    assert second.token_ids == fresh.reply(longer, GREEDY, "a").token_ids
    assert torch.allclose(torch.stack(stream.logits), torch.stack(fresh.logits), atol=SLACK)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
def test_what_differs_in_the_middle_is_computed_anew(arch: str, tiny: Tiny, axis: Axis) -> None:
    chat = tiny(arch)
    stream = Recording(chat, axis)
    stream.reply(prompt(chat, "The same beginning, then this."), GREEDY, "a")
    for question in ("The same beginning, then that.", "The same beginning, then that.", "Other"):
        kept = stream.reply(prompt(chat, question), GREEDY, "a")
        logits = stream.logits
        fresh = Recording(chat, axis)
        again = fresh.reply(prompt(chat, question), GREEDY, "a")
        assert kept.token_ids == again.token_ids
        assert torch.allclose(torch.stack(logits), torch.stack(fresh.logits), atol=SLACK)
        assert again.kept_tokens == 0 <= kept.kept_tokens < kept.prompt_tokens


def test_draws_are_the_keys_own(tiny: Tiny, axis: Axis) -> None:
    chat = tiny()
    ids = prompt(chat, "Who are you?")
    warm = Sampling(max_tokens=10, temperature=1.0, top_p=0.95, seed=3)
    first, again, other = (ReplyStream(chat, axis).reply(ids, warm, key) for key in ("a", "a", "b"))
    assert first.token_ids == again.token_ids != other.token_ids


def test_text_comes_in_whole_characters(tiny: Tiny, axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny(stop=False)
    tokens = iter(chat.tokenizer("né 한\n☃ ")["input_ids"])

    def scripted(*_: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor([next(tokens, min(chat.stop_ids))]), torch.zeros(1)

    monkeypatch.setattr("persona_axis.model.streaming.sample", scripted)
    pieces: list[str] = []
    reply = ReplyStream(chat, axis).reply(
        prompt(chat, "Hm?"), Sampling(40, temperature=0), "a", on_text=lambda piece: pieces.append(piece)
    )
    assert "".join(pieces) == reply.text == "né 한\n☃ "
    assert len([piece for piece in pieces if piece]) == len(reply.text)
    assert not any("\ufffd" in piece for piece in pieces)


def test_thinking_does_not_count(tiny: Tiny, axis: Axis, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = tiny(template="opens_thinking", stop=False)
    thought, said = (chat.tokenizer(text)["input_ids"] for text in ("Hm, well.</think>", "Yes."))
    tokens = iter([*thought, *said])
    monkeypatch.setattr(
        "persona_axis.model.streaming.sample",
        lambda *_: (torch.tensor([next(tokens, min(chat.stop_ids))]), torch.zeros(1)),
    )
    ids = prompt(chat, "Is it?")
    pieces: list[str] = []
    reply = ReplyStream(chat, axis).reply(ids, Sampling(40, temperature=0), "a", on_text=pieces.append)
    assert "".join(pieces) == reply.text == "Yes."
    golden = axis.project(outputs(chat, [*ids, *thought, *said])[LAYER], LAYER)[-len(said) :]
    assert reply.projections == pytest.approx(golden.tolist(), abs=SLACK)


# ---- held --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "reply", "decode"])
def test_held_replies_are_read_before_and_corrected_after(tiny: Tiny, axis: Axis, positions: Positions) -> None:
    chat = tiny(stop=False)
    ids = prompt(chat, "Who are you, and what are you doing in there?")
    policy = Policy.cap(axis, floors(axis, chat, ids, (1, LAYER, 3)), positions=positions)
    stream, hold = Recording(chat, axis), holding(chat, policy)
    said = ["Who are you, and what are you doing in there?"]
    spans: list[tuple[int, int]] = []
    for n in range(3):
        ids = prompt(chat, *said)
        reply = stream.reply(ids, GREEDY, f"turn {n}", hold=hold, replies=spans)
        before, after, logits = held_outputs(chat, policy, [*ids, *reply.token_ids[:-1]], len(ids), spans)
        assert torch.allclose(torch.stack(stream.logits), logits[len(ids) - 1 :], atol=SLACK)
        golden = axis.project(before[LAYER], LAYER)[len(ids) :]
        assert reply.projections == pytest.approx(golden.tolist(), abs=SLACK)
        for layer in policy.layers:
            changed = (before[layer] != after[layer]).any(-1)[len(ids) :].tolist()
            assert list(reply.corrected[layer]) == changed
            assert reply.share_corrected(layer) == pytest.approx(sum(changed) / len(changed))
        assert 0 < (reply.share_corrected() or 0) <= 1
        assert reply.record is not None
        spans.append((len(ids), len(ids) + len(chat.tokenizer(reply.text)["input_ids"])))
        said += [reply.text, "And then?"]
        assert (reply.kept_tokens > 0) == (n > 0)
        if positions == "decode" and n:  # what was generated is given from now on, which this policy does not mean
            assert reply.kept_tokens <= spans[n - 1][0]


def test_keys_of_another_intervention_are_not_used(tiny: Tiny, axis: Axis) -> None:
    chat = tiny(stop=False)
    away = Hold((1,), lambda: steer(chat, axis, 1, -20.0))
    toward = Hold((1,), lambda: steer(chat, axis, 1, 20.0))
    ids = prompt(chat, "Who are you?")
    stream = Recording(chat, axis)
    for hold in (None, away, toward, away, None):
        reply = stream.reply(ids, GREEDY, "a", hold=hold)
        fresh = Recording(chat, axis)
        fresh.reply(ids, GREEDY, "a", hold=hold)
        assert reply.kept_tokens == 0
        assert torch.equal(torch.stack(stream.logits), torch.stack(fresh.logits))
        assert stream.reply(ids, GREEDY, "a", hold=hold).kept_tokens == len(ids) - 1


def test_a_layer_that_is_not_there_is_refused(tiny: Tiny, axis: Axis) -> None:
    chat = tiny()
    with pytest.raises(UsageError, match=r"Layers \(9,\) are to be held; the model has 0 to 3"):
        ReplyStream(chat, axis).reply(prompt(chat, "Hm?"), GREEDY, "a", hold=Hold((9,), lambda: steer(chat, axis)))
    with pytest.raises(UsageError, match=r"has width 16 and is read at layer 0; tiny llama has width 32"):
        ReplyStream(chat, Axis(torch.ones(1, 16), (0,), 0))


# ---- ends --------------------------------------------------------------------------------------------------------


def test_interrupted_the_last_token_does_not_count(tiny: Tiny, axis: Axis) -> None:
    chat = tiny(stop=False)
    ids = prompt(chat, "Who are you?")
    stream = ReplyStream(chat, axis)
    whole = stream.reply(ids, GREEDY, "a")
    asked = iter([False] * 5)
    cut = stream.reply(ids, GREEDY, "a", stopped=lambda: next(asked, True))
    assert (cut.ended, cut.token_ids) == ("interrupted", whole.token_ids[:5])
    assert cut.projections == pytest.approx(whole.projections[:4], abs=SLACK)
    nothing = stream.reply(ids, GREEDY, "a", stopped=lambda: True)
    assert (nothing.token_ids, nothing.projection, nothing.text) == ((), None, "")
    assert stream.reply(ids, GREEDY, "a").token_ids == whole.token_ids


def test_after_an_exception_nothing_is_kept(tiny: Tiny, axis: Axis) -> None:
    chat = tiny(stop=False)
    ids = prompt(chat, "Who are you?")
    stream = ReplyStream(chat, axis)
    whole = stream.reply(ids, GREEDY, "a")

    def broken(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.reply(ids, GREEDY, "a", on_text=broken)
    again = stream.reply(ids, GREEDY, "a")
    assert (again.kept_tokens, again.token_ids) == (0, whole.token_ids)
    assert not any(block._forward_hooks for block in chat.blocks)


def test_the_context_is_the_limit(tiny: Tiny, axis: Axis) -> None:
    chat = tiny(stop=False)
    stream = ReplyStream(chat, axis)
    assert stream.context_tokens == 512
    ids = prompt(chat, "x")
    full = stream.reply((*ids, *[9] * (508 - len(ids))), GREEDY, "a")
    assert (full.ended, len(full.token_ids)) == ("context", 4)
    with pytest.raises(UsageError, match="has 512 tokens, and the model's context 512"):
        stream.reply((*ids, *[9] * (512 - len(ids))), GREEDY, "a")


def test_damaged_weights_are_an_error(tiny: Tiny, axis: Axis) -> None:
    chat = tiny(fresh=True)
    chat.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="reply 'a'"):
        ReplyStream(chat, axis).reply(prompt(chat, "Hm?"), GREEDY, "a")
