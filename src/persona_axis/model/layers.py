"""Where the decoder blocks are, and reading their output.

Blocks are found by structure: the one ``ModuleList`` under the text decoder whose length is the configured
number of layers. Names of model families play no part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from persona_axis.errors import ModelError

# What a tap does with a block's output: (position in the list of tapped layers, hidden) -> new hidden or None.
Tap = Callable[[int, Tensor], Tensor | None]


def text_config(model: Any) -> Any:
    """The configuration of the text decoder (multimodal models nest it)."""
    return model.config.get_text_config(decoder=True)


def text_decoder(model: Any) -> Any:
    """The decoder without its language-model head: what turns token ids into final hidden states."""
    decoder = model.get_decoder()
    return decoder if decoder is not None and decoder is not model else model.base_model


def decoder_layers(model: Any, path: str | None = None) -> nn.ModuleList:
    """The decoder blocks in execution order.

    Args:
        model: a Transformers model with a text decoder.
        path: where they are (``"model.layers"``), for a model in which they cannot be told by structure.

    Raises:
        ModelError: none or several lists of blocks match; names what was looked at.
    """
    if path is not None:
        return _layers_at(model, path)
    n_layers = text_config(model).num_hidden_layers
    root = text_decoder(model)
    outer, seen = lists_of_blocks(root, n_layers)
    if len(outer) == 1:
        return _distinct(outer[0][1], model)
    found = "none" if not outer else "several: " + ", ".join(name for name, _ in outer)
    raise ModelError(
        f"Cannot tell which modules of {type(model).__name__} are its {n_layers} decoder blocks ({found}). "
        f"Looked under {type(root).__name__} and saw {seen}. Name the path: load_model(..., layers_path='...')."
    )


def lists_of_blocks(root: nn.Module, n_layers: int) -> tuple[list[tuple[str, nn.ModuleList]], str]:
    """Named lists of ``n_layers`` modules under ``root`` that may be its blocks, and, for people, all that were seen.

    Experts of a mixture can number as many as the layers; they live inside a block, so the outermost wins.
    """
    lists = [(name, m) for name, m in root.named_modules() if isinstance(m, nn.ModuleList)]
    matches = [(name, m) for name, m in lists if len(m) == n_layers]
    outer = [(name, m) for name, m in matches if not any(name.startswith(other + ".") for other, _ in matches)]
    return outer, ", ".join(f"{name or '(root)'} of {len(m)}" for name, m in lists) or "no ModuleList at all"


def _layers_at(model: Any, path: str) -> nn.ModuleList:
    try:
        layers = model.get_submodule(path)
    except AttributeError as e:
        raise ModelError(f"{type(model).__name__} has no module at layers_path {path!r}.") from e
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"layers_path {path!r} is a {type(layers).__name__}, not a ModuleList of blocks.")
    return _distinct(layers, model)


def _distinct(blocks: nn.ModuleList, model: Any) -> nn.ModuleList:
    if len({id(block) for block in blocks}) < len(blocks):
        raise ModelError(f"Layers of {type(model).__name__} share one block: a hook cannot tell them apart.")
    return blocks


def hidden_of(output: Any, where: str) -> Tensor:
    """The hidden states in a block's output, which is a tensor or a tuple that starts with it."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ModelError(f"{where} returned {shape} where [batch, tokens, d_model] was expected.")
    return hidden


@contextmanager
def tapped(blocks: Sequence[nn.Module], tap: Tap) -> Iterator[None]:
    """Call ``tap`` with every output of ``blocks`` while entered; a returned tensor replaces the output.

    All hooks or none: if one cannot be registered those before it are removed. Hooks registered later see what
    earlier ones changed, so a capture entered inside a steering context reads the steered stream. Compiled code runs
    uncompiled meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(compiled_code_runs_eager())
        for i, block in enumerate(blocks):
            handle = block.register_forward_hook(_hook(i, tap))
            stack.callback(handle.remove)
        yield


# Blocks of several threads overlap: compiled code stays off until the last one is left.
_eager_lock = threading.Lock()
_eager_blocks = 0
_eager_stance = ExitStack()


@contextmanager
def compiled_code_runs_eager() -> Iterator[None]:
    """Compiled code runs uncompiled while entered, in every thread of the process.

    What ``torch.compile`` made ignores hooks registered after it was compiled, and what it would make meanwhile would
    keep them.

    Raises:
        ModelError: entered in compiled code.
    """
    global _eager_blocks
    with _eager_lock:
        try:
            stance = torch.compiler.set_stance("force_eager")  # again for each: someone may have changed it
        except RuntimeError as e:
            raise ModelError(
                "A model cannot be steered or read from inside a function that is compiled with torch.compile. Enter "
                "outside of it, or leave the function uncompiled."
            ) from e
        if _eager_blocks == 0:
            _eager_stance.enter_context(stance)
        _eager_blocks += 1
    try:
        yield
    finally:
        with _eager_lock:
            _eager_blocks -= 1
            if _eager_blocks == 0:
                _eager_stance.close()


def _hook(i: int, tap: Tap) -> Any:
    def hook(block: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output, f"Decoder block {i} ({type(block).__name__})")
        changed = tap(i, hidden)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def check_layers(requested: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """The captured layers as a sorted tuple; None is all of them."""
    if requested is None:
        return tuple(range(n_layers))
    wrong = [layer for layer in requested if not 0 <= layer < n_layers]
    if wrong or not requested:
        raise ModelError(f"Layers {wrong or '(none)'} asked for; this model has layers 0 to {n_layers - 1}.")
    return tuple(sorted(set(requested)))


def main_device(model: nn.Module) -> torch.device:
    """Where inputs go: the device of the input embeddings."""
    return model.get_input_embeddings().weight.device  # type: ignore[operator]
