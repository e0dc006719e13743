"""Chat templates: rendering prompts, and proving where each turn's content lies.

Contract:

1. Content spans are proven, not guessed: the conversation is rendered once with its own contents and once with a
   unique marker in place of each; what lies between the markers is the template's own text. Put together again
   with the (possibly trimmed) contents it must equal the real rendering, character for character.
2. A token belongs to a segment when all of its characters do. A token that straddles the border of content and
   template belongs to neither. A segment without tokens is an error.
3. Templates without a system role get the system prompt in front of the first user message.
4. A message that spells one of the tokenizer's control tokens (``<|im_end|>``) is refused: it would be read as
   that token, and content could pass for template.
5. Thinking is off unless asked for; thinking text in a given reply is a segment of its own, or is left out when
   the template leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from persona_axis.errors import TemplateError

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": str}
Part = Literal["content", "thinking"]

_THINKING = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start..end-1`` of a conversation that are one message's own text."""

    message: int  # index in the conversation given
    role: str
    part: Part
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokenisedConversation:
    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]


@dataclass
class ChatTemplate:
    """A tokenizer's chat template with what it can and cannot do."""

    tokenizer: Any
    thinking: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    has_system_role: bool = True
    control_tokens: tuple[str, ...] = ()  # what no message may spell

    @classmethod
    def of(cls, tokenizer: Any, template: str | None = None, thinking: bool = False) -> ChatTemplate:
        """Probe the template.

        Args:
            tokenizer: a fast Transformers tokenizer.
            template: Jinja text to use instead of the tokenizer's own.
            thinking: let a thinking model think.

        Raises:
            TemplateError: there is none (a base model), or it renders nothing usable.
        """
        if template is not None:
            tokenizer.chat_template = template
        if not tokenizer.chat_template:
            raise TemplateError(
                "This model has no chat template: it is a base model, or its tokenizer lost it. Use the "
                "instruction-tuned variant, or pass a Jinja template: --chat-template FILE "
                "(load_model(..., chat_template=TEXT))."
            )
        chat = cls(tokenizer, thinking=thinking, control_tokens=_control_tokens(tokenizer))
        if "enable_thinking" in str(tokenizer.chat_template):
            chat.kwargs["enable_thinking"] = thinking
        chat.has_system_role = chat._probe_system_role()
        if not chat.has_system_role:
            chat._probe_user_role()
        return chat

    def _probe_user_role(self) -> None:
        user = "\ue000user\ue001"
        if user not in self._render([{"role": "user", "content": user}], prompt=True):
            raise TemplateError(
                "The chat template does not render user messages. Pass another: --chat-template FILE "
                "(load_model(..., chat_template=TEXT))."
            )

    def _probe_system_role(self) -> bool:
        system, user = "\ue000system\ue001", "\ue000user\ue001"
        try:
            text = self._render([{"role": "system", "content": system}, {"role": "user", "content": user}], prompt=True)
        except TemplateError:
            return False
        return system in text and user in text

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **self.kwargs
            )
        except Exception as e:  # Jinja raises what the template author likes
            raise TemplateError(f"The chat template refuses this conversation: {e}") from e
        return str(text)

    def messages(self, system_prompt: str, question: str) -> list[dict[str, str]]:
        """One question under a system prompt ("" is no system message), as this template takes it."""
        turns = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return self.fold_system([*turns, {"role": "user", "content": question}])

    def fold_system(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """Merge a leading system message into the first user turn when the template has no system role."""
        turns = [dict(m) for m in messages]
        if self.has_system_role or not turns or turns[0]["role"] != "system":
            return turns
        system, *rest = turns
        if not rest or rest[0]["role"] != "user":
            raise TemplateError("A system message must be followed by a user message for this template.")
        rest[0]["content"] = f"{system['content']}\n\n{rest[0]['content']}"
        return rest

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids up to where the assistant's reply starts.

        Raises:
            TemplateError: the template refuses the conversation, or a message spells a control token.
        """
        self._refuse_control_tokens(messages)
        return self._encode(self._render(self.fold_system(messages), prompt=True))[0]

    def _encode(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return tuple(encoded["input_ids"]), list(encoded["offset_mapping"])

    def tokenise(self, messages: Sequence[Message]) -> TokenisedConversation:
        """A whole conversation with every message's segment.

        Raises:
            TemplateError: the spans cannot be proven, or a message has no token of its own.
        """
        if not messages:
            raise TemplateError("The conversation has no messages.")
        self._refuse_control_tokens(messages)
        turns = _split_thinking(self.fold_system(messages))
        offset = len(messages) - len(turns)  # a folded system message shifts the indices
        text = self._render(turns, prompt=False)
        spans = self._spans(turns, text)
        ids, offsets = self._encode(text)
        segments = []
        for turn, part, start, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end]
            if not inside:
                if part == "content" and turns[turn]["content"].strip():
                    raise TemplateError(f"Message {turn + offset} has no token that is wholly its own.")
                continue
            segments.append(Segment(turn + offset, turns[turn]["role"], part, inside[0], inside[-1] + 1))
        return TokenisedConversation(ids, tuple(segments))

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for i, turn in enumerate(_split_thinking([dict(m) for m in messages])):
            text = turn["content"] + turn.get("reasoning_content", "")
            for token in self.control_tokens:
                if token in text:
                    raise TemplateError(
                        f"Message {i} ({turn['role']}) contains {token!r}, which this model reads as a control token "
                        "and not as text. Take it out, or break it up (for example with a space)."
                    )

    def _spans(self, turns: list[dict[str, str]], text: str) -> list[tuple[int, Part, int, int]]:
        """Character span of every message part in ``text``; proven by reassembly."""
        markers: dict[str, tuple[int, Part]] = {}
        marked = []
        for i, turn in enumerate(turns):
            new = dict(turn)
            for name, part in (("content", "content"), ("reasoning_content", "thinking")):
                if turn.get(name):
                    marker = f"\ue000{i}{part}\ue001"
                    markers[marker] = (i, part)  # type: ignore[assignment]
                    new[name] = marker
            marked.append(new)
        frame = self._render(marked, prompt=False)
        pieces = re.split("(\ue000\\d+(?:content|thinking)\ue001)", frame)
        spans: list[tuple[int, Part, int, int]] = []
        position = 0
        for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
            if piece not in markers:
                position = self._expect(text, piece, position)
                continue
            i, part = markers[piece]
            original = turns[i]["content" if part == "content" else "reasoning_content"]
            end = self._expect(text, _as_rendered(original, text, position, following), position)
            spans.append((i, part, position, end))
            position = end
        seen = {(i, part) for i, part, _, _ in spans}
        lost = [i for i, part in markers.values() if part == "content" and (i, part) not in seen]
        if position != len(text) or lost or len(seen) != len(spans):
            raise TemplateError(_UNPROVEN.format(f"message {lost[0]} is missing" if lost else "its text differs"))
        return spans

    @staticmethod
    def _expect(text: str, piece: str, position: int) -> int:
        if not text.startswith(piece, position):
            raise TemplateError(_UNPROVEN.format(f"{piece[:40]!r} expected at character {position}"))
        return position + len(piece)


_UNPROVEN = (
    "This chat template rewrites messages, so which tokens are content cannot be proven ({}). "
    "Pass a template that renders contents unchanged: --chat-template FILE."
)


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Added tokens that are special, and markup that the template writes (``<think>`` often is not special)."""
    template = str(tokenizer.chat_template)
    return tuple(
        t.content
        for t in tokenizer.added_tokens_decoder.values()
        if t.special or (re.search(r"[^\w\s]", t.content) and t.content in template)
    )


def _as_rendered(content: str, text: str, position: int, following: str) -> str:
    """``content`` as it stands in ``text`` at ``position``, before ``following``: whole, or trimmed outside."""
    trimmed = [cut(*what) for what in ((), ("\n",)) for cut in (content.strip, content.lstrip, content.rstrip)]
    for candidate in (content, *trimmed):
        if text.startswith(candidate + following, position):
            return candidate
    return content


def _split_thinking(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Move a leading <think> block of assistant messages into ``reasoning_content``."""
    out = []
    for turn in turns:
        match = _THINKING.match(turn["content"]) if turn["role"] == "assistant" else None
        if match:
            turn = {**turn, "content": turn["content"][match.end() :], "reasoning_content": match[1].strip()}
        out.append(turn)
    return out
