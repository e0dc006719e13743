"""Applying interventions to a Hugging Face model, scoped to a ``with`` block.

Contract:

1. Inside the block every forward of the model is intervened on, whatever calls it; after it the model is as before,
   also when an exception left the block.
2. Blocks nest; the inner context sees what the outer one did. A capture entered inside reads the steered stream.
3. A model compiled by ``torch.compile`` would ignore the hooks: entering raises instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from persona_axis.errors import ModelError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.layers import decoder_layers, tapped
from persona_axis.model.loading import ChatModel
from persona_axis.steering import interventions
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.policy import Policy


@contextmanager
def steer(model: Any, axis: Axis, layer: int | None = None, strength: float = 0.0) -> Iterator[None]:
    """Push the residual along the axis at one decoder block.

    Args:
        model: a :class:`ChatModel` or a Transformers model.
        axis: whose direction is used, normalised.
        layer: the decoder block; None is the axis's analysed layer.
        strength: residual-stream units; positive = toward the Assistant, negative = away, 0 changes nothing.

    Raises:
        UsageError: the axis lacks that layer or has another width.
        ModelError: the model is compiled, or its blocks cannot be located.
    """
    layer = axis.layer if layer is None else layer
    with held(model, Policy((interventions.add(layer, axis.at(layer), strength),))):
        yield


@contextmanager
def cap(model: Any, policy: Policy) -> Iterator[None]:
    """Hold the model with a policy (usually floors on the axis) inside the block.

    Raises:
        UsageError: the policy's layers or width do not fit the model.
        ModelError: the model is compiled, or its blocks cannot be located.
    """
    with held(model, policy):
        yield


@contextmanager
def held(model: Any, policy: Policy) -> Iterator[None]:
    """Apply every intervention of a policy at its layer while entered."""
    blocks = model.blocks if isinstance(model, ChatModel) else decoder_layers(model)
    inner = model.model if isinstance(model, ChatModel) else model
    _refuse_compiled(inner)
    _check_fit(policy, len(blocks), inner)
    placed: list[Intervention | None] = [None] * len(policy.interventions)

    def change(i: int, hidden: Tensor) -> Tensor:
        here = placed[i]
        if here is None or here.V.device != hidden.device:
            here = placed[i] = policy.interventions[i].to(hidden.device)
        return interventions.apply(hidden, here)

    with tapped([blocks[layer] for layer in policy.layers], change):
        yield


def _refuse_compiled(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ModelError(
                f"{name or type(model).__name__} is compiled with torch.compile, which skips hooks: the model would "
                "answer unsteered. Pass the uncompiled model."
            )


def _check_fit(policy: Policy, n_layers: int, model: Any) -> None:
    width = model.config.get_text_config(decoder=True).hidden_size
    for intervention in policy.interventions:
        if not 0 <= intervention.layer < n_layers:
            raise UsageError(f"The policy names layer {intervention.layer}; the model has 0 to {n_layers - 1}.")
        if intervention.V.shape[1] != width:
            raise UsageError(
                f"The policy's directions have width {intervention.V.shape[1]}, the model's residual {width}."
            )
