"""Slot attention against attention written out per head in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_reference import block_outputs
from torch import Tensor, nn

from persona_axis.model import attention
from persona_axis.model.attention import causal_mask, slot_attention, slot_attention_enabled


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """``[b, q, heads, d]``; query i of row b stands at ``positions[b, i]`` and sees keys up to there."""
    batch, heads, n, _ = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, n, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                last = int(positions[b, i])
                first = 0 if window is None else max(0, last - window + 1)
                keys = key[b, h // groups, first : last + 1].double()
                scores = keys @ query[b, h, i].double() * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h].double()[None]])
                weights = scores.softmax(-1)[: len(keys)]
                out[b, i, h] = weights @ value[b, h // groups, first : last + 1].double()
    return out


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_against_the_definition(
    softcap: float | None, window: int | None, sinks: bool, chunk: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", chunk)
    random = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 5, 8, generator=random)
    key, value = torch.randn(3, 2, 12, 8, generator=random), torch.randn(3, 2, 12, 7, generator=random)
    positions = torch.tensor([0, 3, 7])[:, None] + torch.arange(5)
    s_aux = torch.randn(6, generator=random) if sinks else None
    ours, weights = slot_attention(
        nn.Module(), query, key, value, causal_mask(positions, 12), 0.7, 0.0, softcap, window, s_aux
    )
    assert weights is None
    expected = written_out(query, key, value, positions, 0.7, softcap, window, s_aux)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_scale_of_its_own() -> None:
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 4, 16)
    mask = causal_mask(torch.tensor([[3]]), 4)
    ours, _ = slot_attention(nn.Module(), query, key, key, mask)
    torch.testing.assert_close(ours, slot_attention(nn.Module(), query, key, key, mask, scaling=0.25)[0])


def test_what_is_masked_has_no_influence() -> None:
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    mask = causal_mask(torch.tensor([[2]]), 6)
    before, _ = slot_attention(nn.Module(), query, key, value, mask)
    key[:, :, 3:], value[:, :, 3:] = 1e4, -1e4
    after, _ = slot_attention(nn.Module(), query, key, value, mask)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_mask_that_got_lost() -> None:
    x = torch.randn(1, 2, 1, 8)
    with pytest.raises(ValueError, match="mask"):
        slot_attention(nn.Module(), x, x, x, None)


def test_the_implementation_is_restored(tiny: Any) -> None:
    chat = tiny("gpt_oss")
    before = chat.model.config._attn_implementation
    logits = block_outputs(chat, [5, 6, 7])[1]
    seen = []

    def fail_inside() -> None:
        with slot_attention_enabled(chat.model.get_decoder()):
            seen.append(chat.model.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert seen == [attention.NAME]
    assert chat.model.config._attn_implementation == before
    torch.testing.assert_close(block_outputs(chat, [5, 6, 7])[1], logits, rtol=0, atol=0)


def test_a_model_with_its_own_attention(tiny: Any) -> None:
    chat = tiny("falcon")
    with pytest.raises(RuntimeError, match="does not let its attention be chosen"):
        slot_attention_enabled(chat.model.get_decoder()).__enter__()
