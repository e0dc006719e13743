"""One model beside another state of itself on the same tokens: agreement and divergence of what they predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from persona_axis.model.head import Head

LOGITS = 1 << 23  # float32 logits of each side held at once: what stays near the cache


@dataclass(frozen=True, eq=False)
class Compared:
    """Token by token, ``[n]`` float32 each."""

    plain: Tensor  # log p(target), nats
    other: Tensor
    agree: Tensor  # 1 where both find the same token likeliest
    kl: Tensor  # of the other's distribution from the plain one, nats


@torch.inference_mode()
def compare_states(head: Head, plain: Tensor, other: Tensor, targets: Tensor) -> Compared:
    """Compare the predictions made from two sets of final hidden states.

    Args:
        head: of the model.
        plain, other: ``[n, d_model]`` (:func:`~persona_axis.model.reading.predicting_states`).
        targets: ``[n]`` token ids.
    """
    rows = max(1, LOGITS // head.vocabulary)
    parts = [_compare(head, *(t[i : i + rows] for t in (plain, other, targets))) for i in range(0, len(targets), rows)]
    return Compared(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _compare(head: Head, plain: Tensor, other: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, q = (head.logits(states).float().log_softmax(-1) for states in (plain, other))
    kl = (p.exp() * (p - q)).sum(-1)
    index = targets.to(p.device)[:, None]
    return p.gather(1, index)[:, 0], q.gather(1, index)[:, 0], (p.argmax(-1) == q.argmax(-1)).float(), kl
