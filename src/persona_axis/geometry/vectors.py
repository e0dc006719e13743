"""Persona vectors from question-by-question activations.

``paired`` (default): activation[persona, question] = mean + persona + question, weighted least squares over the kept
cells, question effects summing to zero; a persona's vector is mean + persona. When the filter removes different
questions from different personas, plain means would mix what was asked into who answered. ``paper``: plain means.

Everything is batched over draws (bootstrap weights, folds, halves): the draws differ in weights alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from persona_axis.errors import FitError


def persona_vectors(weights: Tensor, means: Tensor, paired: bool = True) -> Tensor:
    """A vector per persona.

    Args:
        weights: ``[..., P, Q]`` float32, rollouts per cell (0 = no kept rollout).
        means: ``[P, Q, d]`` float32, mean activation of each cell's rollouts (any finite value where weight is 0).
        paired: remove question effects (see module docstring).

    Returns:
        ``[..., P, d]`` float32; NaN for a persona whose weights are all zero.
    """
    batch = weights.shape[:-2]
    W = weights.reshape(-1, *weights.shape[-2:])  # [N, P, Q]
    per_persona = W.sum(-1, keepdim=True)  # [N, P, 1]
    sums = torch.bmm(W.transpose(0, 1), means).transpose(0, 1)  # [N, P, d]
    if paired:
        sums = sums - W @ _question_effects(W, means, sums)
    vectors = sums / per_persona  # 0 / 0 = NaN: a persona without data has no vector
    return vectors.reshape(*batch, *vectors.shape[-2:])


def _question_effects(W: Tensor, means: Tensor, sums: Tensor) -> Tensor:
    """Question effects ``[N, Q, d]`` of the additive model: the normal equations with personas eliminated."""
    per_persona = W.sum(-1, keepdim=True).clamp(min=torch.finfo(W.dtype).tiny)
    share = W / per_persona  # [N, P, Q]
    by_question = torch.bmm(W.permute(2, 0, 1), means.transpose(0, 1)).transpose(0, 1)  # [N, Q, d]
    rhs = by_question - share.transpose(1, 2) @ sums
    asked = (W.sum(1) > 0).double()  # [N, Q]
    system = torch.diag_embed(W.sum(1).double()) - (W.transpose(1, 2) @ share).double()
    # The system fixes effects up to a constant: asking their sum to be zero makes it regular. Questions nobody
    # answered get effect zero. The ridge only matters to draws whose cells fall apart into unconnected parts.
    scale = system.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1)[:, None, None]
    system = system + asked[:, :, None] * asked[:, None, :] + torch.diag_embed(1 - asked) * scale
    system = system + 1e-9 * scale * torch.eye(W.shape[2], dtype=system.dtype, device=W.device)
    return torch.linalg.solve(system, rhs.double()).float()


def check_connected(weights: Tensor, names: list[str]) -> None:
    """Raise unless every two personas are linked by questions that both were kept on.

    Args:
        weights: ``[P, Q]``.
        names: the personas, for the message.

    Raises:
        FitError: names a persona that shares no question, directly or through others, with the first.
    """
    answered = weights > 0
    reached = torch.zeros(len(names), dtype=torch.bool)
    reached[0] = True
    while True:
        questions = answered[reached].any(0)
        grown = reached | answered[:, questions].any(1)
        if bool((grown == reached).all()):
            break
        reached = grown
    if not bool(reached.all()):
        lost = [name for name, r in zip(names, reached.tolist(), strict=True) if not r]
        raise FitError(
            f"After filtering, {', '.join(lost[:5])} share no question with {names[0]}, so question effects "
            "cannot be told from persona effects. Use a looser --filter, more --questions, or --estimator paper."
        )
