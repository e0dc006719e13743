"""Which tokens of the forward under way belong to a reply: for taps that change only some positions.

Contract:

1. Whoever runs a model of this package and knows, announces it: decoding, prefilling, scoring, reading.
2. A forward that nobody announced (a user's own ``model(...)`` or ``model.generate``) is judged by its cache: one
   token after a filled cache was generated, the first tokens of an empty cache are a prompt. Where that cannot tell,
   :func:`of_forward` raises; it never guesses.
3. Announcements belong to a thread, as forwards do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_axis.errors import ModelError

OTHER, GIVEN, GENERATED = 0, 1, 2  # template and other roles; an assistant turn that was given; what the model writes

Span = tuple[int, int]  # token positions start .. end - 1 of a sequence
Mark = tuple[int, int, int]  # a span and its kind


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a forward of ``[batch, tokens]`` ids consists of.

    Attributes:
        kinds: (batch, tokens, tokens already in the cache) -> ``[batch, tokens]`` int8 of the constants above.
        rows_move: the sequences of the batch are not those of the caller, in order.
    """

    kinds: Callable[[int, int, int], Tensor]
    rows_move: bool = True


_current: ContextVar[Announcement | None] = ContextVar("persona_axis_tokens", default=None)


def announcement() -> Announcement | None:
    """That of the forward under way."""
    return _current.get()


@contextmanager
def announced(said: Announcement) -> Iterator[None]:
    token = _current.set(said)
    try:
        yield
    finally:
        _current.reset(token)


def marked(spans: Iterable[Span], kind: int) -> tuple[Mark, ...]:
    """Spans of one kind."""
    return tuple((start, end, kind) for start, end in spans)


def stretches(starts: Sequence[int], lengths: Sequence[int], marks: Sequence[Sequence[Mark]]) -> Tensor:
    """Kinds of rows that begin at position ``starts[i]`` of their sequence, ``[rows, longest]`` int8.

    ``marks[i]`` are of sequence ``i``; later ones win. The rest, padding included, is OTHER.
    """
    kinds = torch.full((len(starts), max(lengths)), OTHER, dtype=torch.int8)
    for row, start, mine in zip(kinds, starts, marks, strict=True):
        for first, end, kind in mine:
            row[max(0, first - start) : max(0, end - start)] = kind
    return kinds


def continuing(prompt_tokens: int, replies: Sequence[Span] = ()) -> Announcement:
    """``generate`` on one prompt: what comes after it is generated; ``replies`` are assistant turns in the prompt."""

    def kinds(batch: int, tokens: int, start: int) -> Tensor:
        marks = (*marked(replies, GIVEN), (prompt_tokens, start + tokens, GENERATED))
        return stretches([start], [tokens], [marks]).expand(batch, -1)

    return Announcement(kinds, rows_move=False)


def of_forward(decoder: Any, args: Sequence[Any], kwargs: Mapping[str, Any], replies: bool) -> Tensor:
    """``[batch, tokens]`` bool: the tokens of a decoder's forward that were generated, or given replies as well.

    Args:
        decoder: turns token ids into hidden states.
        args, kwargs: what it is called with.
        replies: assistant turns that were given count too.

    Raises:
        ModelError: nobody announced the forward and its cache does not tell, or it has no key/value cache as
            Transformers' decoders have.
    """
    given = _arguments(decoder, args, kwargs)
    content = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    batch, tokens = content.shape[:2]
    cache = given.get("past_key_values")
    start = 0 if cache is None else int(cache.get_seq_length())
    said = announcement()
    if said is not None:
        kinds = said.kinds(batch, tokens, start)
        return kinds >= GIVEN if replies else kinds == GENERATED
    if replies:
        raise ModelError(
            "This policy holds assistant turns only (positions 'reply'), and nobody said which tokens of this forward "
            "are theirs. Use this package's reply, reading and generation, or enter persona_axis.model.tokens."
            "announced around your own forward."
        )
    if start > 0 and tokens > 1:
        raise ModelError(
            f"This policy holds generated tokens only (positions 'decode'), and {tokens} tokens at once after a filled "
            "cache can be prompt or reply. Prefill the prompt in one forward, or use positions 'all'."
        )
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", True)
    if cache is None and not use_cache:
        raise ModelError(
            "This policy holds generated tokens only (positions 'decode'); without a cache they cannot be told from "
            "the prompt. Generate with use_cache=True, or use positions 'all'."
        )
    return torch.full((batch, tokens), start > 0)


def _arguments(decoder: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """By name, however they were passed."""
    signature = inspect.signature(decoder.forward)
    if "past_key_values" not in signature.parameters:
        raise ModelError(
            f"{type(decoder).__name__} takes no past_key_values, so where its tokens stand in their sequence cannot be "
            "told. Use a policy for positions 'all'."
        )
    given = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given
