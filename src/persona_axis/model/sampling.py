"""Drawing the next token: exact nucleus sampling without sorting the vocabulary.

The nucleus at ``top_p`` is a handful of tokens, so the few largest logits are found by a partial selection and
normalised by the exact partition function. Rows whose nucleus is larger than the selection are redone with a
larger one, up to the whole vocabulary: the distribution is exact, never truncated.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Enough for nearly every nucleus at T 0.7, top-p 0.9; the cost of `topk` grows slowly below this.
FIRST_SELECTION = 64
# Float32 work on [rows, vocabulary] is done in slices that stay in cache; a fresh 40 MB buffer per step
# costs more in page faults than the arithmetic in it.
SLICE_ELEMENTS = 1 << 20


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token per row.

    Args:
        logits: ``[rows, vocabulary]``, any float dtype.
        uniforms: ``[rows]`` float32 in [0, 1): the row's own random number, used by inverse CDF.
        temperature: 0 is greedy.
        top_p: nucleus mass; 1 is the full distribution.

    Returns:
        ``(tokens [rows] int64, logprobs [rows] float32)``; log-probabilities are those of the full softmax
        at temperature 1, whatever the sampling temperature.
    """
    rows = logits.shape[0]
    step = max(1, SLICE_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else rows
    parts = [
        _sample_slice(logits[i : i + step].float(), uniforms[i : i + step], temperature, top_p)
        for i in range(0, rows, step)
    ]
    return torch.cat([t for t, _ in parts]), torch.cat([p for _, p in parts])


def _sample_slice(x: Tensor, u: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """`sample` on float32 logits ``[rows, vocabulary]``; ``x`` may be overwritten."""
    if temperature == 0:
        best, tokens = x.max(-1)
        return tokens, -(x - best[:, None]).exp_().sum(-1).log_()
    if top_p == 1:
        return _full_draw(x, u, temperature)
    k = min(FIRST_SELECTION, x.shape[1])
    top, index = x.topk(k)  # [rows, k], descending
    shifted = x - top[:, :1]
    log_z = shifted.exp().sum(-1).log_()
    z_tempered = shifted.mul_(1 / temperature).exp_().sum(-1)
    choice, covered = _nucleus_draw(top, z_tempered, u, temperature, top_p)
    while not bool(covered.all()) and k < x.shape[1]:
        k = min(k * 8, x.shape[1])
        redo = (~covered).nonzero()[:, 0]
        top_r, index_r = x[redo].topk(k)
        choice_r, covered_r = _nucleus_draw(top_r, z_tempered[redo], u[redo], temperature, top_p)
        top, index = _widen(top, k), _widen(index, k)
        top[redo], index[redo] = top_r, index_r
        choice[redo], covered[redo] = choice_r, covered_r
    tokens = index.gather(1, choice[:, None])[:, 0]
    logprobs = (top.gather(1, choice[:, None])[:, 0] - top[:, 0]) - log_z
    return tokens, logprobs


def _nucleus_draw(
    top: Tensor, z_tempered: Tensor, u: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw a rank from the nucleus of descending ``top [rows, k]``; also whether ``k`` covered the nucleus."""
    p = ((top - top[:, :1]) / temperature).exp_() / z_tempered[:, None]  # [rows, k]
    before = p.cumsum(-1) - p
    nucleus = before < top_p  # the smallest set whose mass reaches top_p; the first is always in it
    kept = (p * nucleus).cumsum(-1)
    target = u[:, None] * kept[:, -1:]
    choice = (kept <= target).sum(-1).clamp_(max=top.shape[1] - 1)
    # Rounding may push the target past the last kept token; the nucleus is a prefix, so clamp to its end.
    # NaN logits have no nucleus; they get rank 0 and are reported with the activation.
    choice = torch.minimum(choice, nucleus.sum(-1) - 1).clamp_(min=0)
    return choice, p.sum(-1) >= top_p


def _full_draw(x: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse CDF over the whole vocabulary, no selection needed."""
    shifted = x - x.amax(-1, keepdim=True)
    cdf = (shifted / temperature).exp_().double().cumsum(-1)
    target = u[:, None].double() * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=x.shape[1] - 1)
    logprobs = shifted.gather(1, tokens[:, None])[:, 0] - shifted.exp_().sum(-1).log_()
    return tokens, logprobs


def _widen(t: Tensor, k: int) -> Tensor:
    """Pad ``[rows, j]`` to ``[rows, k]`` columns."""
    return torch.cat([t, t[:, -1:].expand(-1, k - t.shape[1])], 1)
