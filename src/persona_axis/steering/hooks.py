"""Applying interventions to a Hugging Face model, scoped to a ``with`` block.

Contract:

1. Inside the block every forward of the model is intervened on, whatever calls it; after it the model is as before,
   also when an exception left the block.
2. Blocks nest; the inner context sees what the outer one did. A capture entered inside reads the steered stream.
3. Code compiled by ``torch.compile`` ignores hooks entered after it was compiled, on this model or on another of its
   class. While any block is entered, compiled code runs uncompiled (``torch.compiler.set_stance``), in every thread
   of the process: slower, and never unsteered. Who changes the stance inside the block turns that off.
4. A forward that went past a block of the policy (a CUDA graph, a replaced block) raises when it ends.
5. A policy for some positions only is told which tokens pass (:mod:`persona_axis.model.tokens`), or raises.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from persona_axis.errors import ModelError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import ModelIdentity
from persona_axis.model.layers import compiled_code_runs_eager, decoder_layers, tapped, text_decoder
from persona_axis.model.loading import ChatModel
from persona_axis.model.tokens import announcement, of_forward
from persona_axis.steering import interventions, op
from persona_axis.steering.compatibility import Compatibility, check_fits
from persona_axis.steering.interventions import Bound, Intervention
from persona_axis.steering.policy import Policy

Unit = Literal["raw", "norm"]


@contextmanager
def steer(
    model: Any, axis: Axis, layer: int | None = None, strength: Bound = 0.0, unit: Unit = "raw"
) -> Iterator[None]:
    """Push the residual along the axis at one decoder block.

    Args:
        model: a :class:`ChatModel` or a Transformers model.
        axis: whose direction is used, normalised.
        layer: the decoder block; None is the axis's analysed layer.
        strength: positive = toward the Assistant, negative = away, 0 changes nothing. ``[batch, 1]`` steers each
            sequence of a batch by its own.
        unit: ``raw`` is residual-stream units; ``norm`` is the layer's mean residual norm (:meth:`Axis.norm_at`).

    Raises:
        UsageError: the axis lacks that layer or has another width, or does not know the layer's norm; unknown unit.
        ModelError: the model's blocks cannot be located.
    """
    if unit not in get_args(Unit):
        raise UsageError(f"Unknown unit {unit!r}; choose from {', '.join(get_args(Unit))}.")
    layer = axis.layer if layer is None else layer
    norm = axis.norm_at(layer) if unit == "norm" else 1.0
    with held(model, Policy((interventions.add(layer, axis.at(layer), strength, norm),))):
        yield


@contextmanager
def cap(model: Any, policy: Policy, allow_model: str | None = None) -> Iterator[Compatibility]:
    """Hold the model with a policy (usually floors on the axis) inside the block.

    Args:
        model: a :class:`ChatModel` or a Transformers model.
        policy: what to hold it with.
        allow_model: name of the loaded model, to hold it with a policy made for another of the same shape.

    Yields:
        Which policy holds, and what was let pass for that.

    Raises:
        UsageError: the policy does not fit the model, or was made for another one.
        ModelError: the model's blocks cannot be located.
    """
    with held(model, policy, allow_model) as fits:
        yield fits


@contextmanager
def held(model: Any, policy: Policy, allow_model: str | None = None) -> Iterator[Compatibility]:
    """Apply every intervention of a policy at its layer while entered; arguments as for :func:`cap`."""
    blocks = model.blocks if isinstance(model, ChatModel) else decoder_layers(model)
    inner = model.model if isinstance(model, ChatModel) else model
    fits = check_fits(policy, ModelIdentity.of(model), allow_model)
    placed: list[Intervention | None] = [None] * len(policy.interventions)
    forwards = _Forwards(policy)

    def change(i: int, hidden: Tensor) -> Tensor:
        here = placed[i]
        if here is None or here.V.device != hidden.device:
            with torch.inference_mode(False):  # a later forward may want gradients
                here = placed[i] = policy.interventions[i].to(hidden.device)
        if here.batch is not None:
            _check_batch(here, hidden)
        return _changed(hidden, here, forwards.chosen(here.layer, hidden))

    with ExitStack() as stack:
        stack.enter_context(compiled_code_runs_eager())
        stack.enter_context(forwards.watched(inner))
        stack.enter_context(tapped([blocks[layer] for layer in policy.layers], change))
        yield fits


def _changed(hidden: Tensor, here: Intervention, where: Tensor | None) -> Tensor:
    """On a GPU by the fused kernel, which knows one policy for all tokens and no gradients."""
    plain = where is None and here.batch is None and not (torch.is_grad_enabled() and hidden.requires_grad)
    if hidden.is_cuda and plain and hidden.dtype in op.STREAM_DTYPES and _kernel_agrees(hidden.device, hidden.dtype):
        return op.intervened(hidden, here.V, here.lo, here.hi, here.shift)
    return interventions.apply(hidden, here, where)


@cache
def _kernel_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernel computes the formula on this device: asked once, before it is relied on."""
    with torch.inference_mode(False):
        random = torch.Generator().manual_seed(0)
        directions, stream = (torch.randn(n, 96, generator=random) for n in (2, 64))
        trial = interventions.band(0, directions, -0.5, 0.5).to(device)
        hidden = stream.to(device, dtype)
        found = op.intervened(hidden, trial.V, trial.lo, trial.hi, trial.shift)
        agrees = torch.allclose(found.float(), interventions.apply(hidden, trial).float(), rtol=2.0**-7, atol=1e-3)
    if not agrees:
        warnings.warn(f"The fused kernel is wrong on {device} in {dtype}; plain PyTorch is used.", stacklevel=2)
    return agrees


class _Forwards:
    """Forwards under way: which of their tokens a policy means, and which of its blocks they have been through."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.thread = _Thread(policy.layers)

    @contextmanager
    def watched(self, model: Any) -> Iterator[None]:
        """Watch the model, and the decoder in it, which can be run by itself."""
        whole, decoder = (getattr(m, "_orig_mod", m) for m in (model, text_decoder(model)))  # what compiling wrapped
        with ExitStack() as stack:
            for module in dict.fromkeys((whole, decoder)):
                stack.callback(module.register_forward_pre_hook(self._begin).remove)
                stack.callback(module.register_forward_hook(self._end).remove)
            if self.policy.positions != "all":
                stack.callback(decoder.register_forward_pre_hook(self._choose, with_kwargs=True).remove)
            yield

    def chosen(self, layer: int, hidden: Tensor) -> Tensor | None:
        """``[batch, tokens]`` bool on hidden's device; None is every token."""
        self.thread.passes[layer] += 1
        if self.policy.positions == "all":
            return None
        chosen = self.thread.chosen
        if chosen is None or chosen.shape != hidden.shape[:2]:
            raise UsageError(
                f"A policy for positions {self.policy.positions!r} needs the whole model's forward: a decoder block "
                f"was called by itself, with hidden states {tuple(hidden.shape)}."
            )
        return chosen.to(hidden.device)

    def _begin(self, module: Any, args: Any) -> None:
        self.thread.begun[module] = dict(self.thread.passes)

    def _choose(self, decoder: Any, args: Any, kwargs: Any) -> None:
        self.thread.chosen = of_forward(decoder, args, kwargs, replies=self.policy.positions == "reply")

    def _end(self, module: Any, args: Any, output: Any) -> None:
        self.thread.chosen = None
        begun = self.thread.begun.get(module, {})  # none: the block was entered in another thread meanwhile
        passed = [layer for layer, n in begun.items() if n == self.thread.passes[layer]]
        if passed:
            raise ModelError(
                f"A forward of {type(module).__name__} went past the decoder blocks of layers {passed}, so their "
                "interventions took no effect. Was a block replaced, or the model captured in a CUDA graph? Do that "
                "before, or not at all; and let no generation leave the model at an early layer."
            )


class _Thread(threading.local):
    """A forward's hooks all run in its thread."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.chosen: Tensor | None = None
        self.passes = dict.fromkeys(layers, 0)  # outputs of each block so far
        self.begun: dict[Any, dict[int, int]] = {}  # passes when the latest forward of a module began


def _check_batch(here: Intervention, hidden: Tensor) -> None:
    said = announcement()
    if said is not None and said.rows_move:
        raise UsageError(
            f"Layer {here.layer} has bounds for each sequence of a batch of {here.batch}, and what runs now forms its "
            "own batches. Use model.generate or model(...), or one context per strength."
        )
    if len(hidden) != here.batch:
        raise UsageError(
            f"Layer {here.layer} has bounds for a batch of {here.batch} sequences; {len(hidden)} pass through."
        )
