"""The decoding loop: generation with capture in the same pass.

Contract:

1. All prompt tokens but the last are prefilled; the last is the first decoding step's input, so logits always
   come from the model's own forward over one token per sequence.
2. A decoding step's block outputs are the residuals of the tokens that were its *input*. They are added to the
   slot's float32 sums; the sums are zeroed after the step that consumed the prompt's last token, and again after
   the one that consumed the end of a thinking block. What remains are the reply's content tokens.
3. A sampled stop token ends the sequence at once and is never an input: it never counts. Neither does the last
   token of a reply cut by the limit.
4. Sequences are independent: own slot, own positions, own random stream. Refilling, moving between slots and
   batch size change nothing but rounding.
5. A shared prefix is prefilled once and copied; it is kept while the queue may still use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from persona_axis.errors import NonFiniteError
from persona_axis.model.attention import causal_mask, slot_attention_enabled
from persona_axis.model.engine import FinishReason, OnTokens, Reply, Request, Sampling, nobody, random_stream
from persona_axis.model.head import Head
from persona_axis.model.layers import main_device, tapped, text_decoder
from persona_axis.model.loading import ChatModel
from persona_axis.model.prefill import Prefiller
from persona_axis.model.sampling import sample
from persona_axis.model.tokens import GENERATED, GIVEN, Announcement, announced, marked, stretches

MAX_SLOTS = 256  # more rows per step than this gain nothing on the machines measured
PREFILL_ROWS = 64  # sequences prefilled in one forward
BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1, to which float64 just below 1 would round


@dataclass(slots=True)
class _Sequence:
    """A sequence being generated, in some slot."""

    request: Request
    uniforms: np.ndarray  # float64 [max_tokens]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    n_counted: int = 0
    content_start: int = 0
    thinking: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and reply so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def last_token(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]


class DecodingLoop:
    """Generates for one model. Implements :class:`~persona_axis.model.engine.Engine`."""

    name = "loop"

    def __init__(self, chat: ChatModel, layers: tuple[int, ...], batch_tokens: int, capture: bool = True) -> None:
        """
        Args:
            chat: the loaded model.
            layers: decoder blocks to capture, ascending.
            batch_tokens: positions of key/value storage, shared by the sequences in flight.
            capture: False generates without reading activations.
        """
        self.chat = chat
        self.layers = layers
        self.batch_tokens = batch_tokens
        self.capture = capture

    def close(self) -> None:
        """It holds nothing of its own between replies."""

    @torch.inference_mode()
    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: OnTokens = nobody
    ) -> Iterator[Reply]:
        """Replies as they finish. ``requests`` is read lazily, one batch ahead of what is in flight."""
        run = _Run(self, sampling, on_tokens)
        yield from run.replies(iter(requests))


class _Run:
    """State of one `generate` call."""

    def __init__(self, loop: DecodingLoop, sampling: Sampling, on_tokens: OnTokens) -> None:
        self.loop = loop
        self.on_tokens = on_tokens
        self.chat = loop.chat
        self.sampling = sampling
        self.decoder = text_decoder(loop.chat.model)
        self.head = Head(loop.chat.model)
        self.device = main_device(loop.chat.model)
        self.active: list[_Sequence] = []
        self.waiting: list[Request] = []
        self.prefiller = Prefiller(self.chat)
        self.cache = self.prefiller.cache
        self.longest = 1
        self.counting = False  # a decoding step is running: hooks add to the sums
        self.sums: list[Tensor] = []  # per captured layer [slots, d_model] float32, on the layer's device

    # ---- the loop ---------------------------------------------------------------------------------------

    def replies(self, queue: Iterator[Request]) -> Iterator[Reply]:
        self._fetch(queue)
        while self.waiting or self.active:
            finished: list[Reply] = []
            # Left before yielding: the model is plain again while the caller holds control.
            with self._armed():
                while not finished and (self.waiting or self.active):
                    self._admit(queue)
                    finished = self._step()
            yield from finished

    @contextmanager
    def _armed(self) -> Iterator[None]:
        """The model with slot attention and capture hooks."""
        with ExitStack() as stack:
            stack.enter_context(slot_attention_enabled(self.decoder))
            if self.loop.capture:
                blocks = [self.chat.blocks[layer] for layer in self.loop.layers]
                stack.enter_context(tapped(blocks, self.add_hidden))
            yield

    def _fetch(self, queue: Iterator[Request]) -> None:
        """Keep a batch's worth of requests at hand."""
        while len(self.waiting) < MAX_SLOTS:
            request = next(queue, None)
            if request is None:
                return
            if len(request.prompt_ids) < 1:
                raise ValueError(f"Request {request.key} has an empty prompt.")
            self.waiting.append(request)

    def _admit(self, queue: Iterator[Request]) -> None:
        """Start waiting requests when enough room is free to make a prefill worth its overhead."""
        room = self._room()
        if not self.waiting or room < min(len(self.waiting), max(1, (room + len(self.active)) // 8)):
            return
        while self.waiting and room > 0:
            batch = self.waiting[: min(room, PREFILL_ROWS)]
            del self.waiting[: len(batch)]
            self._start(batch)
            self._fetch(queue)
            room = self._room()

    def _room(self) -> int:
        """Sequences that may still start."""
        return self._slots() - len(self.active)

    def _slots(self) -> int:
        """Sequences that fit the token budget, given the longest one known."""
        known = (len(r.prompt_ids) + self.sampling.max_tokens for r in self.waiting)
        self.longest = max([self.longest, *known])
        return max(1, min(MAX_SLOTS, self.loop.batch_tokens // self.longest))

    def _start(self, batch: list[Request]) -> None:
        first = len(self.active)
        self._reserve(first + len(batch))
        self.prefiller.fill(
            first,
            [r.prompt_ids[:-1] for r in batch],
            [min(r.shared_prefix, len(r.prompt_ids) - 1) for r in batch],
            [marked(r.replies, GIVEN) for r in batch],
        )
        for request in batch:
            uniforms = random_stream(self.sampling.seed, request.key, self.sampling.max_tokens)
            self.active.append(_Sequence(request, uniforms, thinking=self.chat.opens_thinking(request.prompt_ids)))

    def _reserve(self, slots: int) -> None:
        """Make storage for this many slots; all that the queue will fill, at once."""
        if slots <= self.cache.slots and self.longest <= self.cache.capacity:
            return
        slots = max(slots, min(self._slots(), slots + len(self.waiting)))
        self.cache.resize(slots, self.longest)
        self.sums = [_resized(total, slots) for total in self.sums]

    # ---- one decoding step ------------------------------------------------------------------------------

    def _step(self) -> list[Reply]:
        logits = self._forward()
        step = [len(s.token_ids) for s in self.active]
        uniforms = torch.tensor(
            [s.uniforms[i] for s, i in zip(self.active, step, strict=True)], dtype=torch.float32
        ).clamp_(max=BELOW_ONE)
        uniforms = uniforms.to(logits.device)
        tokens, logprobs = sample(logits, uniforms, self.sampling.temperature, self.sampling.top_p)
        self._account_for_inputs()
        self.on_tokens(len(self.active))
        finished: list[tuple[int, FinishReason]] = []
        for slot, (s, token, logprob) in enumerate(zip(self.active, tokens.tolist(), logprobs.tolist(), strict=True)):
            s.token_ids.append(token)
            s.logprobs.append(logprob)
            s.thinking |= len(s.token_ids) == 1 and token == self.chat.think_start_id
            if token in self.chat.stop_ids:
                finished.append((slot, "stop"))
            elif len(s.token_ids) == self.sampling.max_tokens:
                finished.append((slot, "length"))
        replies = [self._reply(slot, reason) for slot, reason in finished]
        self._release([slot for slot, _ in finished])
        return replies

    def _forward(self) -> Tensor:
        """One token per active sequence; returns logits ``[n, vocabulary]``."""
        lengths = [s.length - 1 for s in self.active]  # tokens already stored
        positions = torch.tensor(lengths, device=self.device)
        width = max(lengths) + 1
        self.cache.begin_decode(positions, width)
        ids = torch.tensor([s.last_token for s in self.active], device=self.device)
        self.counting = True
        try:
            with announced(Announcement(self._kinds)):
                out = self.decoder(
                    input_ids=ids[:, None],
                    attention_mask=causal_mask(positions[:, None], width),
                    position_ids=positions[:, None],
                    past_key_values=self.cache,
                    use_cache=True,
                )
        finally:
            self.counting = False
        return self.head.logits(out.last_hidden_state[:, -1])

    def _kinds(self, *_: int) -> Tensor:
        """A sequence's first step reads the prompt's last token, which can be part of a reply that was begun."""
        marks = [
            (*marked(s.request.replies, GIVEN), (len(s.request.prompt_ids), s.length, GENERATED)) for s in self.active
        ]
        return stretches([s.length - 1 for s in self.active], [1] * len(marks), marks)

    def add_hidden(self, i: int, hidden: Tensor) -> None:
        """Hook: add a decoding step's residuals ``[n, 1, d_model]`` to the captured layer's sums."""
        if not self.counting:
            return
        while len(self.sums) <= i:
            self.sums.append(torch.zeros(self.cache.slots, hidden.shape[-1], dtype=torch.float32, device=hidden.device))
        self.sums[i][: hidden.shape[0]].add_(hidden[:, 0])

    def _account_for_inputs(self) -> None:
        """Decide which of this step's inputs count, and forget the sums of those that do not."""
        uncounted = []
        for slot, s in enumerate(self.active):
            if not s.token_ids:  # the prompt's last token
                uncounted.append(slot)
            elif s.thinking:
                s.thinking = s.last_token != self.chat.think_end_id
                s.content_start = len(s.token_ids)
                uncounted.append(slot)
            else:
                s.n_counted += 1
        if uncounted:
            index = torch.tensor(uncounted)
            for total in self.sums:
                total[index.to(total.device)] = 0

    def _reply(self, slot: int, reason: FinishReason) -> Reply:
        s = self.active[slot]
        if s.thinking:  # cut inside the thinking block
            s.content_start = len(s.token_ids)
        activation = None
        if self.loop.capture and s.n_counted > 0:
            with torch.inference_mode(False):  # a tensor like any other: the caller may change it
                activation = torch.stack([total[slot].to("cpu") for total in self.sums]) / s.n_counted
            check_finite(activation, self.loop.layers, s.request.key)
        if not np.isfinite(s.logprobs).all():
            raise non_finite_logits(s.request.key)
        return Reply(
            key=s.request.key,
            token_ids=np.array(s.token_ids, dtype=np.int32),
            logprobs=np.array(s.logprobs, dtype=np.float32),
            finish_reason=reason,
            n_counted=s.n_counted,
            content_start=s.content_start,
            activation=activation,
        )

    def _release(self, finished: list[int]) -> None:
        """Close the holes: the last active sequences move into the freed slots."""
        if not finished:
            return
        gone = set(finished)
        n = len(self.active) - len(finished)
        holes = [i for i in range(n) if i in gone]
        movers = [i for i in range(n, len(self.active)) if i not in gone]
        for hole, mover in zip(holes, movers, strict=True):
            self.active[hole] = self.active[mover]
        del self.active[n:]
        if movers:
            source, target = torch.tensor(movers), torch.tensor(holes)
            self.cache.move(source.to(self.device), target.to(self.device))
            for total in self.sums:
                total[target.to(total.device)] = total[source.to(total.device)]


def _resized(total: Tensor, slots: int) -> Tensor:
    new = total.new_zeros(slots, total.shape[1])
    n = min(slots, len(total))
    new[:n] = total[:n]
    return new


def check_finite(activation: Tensor, layers: tuple[int, ...], key: str) -> None:
    """Raise when an activation ``[n_captured, d_model]`` holds NaN or infinity.

    Raises:
        NonFiniteError: names the first layer and the rollout.
    """
    if bool(activation.isfinite().all()):
        return
    bad = [layer for layer, row in zip(layers, activation, strict=True) if not bool(row.isfinite().all())]
    raise NonFiniteError(
        f"Rollout {key} has NaN or infinite activations, first at layer {bad[0]} (of {len(bad)} such layers). "
        + OVERFLOW
    )


def non_finite_logits(key: str) -> NonFiniteError:
    """The error for a rollout whose captured layers are finite and whose logits are not."""
    return NonFiniteError(f"Rollout {key} has NaN or infinite logits; its captured layers are finite. {OVERFLOW}")


OVERFLOW = "The model overflows in this dtype or its weights are damaged: try --dtype float32 or bfloat16."
