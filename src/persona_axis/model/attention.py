"""Attention over slot storage, plugged into Transformers by its attention interface.

Query heads that share a key/value head are folded into the query axis, so grouped-query attention reads each
key once and nothing is repeated in memory. Scores and softmax are float32. Sliding windows, logit soft-capping
and attention sinks are what the calling block says they are.

Why not ``scaled_dot_product_attention``: with one query per row, a mask and grouped heads, the CPU kernel is slower
than the two matrix products below (``benchmarks/attention.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "persona_axis_slots"
SCORE_ELEMENTS = 1 << 25  # float32 scores held at once; long prompts are done in query chunks


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [b, heads, q, d]``, ``key, value [b, kv_heads, k, d]``, additive mask ``[b, 1, q, k]`` float32.

    Returns ``([b, q, heads, d], None)`` as Transformers expects.
    """
    if attention_mask is None:
        raise ValueError("slot attention needs the loop's own mask; the model did not pass it on")
    batch, heads, q_len, dim = query.shape
    kv_heads, k_len = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    scale = dim**-0.5 if scaling is None else scaling
    grouped = query.reshape(batch, kv_heads, groups, q_len, dim)
    out = query.new_empty(batch, q_len, heads, value.shape[-1])
    chunk = max(1, SCORE_ELEMENTS // (batch * heads * k_len))
    for start in range(0, q_len, chunk):
        piece = grouped[:, :, :, start : start + chunk]
        size = piece.shape[3]
        scores = piece.reshape(batch, kv_heads, groups * size, dim) @ key.transpose(-1, -2)
        scores = scores.view(batch, kv_heads, groups, size, k_len).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        mask = _windowed(attention_mask[:, :, start : start + size], sliding_window)
        scores += mask[:, :, None]  # [b, 1, 1, size, k]
        weights = _softmax(scores, s_aux, kv_heads, groups).to(value.dtype)
        mixed = weights.view(batch, kv_heads, groups * size, k_len) @ value
        mixed = mixed.view(batch, heads, size, value.shape[-1])
        out[:, start : start + size] = mixed.transpose(1, 2)
    return out, None


def _softmax(scores: Tensor, sinks: Tensor | None, kv_heads: int, groups: int) -> Tensor:
    """Softmax over keys; a sink is one more logit per head whose weight is thrown away."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float().view(1, kv_heads, groups, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def _windowed(mask: Tensor, window: int | None) -> Tensor:
    """Also hide keys ``window`` or more positions behind the query; the query's position is its last open key."""
    k_len = mask.shape[-1]
    if window is None or k_len <= window:
        return mask
    columns = torch.arange(k_len, device=mask.device)
    here = torch.where(mask == 0, columns, -1).amax(-1, keepdim=True)  # [b, 1, q, 1]
    return mask.masked_fill(columns <= here - window, float("-inf"))


def causal_mask(positions: Tensor, width: int) -> Tensor:
    """Additive float32 ``[rows, 1, q, width]``: a query at position p sees columns ``0..p``."""
    hidden = torch.arange(width, device=positions.device) > positions[..., None]
    return torch.zeros(hidden.shape, device=positions.device).masked_fill_(hidden, float("-inf"))[:, None]


@contextmanager
def slot_attention_enabled(decoder: Any) -> Iterator[None]:
    """Let ``decoder`` (a Transformers model) use :func:`slot_attention` inside the block."""
    AttentionInterface.register(NAME, slot_attention)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    try:
        if decoder.config._attn_implementation != NAME:
            raise RuntimeError(f"{type(decoder).__name__} does not let its attention be chosen")
        yield
    finally:
        decoder.set_attn_implementation(before)
