"""A conversation that goes on: what is said, what is kept of it, and which tokens are replies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from persona_axis.errors import TemplateError
from persona_axis.geometry.axis import Axis
from persona_axis.model.dialogue import Dialogue, reply_spans
from persona_axis.model.engine import Sampling
from persona_axis.model.loading import ChatModel
from persona_axis.model.streaming import Hold, ReplyStream
from persona_axis.steering.hooks import steer

Tiny = Callable[..., ChatModel]


@pytest.fixture
def stream(tiny: Tiny) -> ReplyStream:
    return ReplyStream(tiny(stop=False), Axis(torch.eye(4, 32) + 1, (0, 1, 2, 3), 2))


def say(dialogue: Dialogue, text: str) -> str:
    return dialogue.say(text, lambda piece: None, lambda: False).text


def test_turns_follow_one_another(stream: ReplyStream) -> None:
    away = Hold((1,), lambda: steer(stream.chat, stream.axis, 1, -9.0))
    dialogue = Dialogue(stream, Sampling(4, temperature=0), "Be brief.", away)
    first = say(dialogue, "One?")
    dialogue.hold = None
    second = say(dialogue, "Two?")
    assert [m["content"] for m in dialogue.messages] == ["Be brief.", "One?", first, "Two?", second]
    transcript = dialogue.transcript({"strength": -9.0})
    assert (transcript.turns, transcript.model) == (2, "tiny llama")
    assert transcript.steering == {"strength": -9.0}
    assert transcript.extra["held"] == [True, False]
    assert transcript.extra["projections"] == [turn.reply.projection for turn in dialogue.turns]
    dialogue.reset()
    dialogue.system = ""
    assert dialogue.messages == []
    say(dialogue, "One?")
    assert dialogue.transcript({"strength": -9.0}).steering is None


def test_what_was_not_answered_is_not_part_of_it(stream: ReplyStream) -> None:
    dialogue = Dialogue(stream, Sampling(4, temperature=0))
    assert dialogue.say("One?", lambda piece: None, lambda: True).token_ids == ()
    with pytest.raises(TemplateError, match="control token"):
        say(dialogue, "Two <|im_end|>?")
    assert dialogue.messages == []


def test_replies_are_found_among_the_tokens_of_a_prompt(tiny: Tiny) -> None:
    chat = tiny()
    said = [("system", "Be kind."), ("user", "Hm?"), ("assistant", "Yes."), ("user", "Oh."), ("assistant", "No, no.")]
    messages = [{"role": role, "content": text} for role, text in [*said, ("user", "Well?")]]
    ids = chat.template.prompt_ids(messages)
    spans = reply_spans(chat.template, messages, ids)
    assert [chat.decode(ids[a:b]) for a, b in spans] == ["Yes.", "No, no."]
    assert reply_spans(chat.template, messages[:2], chat.template.prompt_ids(messages[:2])) == ()


def test_replies_that_a_template_moves_are_not_guessed(tiny: Tiny) -> None:
    chat = tiny()
    messages = [{"role": role, "content": "Yes."} for role in ("user", "assistant", "user")]
    with pytest.raises(TemplateError, match="cannot be proven"):
        reply_spans(chat.template, messages, (5, *chat.template.prompt_ids(messages)))
