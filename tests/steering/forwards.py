"""Plain forwards that the tests of steering compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from persona_axis.geometry.axis import Axis
from persona_axis.model.layers import tapped
from persona_axis.model.loading import ChatModel
from persona_axis.steering.policy import Policy

IDS = torch.arange(3, 33).reshape(2, 15)
WIDTH = 32
LAYERS = (0, 1, 2, 3)
SLACK = 2e-3  # rounding of float32 residuals of the tiny models, whose projections are in the tens


def an_axis() -> Axis:
    vectors = 3 * torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    return Axis(vectors, LAYERS, 2)


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    inner = model.model if isinstance(model, ChatModel) else model
    return inner(input_ids=ids, attention_mask=mask, use_cache=False).logits.clone()


@contextmanager
def captured(chat: ChatModel, layers: Sequence[int] = LAYERS) -> Iterator[dict[int, Tensor]]:
    """Block outputs of the latest forward."""
    seen: dict[int, Tensor] = {}

    def keep(i: int, hidden: Tensor) -> None:
        seen[layers[i]] = hidden.clone()

    with tapped([chat.blocks[layer] for layer in layers], keep):
        yield seen


def outputs(chat: ChatModel, ids: Tensor = IDS) -> dict[int, Tensor]:
    """Block outputs as something entered inside of whatever is entered now sees them."""
    with captured(chat) as seen:
        logits(chat, ids)
    return seen


def floors_between(chat: ChatModel, axis: Axis, layers: Sequence[int]) -> dict[int, float]:
    """Floors that half of the tokens of a plain forward lie below, and no token near."""
    plain = outputs(chat)
    floors = {}
    for layer in layers:
        p = axis.project(plain[layer], layer).flatten().sort().values
        middle = len(p) // 2
        floors[layer] = float(p[middle - 1 : middle + 1].mean())
    return floors


def n_hooks(chat: ChatModel) -> int:
    """Ours: Transformers leaves hooks of its own on a model once asked for ``output_hidden_states``."""
    hooks = [hook for block in chat.blocks for hook in block._forward_hooks.values()]
    return sum(hook.__module__ == "persona_axis.model.layers" for hook in hooks)


@torch.inference_mode()
def generated(model: Any, prompt: Tensor, n: int, **options: Any) -> list[list[int]]:
    """Greedy tokens for each row of ``prompt``, by ``generate``."""
    inner = model.model if isinstance(model, ChatModel) else model
    options.setdefault("attention_mask", torch.ones_like(prompt))
    out = inner.generate(prompt, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0, **options)
    return out[:, prompt.shape[1] :].tolist()


@torch.inference_mode()
def changed_by_hand(
    chat: ChatModel, ids: Sequence[int], policy: Policy, meant: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """One forward over a sequence whose tokens ``meant`` are intervened on, one at a time, in float64.

    Returns:
        Block outputs ``[n_layers, tokens, d_model]`` and logits ``[tokens, vocabulary]``.
    """
    seen: list[Tensor] = []

    def hook_for(layer: int) -> Any:
        part = next((i for i in policy.interventions if i.layer == layer), None)

        def hook(block: Any, args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for t in range(hidden.shape[1]):
                if part is not None and meant[t]:
                    h = hidden[0, t].double()
                    for v, lo, hi, shift in zip(part.V.double(), part.lo, part.hi, part.shift, strict=True):
                        p = float(h @ v)
                        h = h + (min(max(p, float(lo)), float(hi)) - p + float(shift)) * v
                    hidden[0, t] = h.float()
            seen.append(hidden[0])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(chat.blocks):
            stack.callback(block.register_forward_hook(hook_for(layer)).remove)
        out = chat.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return torch.stack(seen), out
