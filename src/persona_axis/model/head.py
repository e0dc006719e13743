"""The language-model head for chosen positions: logits while decoding, log-probabilities of given tokens.

What ``model(...)`` does after its decoder, with the model's own scaling and soft cap. The self-check at load compares
both ways with ``generate``. On the CPU the head is memory traffic as much as arithmetic: a fresh ``[rows, vocabulary]``
buffer costs more in page faults than the softmax over it, so decoding writes into one that stays, and scoring goes
over the vocabulary in slices that stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from persona_axis.model.layers import text_config

SCORE_ROWS = 512  # positions scored at once, against
SCORE_SLICE = 1024  # so many vocabulary entries
WHOLE_LOGITS = 1 << 27  # logits held at once when a head can only be called as a whole


class Head:
    """The head of one model."""

    def __init__(self, model: Any) -> None:
        self.module = model.get_output_embeddings()
        self.vocabulary = len(self.module.weight)
        self.config = text_config(model)
        self.buffer = torch.empty(0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states ``[n, d_model]`` -> logits ``[n, vocabulary]`` in the head's dtype.

        They may lie in a buffer that the next call overwrites.
        """
        if not self._sliceable(hidden):
            return self._adjusted(self.module(hidden))
        size = len(hidden) * self.vocabulary
        if self.buffer.numel() < size or self.buffer.dtype != hidden.dtype:
            self.buffer = hidden.new_empty(size)
        return self._adjusted(self._product(hidden, slice(None), self.buffer[:size].view(len(hidden), -1)))

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """``log p(target)`` for each of ``[n]`` targets after final hidden states ``[n, d_model]``, float32."""
        rows = SCORE_ROWS if self._sliceable(hidden) else max(1, WHOLE_LOGITS // self.vocabulary)
        return torch.cat(
            [self._score(hidden[i : i + rows], targets[i : i + rows]) for i in range(0, len(hidden), rows)]
        )

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Slice by slice: the maximum, the sum of exponentials above it, and the targets that lie in it."""
        tops, sums, picked = [], [], torch.zeros(len(hidden), device=hidden.device)
        for start, logits in self._slices(hidden):
            here = targets - start
            inside = (here >= 0) & (here < logits.shape[1])
            mine = logits.gather(1, here.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            picked = torch.where(inside, mine, picked)
            top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # a slice of -inf only
            tops.append(top)
            sums.append(logits.sub_(top).exp_().sum(-1, keepdim=True))
        return picked - (torch.cat(tops, 1) + torch.cat(sums, 1).log_()).logsumexp(1)

    def _slices(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first vocabulary entry, float32 logits ``[n, slice]`` free to overwrite), over the whole vocabulary."""
        if not self._sliceable(hidden):
            yield 0, self._adjusted(self.module(hidden)).float()
            return
        for start in range(0, self.vocabulary, SCORE_SLICE):
            yield start, self._adjusted(self._product(hidden, slice(start, start + SCORE_SLICE))).float()

    def _product(self, hidden: Tensor, entries: slice, out: Tensor | None = None) -> Tensor:
        """What the plain linear head gives for some of the vocabulary, ``[n, entries]``."""
        weight, bias = self.module.weight[entries].T, self.module.bias
        if bias is None:
            return torch.mm(hidden, weight, out=out)
        return torch.addmm(bias[entries], hidden, weight, out=out)

    def _sliceable(self, hidden: Tensor) -> bool:
        """On the CPU, a head that only multiplies by a matrix. Not a quantised, adapted or hooked one."""
        head = self.module
        if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook"):
            return False
        return hidden.device.type == head.weight.device.type == "cpu" and head.weight.dtype == hidden.dtype

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Scaling and soft cap, in place."""
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # Cohere
            logits *= scale
        if (scale := getattr(self.config, "logits_scaling", None)) is not None:  # Granite
            logits /= scale
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits.div_(cap).tanh_().mul_(cap)
        return logits
