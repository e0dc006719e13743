"""Reading conversations: segment means of every layer against the bare decoder forward of the same padded batches.

    python -m benchmarks --only reading

Claims: at most 1.10 times the seconds; peak memory does not grow with tokens times layers. Embedded model in the dtype
that ``auto`` gives.
Time: conversations from the catalog, a span per turn. Memory: one forward of T and of 4T tokens, reading and bare,
each in its own process; what reading adds to the growth of the peak, as a share of what storing every token's
residual of every layer (in the model's dtype) would add. One layer is 0.033 of that, and needs no storing of any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.machine import peak_of
from benchmarks.material import conversations, embedded
from benchmarks.measure import PAIRS, QUICK_PAIRS, Claim, Ratio, Result, Work, alone, compare
from persona_axis.model.layers import main_device, text_decoder
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import READ_TOKENS, Passage, length_batches, padded, read_passages

SECONDS = Claim(
    "reading, seconds", "reading <= 1.10 x the bare forward", 1.10, "x seconds of the forward", at_most=True
)
MEMORY = Claim(
    "reading, memory",
    "peak memory independent of tokens x layers",
    0.1,
    "of storing every token's residuals",
    at_most=True,
)
WIDTH = 256  # tokens per passage of the memory test
SPAN = 32


def run(quick: bool = False) -> Iterator[Result]:
    yield seconds(quick)
    yield memory(quick)


def seconds(quick: bool) -> Result:
    chat = embedded()
    passages = conversations(chat, 4 if quick else 32)
    found = compare(lambda: read(chat, passages), lambda: bare(chat, passages), rounds=QUICK_PAIRS if quick else PAIRS)
    settings = {
        "model": "embedded",
        "dtype": chat.dtype,
        "conversations": len(passages),
        "tokens": sum(len(p.token_ids) for p in passages),
        "spans": sum(len(p.spans) for p in passages),
        "layers": chat.n_layers,
        "batch_tokens": READ_TOKENS,
    }
    return Result(SECONDS, found.ratio(), settings, {"seconds_read_bare": found.seconds()})


def read(chat: ChatModel, passages: list[Passage], batch_tokens: int = READ_TOKENS) -> None:
    for _ in read_passages(chat, passages, batch_tokens=batch_tokens):
        pass


@torch.inference_mode()
def bare(chat: ChatModel, passages: list[Passage], batch_tokens: int = READ_TOKENS) -> None:
    for batch in length_batches(passages, batch_tokens):
        ids, mask = padded(batch, main_device(chat.model))
        text_decoder(chat.model)(input_ids=ids, attention_mask=mask, use_cache=False)


def memory(quick: bool) -> Result:
    tokens, repeats = (512, 1) if quick else (2048, 3)
    chat = embedded()
    stored = 3 * tokens * chat.n_layers * chat.d_model * chat.model.dtype.itemsize
    shares, peaks = [], []
    for _ in range(repeats):
        found: dict[str, Any] = {
            f"{name}_{n}": peak_of("benchmarks.reading:prepared", name=name, tokens=n)["peak"]
            for name in ("bare", "read")
            for n in (tokens, 4 * tokens)
        }
        growth = {name: found[f"{name}_{4 * tokens}"] - found[f"{name}_{tokens}"] for name in ("bare", "read")}
        shares.append((growth["read"] - growth["bare"]) / stored)
        peaks.append(found)
    settings = {"model": "embedded", "dtype": chat.dtype, "tokens": [tokens, 4 * tokens], "layers": chat.n_layers}
    return Result(MEMORY, Ratio.of(shares), settings, {"stored_bytes": stored, "peak_bytes": peaks})


def prepared(name: str, tokens: int) -> Work:
    """The work of one process of :func:`memory`, warmed up."""
    chat = embedded()
    work = {"bare": bare, "read": read}[name]
    work(chat, _passages(2))
    passages = _passages(tokens // WIDTH)
    return lambda: work(chat, passages, batch_tokens=tokens)


def _passages(count: int) -> list[Passage]:
    """Passages of random tokens, all of the same length."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(1000, 40_000, (count, WIDTH), generator=random).tolist()
    spans = tuple((start, start + SPAN) for start in range(0, WIDTH, SPAN))
    return [Passage(str(i), tuple(row), spans) for i, row in enumerate(rows)]


if __name__ == "__main__":
    alone(run)
