"""A conversation that goes on: messages, replies as they are made, and what holds the model meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from persona_axis.catalog.transcripts import Transcript
from persona_axis.errors import TemplateError
from persona_axis.model.chat import ChatTemplate, Message
from persona_axis.model.engine import Sampling
from persona_axis.model.streaming import Hold, ReplyStream, StreamedReply
from persona_axis.model.tokens import Span


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A user's message, the reply, and whether the model was held while it was made."""

    text: str
    reply: StreamedReply
    held: bool


class Dialogue:
    """One conversation with one model.

    Attributes:
        system: the system prompt; may change between turns, "" is none.
        hold: what intervenes in the next reply; None is the plain model.
        turns: so far.
    """

    def __init__(self, stream: ReplyStream, sampling: Sampling, system: str = "", hold: Hold | None = None) -> None:
        self.stream = stream
        self.sampling = sampling
        self.system = system
        self.hold = hold
        self.turns: list[Turn] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        said = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            said += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": turn.reply.text}]
        return said

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.turns.clear()

    def say(self, text: str, on_text: Callable[[str], None], stopped: Callable[[], bool]) -> StreamedReply:
        """The reply to a user's message; both become part of the conversation unless nothing was said.

        Args:
            text: the message.
            on_text, stopped: as :meth:`ReplyStream.reply` takes them.

        Raises:
            TemplateError: the template refuses the conversation.
            UsageError: there is no room left in the model's context.
            NonFiniteError: NaN or infinity on the way.
        """
        template, messages = self.stream.chat.template, [*self.messages, {"role": "user", "content": text}]
        prompt_ids = template.prompt_ids(messages)
        by_turn = self.hold is not None and self.hold.positions == "reply"
        reply = self.stream.reply(
            prompt_ids,
            self.sampling,
            f"turn {len(self.turns)}",
            hold=self.hold,
            replies=reply_spans(template, messages, prompt_ids) if by_turn else (),
            on_text=on_text,
            stopped=stopped,
        )
        if reply.token_ids:
            self.turns.append(Turn(text, reply, self.hold is not None))
        return reply

    def transcript(self, steering: Mapping[str, Any] | None) -> Transcript:
        """The conversation so far; ``steering`` says what held the model in the turns that were held."""
        held = [turn.held for turn in self.turns]
        return Transcript(
            messages=tuple(self.messages),
            model=self.stream.chat.name,
            steering=steering if any(held) else None,
            turns=len(self.turns),
            extra={
                "layer": self.stream.layer,
                "projections": [turn.reply.projection for turn in self.turns],
                "held": held,
            },
        )


def reply_spans(template: ChatTemplate, messages: Sequence[Message], prompt_ids: Sequence[int]) -> tuple[Span, ...]:
    """Assistant turns among a prompt's tokens.

    Raises:
        TemplateError: they cannot be proven.
    """
    whole = template.tokenise(messages)
    spans = tuple((s.start, s.end) for s in whole.segments if s.role == "assistant")
    end = max((end for _, end in spans), default=0)
    if tuple(prompt_ids[:end]) != whole.token_ids[:end]:
        raise TemplateError(
            "This chat template renders earlier replies otherwise when another is to follow, so which tokens are "
            "theirs cannot be proven. Use a policy for positions 'all' or 'decode'."
        )
    return spans
