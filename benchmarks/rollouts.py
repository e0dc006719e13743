"""Rollouts per second: the decoding loop, capturing every layer, against ``model.generate``.

    python -m benchmarks --only rollouts

Claim: at least 2.2 times the tokens per second (aim 3). Embedded model in the dtype that ``auto`` gives, T 0.7, top-p
0.9, the same prompts from the catalog on both sides, exactly 32 new tokens each (no stop ids on either side).
``generate`` gets left-padded batches sorted by length, of the size at which it is fastest here, once without top-k and
once with its default of 50; the loop runs at its default batch and pays for capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from transformers import GenerationConfig

from benchmarks.material import embedded, prompts
from benchmarks.measure import PAIRS, QUICK_PAIRS, Claim, Result, alone, compare, timed
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Request, Sampling
from persona_axis.model.loading import ChatModel
from persona_axis.pipeline import default_batch_tokens

TOKENS = 32
SEARCH_TOKENS = 16
BATCHES = (32, 64, 96, 192)  # each divides COUNT
COUNT = 192
TOP_K = (0, 50)


def run(quick: bool = False) -> Iterator[Result]:
    chat = endless(embedded())
    tokens, batches = (4, (8, 16)) if quick else (TOKENS, BATCHES)
    best, rates = best_batch(chat, batches, tokens if quick else SEARCH_TOKENS)
    count = 16 if quick else COUNT
    requests = prompts(chat, count)
    loop = DecodingLoop(chat, tuple(range(chat.n_layers)), default_batch_tokens(chat))
    found = compare(
        lambda: loop_all(loop, requests, tokens),
        *(lambda k=top_k: generate_all(chat, requests, best, tokens, k) for top_k in TOP_K),
        rounds=QUICK_PAIRS if quick else PAIRS,
    )
    ours, *theirs = (count * tokens / seconds for seconds in found.seconds())
    for i, top_k in enumerate(TOP_K, 1):
        claim = Claim(
            f"rollouts, generate top_k={top_k}", "tokens/s >= 2.2 x model.generate", 2.2, "x tokens/s of generate"
        )
        settings = {
            "model": "embedded",
            "dtype": chat.dtype,
            "prompts": count,
            "new_tokens": tokens,
            "generate_batch": best,
            "loop_batch_tokens": loop.batch_tokens,
            "captured_layers": len(loop.layers),
            "top_k": top_k,
        }
        rate = {"generate_tokens_per_s": theirs[i - 1], "loop_tokens_per_s": ours}
        yield Result(claim, found.ratio(i, 0), settings, {**rate, "generate_tokens_per_s_by_batch": rates})


def endless(chat: ChatModel) -> ChatModel:
    """The model with no token that ends a reply."""
    return replace(chat, stop_ids=frozenset())


def loop_all(loop: DecodingLoop, requests: list[Request], tokens: int) -> None:
    """Every request through the decoding loop."""
    made = sum(len(reply.token_ids) for reply in loop.generate(requests, Sampling(tokens)))
    assert made == len(requests) * tokens


def best_batch(chat: ChatModel, batches: tuple[int, ...], tokens: int) -> tuple[int, dict[str, float]]:
    """The batch size at which ``generate`` makes the most tokens per second, and all rates."""
    requests = prompts(chat, max(batches))
    generate_all(chat, requests[: min(batches)], min(batches), tokens, 0)  # warm-up
    rates = {
        size: size * tokens / timed(lambda n=size: generate_all(chat, requests[:n], n, tokens, 0)) for size in batches
    }
    return max(rates, key=lambda size: rates[size]), {str(size): rate for size, rate in rates.items()}


@torch.inference_mode()
def generate_all(chat: ChatModel, requests: list[Request], batch: int, tokens: int, top_k: int) -> None:
    """Every request through ``model.generate``, ``batch`` at a time."""
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        top_k=top_k,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    own, chat.model.generation_config = chat.model.generation_config, GenerationConfig()
    try:
        ordered = sorted(requests, key=lambda r: len(r.prompt_ids))
        for start in range(0, len(ordered), batch):
            ids, mask = left_padded(ordered[start : start + batch])
            out = chat.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            assert out.shape[1] == ids.shape[1] + tokens
    finally:
        chat.model.generation_config = own


def left_padded(requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, ``[batch, width]``."""
    width = max(len(r.prompt_ids) for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(requests):
        ids[i, width - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
        mask[i, width - len(r.prompt_ids) :] = 1
    return ids, mask


if __name__ == "__main__":
    alone(run)
