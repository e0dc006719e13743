"""A decoding step's attention: the two matrix products of ``slot_attention`` against PyTorch's fused kernel.

    python -m benchmarks --only attention

Claim: ``scaled_dot_product_attention`` with a mask and grouped heads takes at least as long. The embedded model's shape
and the dtype that ``auto`` gives it: 9 query heads, 3 key/value heads of 64, one query per row, 192 rows, 128 keys;
the kernel gets a mask in the queries' dtype and ``enable_gqa``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.material import embedded
from benchmarks.measure import QUICK_PAIRS, Claim, Result, alone, compare
from persona_axis.model.attention import causal_mask, slot_attention

CLAIM = Claim("attention", "SDPA takes at least as long per step", 1, "x seconds of slot_attention")
ATTENTION_PAIRS = 24
CALLS = 30  # per timing: one call is some milliseconds
ROWS, KEYS, HEADS, KV_HEADS, DIM = 192, 128, 9, 3, 64


@torch.inference_mode()
def run(quick: bool = False) -> Iterator[Result]:
    chat = embedded()
    dtype, random = chat.model.dtype, torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(ROWS, heads, length, DIM, generator=random).to(dtype)

    query, key, value = draw(HEADS, 1), draw(KV_HEADS, KEYS), draw(KV_HEADS, KEYS)
    lengths = torch.randint(KEYS // 2, KEYS, (ROWS, 1), generator=random)
    mask = causal_mask(lengths, KEYS)
    narrow, module = mask.to(dtype), nn.Module()

    def ours() -> torch.Tensor:
        return slot_attention(module, query, key, value, mask)[0]

    def theirs() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=narrow, enable_gqa=True)

    torch.testing.assert_close(ours(), theirs().transpose(1, 2), atol=2e-2, rtol=2e-2)
    calls = 3 if quick else CALLS
    found = compare(
        lambda: [theirs() for _ in range(calls)],
        lambda: [ours() for _ in range(calls)],
        rounds=QUICK_PAIRS if quick else ATTENTION_PAIRS,
    )
    settings = {"rows": ROWS, "keys": KEYS, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": chat.dtype}
    per_call = [seconds / calls for seconds in found.seconds()]
    yield Result(CLAIM, found.ratio(), settings, {"seconds_per_call_sdpa_slots": per_call})


if __name__ == "__main__":
    alone(run)
