"""Reading given tokens: segment means of every block's output, and log-probabilities, in one forward.

The decoder runs without its language-model head; block outputs are reduced to per-segment float32 sums inside the
hook, so memory does not grow with tokens times layers. Sequences are sorted by length and padded on the right,
where causal attention keeps padding out of what came before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from persona_axis.errors import TemplateError
from persona_axis.model.attention import slot_attention_enabled
from persona_axis.model.chat import Message, Part
from persona_axis.model.decode import check_finite
from persona_axis.model.head import Head
from persona_axis.model.layers import check_layers, main_device, tapped, text_decoder
from persona_axis.model.loading import ChatModel
from persona_axis.model.prefill import Prefiller
from persona_axis.model.tokens import GENERATED, GIVEN, Announcement, Mark, announced, marked, stretches

READ_TOKENS = 8192  # padded tokens per forward


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids with the spans ``(start, end)`` whose means are wanted."""

    key: str
    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    shared: int = 0  # leading tokens that other passages share; scoring computes them once
    replies: tuple[tuple[int, int], ...] = ()  # assistant turns among the tokens, beside what is scored


@dataclass(frozen=True, slots=True, eq=False)
class TurnReading:
    """One message's own tokens, read by the model."""

    message: int  # index in the conversation given
    role: str
    part: Part
    n_tokens: int
    activation: Tensor  # [n_captured, d_model] float32: mean residual over the message's tokens


@torch.inference_mode()
def read_passages(
    chat: ChatModel,
    passages: Sequence[Passage],
    layers: Sequence[int] | None = None,
    batch_tokens: int = READ_TOKENS,
) -> Iterator[tuple[str, Tensor]]:
    """Means over each passage's spans: ``(key, [n_spans, n_captured, d_model] float32)``, shortest first.

    Raises:
        NonFiniteError: an activation is NaN or infinite; names layer and passage.
        ValueError: an empty or out-of-range span.
    """
    captured = check_layers(layers, chat.n_layers)
    _check_spans(passages)
    for batch in length_batches(passages, batch_tokens):
        yield from _read_batch(chat, batch, captured)


def length_batches(passages: Sequence[Passage], batch_tokens: int) -> Iterator[list[Passage]]:
    """Passages sorted by length, in batches of at most ``batch_tokens`` padded tokens (at least one each)."""
    batch: list[Passage] = []
    for passage in sorted(passages, key=lambda p: len(p.token_ids)):
        if batch and (len(batch) + 1) * len(passage.token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


def padded(batch: Sequence[Passage], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded token ids and attention mask, ``[batch, width]`` int64 each."""
    width = max(len(p.token_ids) for p in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for i, p in enumerate(batch):
        ids[i, : len(p.token_ids)] = torch.tensor(p.token_ids)
        mask[i, : len(p.token_ids)] = 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def residual_norms(
    chat: ChatModel,
    passages: Sequence[Passage],
    layers: Sequence[int] | None = None,
    batch_tokens: int = READ_TOKENS,
) -> Tensor:
    """Mean norm of each block's output over the tokens in any span, ``[n_captured]`` float32.

    The unit of a steering strength that means the same at every layer (the paper's section 3.2). Of whole tokens: the
    norm of a mean activation is shorter.

    Raises:
        NonFiniteError: a norm is NaN or infinite; names the layer.
        ValueError: an empty or out-of-range span, or none at all.
    """
    captured = check_layers(layers, chat.n_layers)
    _check_spans(passages)
    totals = torch.zeros(len(captured), dtype=torch.float64)
    counted = 0
    for batch in length_batches(passages, batch_tokens):
        ids, mask = padded(batch, main_device(chat.model))
        inside = _kinds(batch, [marked(p.spans, GIVEN) for p in batch]) == GIVEN
        counted += int(inside.sum())

        def add(i: int, hidden: Tensor, inside: Tensor = inside) -> None:
            totals[i] += float(hidden[inside.to(hidden.device)].float().norm(dim=-1).sum())

        with tapped([chat.blocks[layer] for layer in captured], add), _announced(batch, _read(batch)):
            text_decoder(chat.model)(input_ids=ids, attention_mask=mask, use_cache=False)
        check_finite(totals[:, None], captured, f"{batch[0].key} (or one of the {len(batch) - 1} read with it)")
    if not counted:
        raise ValueError("No span to measure residual norms over.")
    with torch.inference_mode(False):
        return (totals / counted).float()


def _check_spans(passages: Sequence[Passage]) -> None:
    for passage in passages:
        for start, end in passage.spans:
            if not 0 <= start < end <= len(passage.token_ids):
                raise ValueError(f"{passage.key}: span {start}:{end} of {len(passage.token_ids)} tokens")


def _read(batch: Sequence[Passage]) -> list[tuple[Mark, ...]]:
    """What is read was given, none of it generated."""
    return [marked(p.replies, GIVEN) for p in batch]


def _scored(batch: Sequence[Passage]) -> list[tuple[Mark, ...]]:
    """What is scored counts as generated, whatever it is."""
    return [marked(p.replies, GIVEN) + marked(p.spans, GENERATED) for p in batch]


def _kinds(batch: Sequence[Passage], marks: Sequence[Sequence[Mark]]) -> Tensor:
    """Of a right-padded batch of whole passages, ``[batch, width]`` int8."""
    return stretches([0] * len(batch), [len(p.token_ids) for p in batch], marks)


def _announced(batch: Sequence[Passage], marks: Sequence[Sequence[Mark]]) -> AbstractContextManager[None]:
    """Whole passages pass, of which ``marks`` say what they consist of."""
    return announced(Announcement(lambda *_: _kinds(batch, marks)))


def _read_batch(chat: ChatModel, batch: list[Passage], captured: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    device = main_device(chat.model)
    ids, mask = padded(batch, device)
    # A row per span: which tokens of the flattened batch it averages.
    spans = [(row, start, end) for row, p in enumerate(batch) for start, end in p.spans]
    width = ids.shape[1]
    tokens = torch.cat([torch.arange(row * width + a, row * width + b) for row, a, b in spans])
    owner = torch.cat([torch.full((b - a,), i) for i, (_, a, b) in enumerate(spans)])
    sums: list[Tensor] = []

    def add(i: int, hidden: Tensor) -> None:
        flat = hidden.reshape(-1, hidden.shape[-1])
        total = torch.zeros(len(spans), flat.shape[1], dtype=torch.float32, device=flat.device)
        total.index_add_(0, owner.to(flat.device), flat[tokens.to(flat.device)].float())
        sums.append(total.cpu())

    with tapped([chat.blocks[layer] for layer in captured], add), _announced(batch, _read(batch)):
        text_decoder(chat.model)(input_ids=ids, attention_mask=mask, use_cache=False)
    counts = torch.tensor([end - start for _, start, end in spans])
    means = torch.stack(sums, 1) / counts[:, None, None]  # [n_spans, n_captured, d_model]
    first = 0
    for p in batch:
        mine = means[first : first + len(p.spans)]
        first += len(p.spans)
        for activation in mine:
            check_finite(activation, captured, p.key)
        with torch.inference_mode(False):  # tensors like any other: the caller may change them
            mine = mine.clone()
        yield p.key, mine


def read_conversation(
    chat: ChatModel, conversation: Sequence[Message], layers: Sequence[int] | None = None
) -> list[TurnReading]:
    """Mean activations of every message of a conversation, all tokens of its content counted.

    Args:
        chat: from :func:`~persona_axis.model.loading.load_model`.
        conversation: messages ``{"role", "content"}``.
        layers: decoder blocks to read; None is all.

    Returns:
        One reading per message (two for an assistant message with a thinking block), in order; messages
        without content are left out.

    Raises:
        TemplateError: the chat template's content spans cannot be proven.
        NonFiniteError: NaN or infinity in an activation.
    """
    tokens = chat.template.tokenise(conversation)
    if not tokens.segments:
        raise TemplateError("The conversation has no content to read.")
    spans = tuple((s.start, s.end) for s in tokens.segments)
    replies = tuple((s.start, s.end) for s in tokens.segments if s.role == "assistant")
    [(_, means)] = read_passages(chat, [Passage("conversation", tokens.token_ids, spans, replies=replies)], layers)
    return [
        TurnReading(s.message, s.role, s.part, s.end - s.start, mean)
        for s, mean in zip(tokens.segments, means, strict=True)
    ]


@torch.inference_mode()
def score_passages(
    chat: ChatModel, passages: Sequence[Passage], batch_tokens: int = READ_TOKENS, slots: Prefiller | None = None
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Log-probability of each token of each span given all before it: full softmax, temperature 1, nats.

    Yields ``(key, [float32 [end - start] per span])``. A span must start after the first token, and after the
    passage's ``shared`` tokens. Only the spans' positions pass through the language-model head. Shared tokens are
    computed once where the decoding loop has proven itself (``chat.loop_proven``), else with every passage; pass
    ``slots`` to keep them from call to call (with the same model, under the same interventions).
    """
    head = Head(chat.model)
    for batch, states, targets in _predicting(chat, passages, batch_tokens, slots):
        logprobs = head.logprobs(states, targets).cpu().numpy()
        first = 0
        for p in batch:
            mine = []
            for a, b in p.spans:
                mine.append(logprobs[first : first + b - a])
                first += b - a
            yield p.key, mine


@torch.inference_mode()
def predicting_states(
    chat: ChatModel, passages: Sequence[Passage], batch_tokens: int = READ_TOKENS, slots: Prefiller | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Final hidden states that the head makes the spans' predictions of: ``(key, [n_tokens, d_model])``.

    As :func:`score_passages`; all spans of a passage one after another.
    """
    for batch, states, _ in _predicting(chat, passages, batch_tokens, slots):
        sizes = [sum(b - a for a, b in p.spans) for p in batch]
        for p, mine in zip(batch, states.split(sizes), strict=True):
            yield p.key, mine


def _predicting(
    chat: ChatModel, passages: Sequence[Passage], batch_tokens: int, slots: Prefiller | None
) -> Iterator[tuple[list[Passage], Tensor, Tensor]]:
    """Batches with the states before each token of their spans, ``[n, d_model]``, and those tokens ``[n]``."""
    for p in passages:
        if any(a < max(1, p.shared + 1) for a, _ in p.spans):
            raise ValueError(f"{p.key}: a scored span needs a token of the passage's own before it.")
    if chat.loop_proven and any(p.shared for p in passages):
        yield from _predicting_shared(chat, passages, batch_tokens, slots or Prefiller(chat))
        return
    for batch in length_batches(passages, batch_tokens):
        ids, mask = padded(batch, main_device(chat.model))
        with _announced(batch, _scored(batch)):
            hidden = text_decoder(chat.model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        yield batch, *_at_spans(batch, hidden, [0] * len(batch))


def _predicting_shared(
    chat: ChatModel, passages: Sequence[Passage], batch_tokens: int, slots: Prefiller
) -> Iterator[tuple[list[Passage], Tensor, Tensor]]:
    """Passages with the same prefix together, each prefix computed once."""
    for batch in _prefix_batches(passages, batch_tokens):
        slots.cache.resize(len(batch), max(len(p.token_ids) for p in batch))
        shared = [p.shared for p in batch]
        with slot_attention_enabled(slots.decoder):
            hidden = slots.fill(0, [p.token_ids for p in batch], shared, _scored(batch))
        if hidden is None:
            raise ValueError("Nothing to score: no passage has a token after its shared prefix.")
        yield batch, *_at_spans(batch, hidden, shared)


def _prefix_batches(passages: Sequence[Passage], batch_tokens: int) -> Iterator[list[Passage]]:
    """Like :func:`length_batches` on the tokens after the prefixes, passages of one prefix side by side."""
    batch: list[Passage] = []
    width = 0
    for p in sorted(passages, key=lambda p: (p.token_ids[: p.shared], len(p.token_ids))):
        rest = len(p.token_ids) - p.shared
        if batch and (len(batch) + 1) * max(width, rest) > batch_tokens:
            yield batch
            batch, width = [], 0
        batch.append(p)
        width = max(width, rest)
    if batch:
        yield batch


def _at_spans(batch: list[Passage], hidden: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """From final hidden states ``[batch, width, d_model]`` whose column 0 is each passage's ``starts`` token."""
    spans = [(row, a, b) for row, p in enumerate(batch) for a, b in p.spans]
    rows = torch.cat([torch.full((b - a,), row) for row, a, b in spans]).to(hidden.device)
    columns = torch.cat([torch.arange(a - starts[row] - 1, b - starts[row] - 1) for row, a, b in spans])
    targets = torch.cat([torch.tensor(batch[row].token_ids[a:b]) for row, a, b in spans]).to(hidden.device)
    return hidden[rows, columns.to(hidden.device)], targets
