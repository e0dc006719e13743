"""What engines are compared with: forwards of the same model in Transformers, with hooks written here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_axis.steering.policy import Policy


@dataclass(frozen=True)
class Forward:
    """One forward over one sequence.

    Attributes:
        outputs: of every decoder layer, after its intervention, ``[n_layers, tokens, d_model]``.
        projections: layer of the policy -> ``[tokens, directions]``, before its intervention.
        logits: ``[tokens, vocabulary]`` float32.
    """

    outputs: Tensor
    projections: dict[int, Tensor]
    logits: Tensor

    def mean(self, start: int, end: int) -> Tensor:
        """``[n_layers, d_model]`` over the tokens from ``start`` to before ``end``."""
        return self.outputs[:, start:end].double().mean(1).float()


@torch.inference_mode()
def forward(
    model: Any,
    ids: Sequence[int],
    policy: Policy | None = None,
    strength: float = 1.0,
    held_from: int = 0,
) -> Forward:
    """A forward over ``ids``, whose tokens from ``held_from`` on are held, in float64 at each layer.

    Strength 0 leaves the stream as it is and projects it.
    """
    parts = {part.layer: part for part in policy.interventions} if policy else {}
    outputs: list[Tensor] = []
    projections: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Any:
        def hook(block: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            if layer in parts:
                part = parts[layer]
                h = hidden[0].double()
                p = h @ part.V.double().T
                projections[layer] = p.float()
                if strength:
                    bounded = torch.minimum(torch.maximum(p, part.lo.double()), part.hi.double())
                    moved = h + (bounded - p + strength * part.shift.double()) @ part.V.double()
                    hidden[0, held_from:] = moved[held_from:].to(hidden.dtype)
            outputs.append(hidden[0].float())
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(model.model.layers):
            stack.callback(block.register_forward_hook(hook_of(layer)).remove)
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return Forward(torch.stack(outputs), projections, logits)


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], n: int) -> list[int]:
    """The plain model's reply of ``n`` tokens."""
    ids = torch.tensor([list(prompt)])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return list(model.generate(ids, max_new_tokens=n, **options)[0, len(prompt) :].tolist())


def continued(model: Any, prompt: Sequence[int], n: int, policy: Policy | None) -> list[int]:
    """The held model's greedy reply, with a whole forward for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(forward(model, ids, policy).logits[-1].argmax()))
    return ids[len(prompt) :]


def is_greedy(of: Forward, prompt: int, reply: Sequence[int]) -> bool:
    """Whether the reply to a prompt of so many tokens is what the forward over both says."""
    return of.logits[prompt - 1 : prompt - 1 + len(reply)].argmax(-1).tolist() == list(reply)


def off_by(got: Any, wanted: Tensor) -> float:
    """The largest relative error of any layer, of ``[n_layers, d_model]``."""
    given = torch.as_tensor(got)
    return float(((given - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
