"""One reply at a time, token by token, with each token's projection on an axis: what a chat at the terminal needs.

Contract:

1. The prompt is prefilled but for its last token, without the language-model head; from there on every forward reads
   one token, and its logits are the model's own.
2. A token's projection is taken where the token is the input, before the intervention of its layer and after those of
   earlier layers. The reply's is the mean over its content tokens: not the prompt, not thinking, not the end of turn,
   nor a last token that was never an input (cut by a limit, or interrupted).
3. Keys and values serve the next reply as far as its tokens are the same, the same :class:`Hold` (or none) is in
   force, and it means the same tokens: under positions ``decode`` a reply that was generated is given from then on.
   Where a model's cache cannot be cut back (a full sliding window, convolution state), it is filled anew.
4. After an exception nothing is kept.
5. Tokens are drawn as in the decoding loop: the stream of (seed, key), the same numbers whatever holds the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from persona_axis.errors import ModelError, NonFiniteError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.decode import BELOW_ONE, OVERFLOW
from persona_axis.model.engine import Sampling, random_stream
from persona_axis.model.fallback import content_start
from persona_axis.model.layers import main_device, tapped, text_config, text_decoder
from persona_axis.model.loading import ChatModel
from persona_axis.model.sampling import sample
from persona_axis.model.tokens import Span, announced, continuing

Ended = Literal["stop", "length", "context", "interrupted"]  # context: no room left in the model's context


@dataclass(frozen=True, eq=False)
class Hold:
    """Interventions as a stream sees them. One object per intervention: keys are kept under the same object only.

    Attributes:
        layers: where they act.
        enter: makes a context manager in which the model is intervened on; what it yields is kept with the reply.
        positions: which tokens are meant, as a policy says it.
    """

    layers: tuple[int, ...]
    enter: Callable[[], AbstractContextManager[Any]]
    positions: Literal["all", "reply", "decode"] = "all"


@dataclass(frozen=True, slots=True, eq=False)
class StreamedReply:
    """A reply and where its tokens lay.

    Attributes:
        token_ids: as generated, the end-of-turn token included when there was one.
        text: its content.
        ended: why it ended.
        projections: of each counted token, at the stream's layer.
        corrected: by held layer, which counted tokens its interventions changed.
        record: what entering the :class:`Hold` gave; None when nothing held the model.
        prompt_tokens, kept_tokens: of the prompt, and how many of these needed no computing.
    """

    token_ids: tuple[int, ...]
    text: str
    ended: Ended
    projections: tuple[float, ...]
    corrected: dict[int, tuple[bool, ...]]
    record: Any
    prompt_tokens: int
    kept_tokens: int

    @property
    def n_counted(self) -> int:
        return len(self.projections)

    @property
    def projection(self) -> float | None:
        """Mean over the counted tokens; None when there is none."""
        return math.fsum(self.projections) / self.n_counted if self.projections else None

    def share_corrected(self, layer: int | None = None) -> float | None:
        """Share of the counted tokens that a held layer changed (None: any of them); None without tokens or layers."""
        rows = list(self.corrected.values()) if layer is None else [self.corrected[layer]]
        if not rows or not self.projections:
            return None
        return sum(map(any, zip(*rows, strict=True))) / self.n_counted


def _silent(text: str) -> None:
    pass


def _never() -> bool:
    return False


class ReplyStream:
    """Replies of one model, read on one layer of an axis; keys and values are kept from one to the next."""

    def __init__(self, chat: ChatModel, axis: Axis, layer: int | None = None) -> None:
        """
        Args:
            chat: the loaded model.
            axis: what replies are read on.
            layer: the decoder block they are read at; None is the axis's analysed layer.

        Raises:
            UsageError: the axis lacks that layer, or does not fit the model.
        """
        self.chat = chat
        self.axis = axis
        self.layer = axis.layer if layer is None else layer
        width = len(axis.at(self.layer))
        if width != chat.d_model or self.layer >= chat.n_layers:
            raise UsageError(
                f"This axis has width {width} and is read at layer {self.layer}; {chat.name} has width {chat.d_model} "
                f"and layers 0 to {chat.n_layers - 1}. Load the model that it was made on."
            )
        self.decoder = text_decoder(chat.model)
        self.device = main_device(chat.model)
        self._kept = _Kept()

    @property
    def context_tokens(self) -> int | None:
        """How many tokens a conversation may have; None when the model does not say."""
        return getattr(text_config(self.chat.model), "max_position_embeddings", None)

    def forget(self) -> None:
        """Drop keys and values."""
        self._kept = _Kept()

    @torch.inference_mode()
    def reply(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        key: str,
        *,
        hold: Hold | None = None,
        replies: Sequence[Span] = (),
        on_text: Callable[[str], None] = _silent,
        stopped: Callable[[], bool] = _never,
    ) -> StreamedReply:
        """Generate one reply.

        Args:
            prompt_ids: the conversation up to where the reply starts.
            sampling: how tokens are drawn.
            key: names the reply; with the seed it decides the random numbers.
            hold: what intervenes; None is the plain model.
            replies: assistant turns among the prompt's tokens; needed for positions ``reply``.
            on_text: told each piece of content, as soon as it is whole characters.
            stopped: asked before every token; True ends the reply there.

        Raises:
            UsageError: the prompt leaves no room in the model's context.
            NonFiniteError: NaN or infinity in a projection or in the logits.
            ModelError: the model keeps no key/value cache.
        """
        made = _Made(tuple(prompt_ids), self._limit(len(prompt_ids), sampling.max_tokens))
        taps = _Taps(self, hold)
        said = announced(continuing(len(prompt_ids), replies))
        with self._keeping(made, hold, replies) as kept_tokens, taps.entered() as record, said:
            self._generate(made, taps, sampling, key, on_text, stopped)
        counted = made.read[content_start(self.chat, made.prompt_ids, made.token_ids) :]
        if not all(math.isfinite(p) for p, _ in counted):
            raise NonFiniteError(f"A token of reply {key!r} has a projection that is NaN or infinite. {OVERFLOW}")
        return StreamedReply(
            token_ids=tuple(made.token_ids),
            text=made.text(self.chat),
            ended=made.ended,
            projections=tuple(p for p, _ in counted),
            corrected={layer: tuple(changed[layer] for _, changed in counted) for layer in taps.held},
            record=record,
            prompt_tokens=len(made.prompt_ids),
            kept_tokens=kept_tokens,
        )

    def _generate(
        self,
        made: _Made,
        taps: _Taps,
        sampling: Sampling,
        key: str,
        on_text: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        uniforms = random_stream(sampling.seed, key, made.limit)
        self._prefill(made.prompt_ids[self._kept.length : -1])
        while made.goes_on(sampling.max_tokens) and not stopped():
            logits = self._read(made.last_token)
            if made.token_ids:
                made.read.append((taps.projection(), taps.changed()))
            uniform = torch.tensor([uniforms[len(made.token_ids)]], dtype=torch.float32).clamp_(max=BELOW_ONE)
            token, logprob = sample(logits, uniform.to(logits.device), sampling.temperature, sampling.top_p)
            if not math.isfinite(float(logprob)):
                raise NonFiniteError(f"The logits of reply {key!r} are NaN or infinite. {OVERFLOW}")
            made.add(int(token), self.chat, on_text)

    def _limit(self, prompt_tokens: int, max_tokens: int) -> int:
        """Tokens that the reply may have."""
        context = self.context_tokens
        if context is None:
            return max_tokens
        if prompt_tokens >= context:
            raise UsageError(
                f"The conversation has {prompt_tokens:,} tokens, and the model's context {context:,}: there is no room "
                "for a reply. Start a new one, or ask less."
            )
        return min(max_tokens, context - prompt_tokens)

    @contextmanager
    def _keeping(self, made: _Made, hold: Hold | None, replies: Sequence[Span]) -> Iterator[int]:
        """Cut what is kept back to what serves this prompt; yields how many tokens that is."""
        meant = _meant(made.prompt_ids, hold, replies)
        kept = self._kept.length if hold is self._kept.hold else 0
        shared = 0
        while shared < min(kept, len(made.prompt_ids) - 1) and (
            self._kept.ids[shared] == made.prompt_ids[shared] and self._kept.meant[shared] == meant[shared]
        ):
            shared += 1
        self._kept = self._kept.cut(shared) or _Kept()
        self._kept.hold = hold
        try:
            yield self._kept.length
        except BaseException:
            self.forget()
            raise
        self._kept.meant = (meant + [True] * len(made.token_ids))[: self._kept.length]

    def _prefill(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._forward(self.decoder, token_ids)

    def _read(self, token: int) -> Tensor:
        """Logits ``[1, vocabulary]`` after one more token."""
        return self._forward(self.chat.model, [token]).logits[:, -1]

    def _forward(self, module: Any, token_ids: Sequence[int]) -> Any:
        ids = torch.tensor([list(token_ids)], device=self.device)
        out = module(input_ids=ids, past_key_values=self._kept.cache, use_cache=True)
        self._kept.cache = getattr(out, "past_key_values", None)
        if self._kept.cache is None:
            raise ModelError(f"{type(self.chat.model).__name__} keeps no key/value cache; a chat needs one.")
        self._kept.ids.extend(token_ids)
        return out


@dataclass
class _Kept:
    """Keys and values of tokens that were read, and what they depend on."""

    cache: Any = None
    ids: list[int] = field(default_factory=list)
    meant: list[bool] = field(default_factory=list)  # whether the hold's interventions were for that token
    hold: Hold | None = None

    @property
    def length(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> _Kept | None:
        """The first ``length`` tokens; None when there is none, or the cache cannot go back."""
        if not length:
            return None
        if length < self.length:
            try:
                self.cache.crop(length - self.length)
            except (RuntimeError, ValueError, AttributeError):  # as Transformers' cache layers refuse it
                return None
        return _Kept(self.cache, self.ids[:length], self.meant[:length], self.hold)


@dataclass
class _Made:
    """A reply under way."""

    prompt_ids: tuple[int, ...]
    limit: int
    token_ids: list[int] = field(default_factory=list)
    read: list[tuple[float, dict[int, bool]]] = field(default_factory=list)  # of every reply token but the last
    ended: Ended = "interrupted"
    told: str = ""

    @property
    def last_token(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    def goes_on(self, max_tokens: int) -> bool:
        if self.ended == "interrupted" and len(self.token_ids) == self.limit:
            self.ended = "length" if self.limit == max_tokens else "context"
        return self.ended == "interrupted"

    def add(self, token: int, chat: ChatModel, on_text: Callable[[str], None]) -> None:
        self.token_ids.append(token)
        if token in chat.stop_ids:
            self.ended = "stop"
        text = self.text(chat)
        # A character of several tokens decodes to a replacement until it is whole; a decoder may still change a space.
        last = self.ended == "stop" or len(self.token_ids) == self.limit
        if text.startswith(self.told) and (last or not text.endswith("\ufffd")):
            on_text(text[len(self.told) :])
            self.told = text

    def text(self, chat: ChatModel) -> str:
        start = content_start(chat, self.prompt_ids, self.token_ids)
        return chat.decode(self.token_ids[start : len(self.token_ids) - (self.ended == "stop")])


def _meant(prompt_ids: Sequence[int], hold: Hold | None, replies: Sequence[Span]) -> list[bool]:
    """For each token of a prompt whether the interventions are for it."""
    if hold is None or hold.positions == "all":
        return [True] * len(prompt_ids)
    meant = [False] * len(prompt_ids)
    if hold.positions == "reply":
        for start, end in replies:
            meant[start:end] = [True] * (end - start)
    return meant


class _Taps:
    """Reads the stream's layer before interventions, and the held layers before and after."""

    def __init__(self, stream: ReplyStream, hold: Hold | None) -> None:
        self.stream = stream
        self.hold = hold
        self.held = hold.layers if hold is not None else ()
        if any(not 0 <= layer < stream.chat.n_layers for layer in self.held):
            raise UsageError(f"Layers {self.held} are to be held; the model has 0 to {stream.chat.n_layers - 1}.")
        self.layers = tuple(sorted({stream.layer, *self.held}))
        self.before: dict[int, Tensor] = {}  # [d_model], of the latest token
        self.after: dict[int, Tensor] = {}

    @contextmanager
    def entered(self) -> Iterator[Any]:
        """Hooks that are registered later see what earlier ones changed, so the order is the meaning."""
        blocks = self.stream.chat.blocks
        with ExitStack() as stack:
            stack.enter_context(tapped([blocks[layer] for layer in self.layers], self._see_before))
            record = stack.enter_context(self.hold.enter()) if self.hold is not None else None
            stack.enter_context(tapped([blocks[layer] for layer in self.held], self._see_after))
            yield record

    def _see_before(self, i: int, hidden: Tensor) -> None:
        self.before[self.layers[i]] = hidden[0, -1]

    def _see_after(self, i: int, hidden: Tensor) -> None:
        self.after[self.held[i]] = hidden[0, -1]

    def projection(self) -> float:
        return float(self.stream.axis.project(self.before[self.stream.layer], self.stream.layer))

    def changed(self) -> dict[int, bool]:
        return {layer: not torch.equal(self.before[layer], self.after[layer]) for layer in self.held}
