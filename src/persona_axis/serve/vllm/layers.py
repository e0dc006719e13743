"""One operator after every decoder layer of a vLLM model, put there before anything is compiled or captured.

Contract:

1. Layers are found by structure: the one outermost ``ModuleList`` as long as the configuration says, in the language
   model. Their numbers are global, whatever part of them a pipeline stage holds.
2. vLLM's layers keep the residual stream in two halves, ``(hidden, residual)``, which the next norm adds; others return
   the stream as one tensor. Both are understood, anything else raises while the model is traced. Where there are two
   halves it does not matter which of them is changed.
3. The operator is given the number of the layer, and of the model in this process. What it does is looked up when it
   runs: code that was compiled ahead of time holds no buffer, no policy and no decision.
4. It says that it changes ``hidden``, so that no compiler drops or moves it. An exception in it ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from persona_axis.errors import ModelError
from persona_axis.model.layers import lists_of_blocks

# What runs at a layer: (hidden, residual or None, layer).
Run = Callable[[Tensor, "Tensor | None", int], None]

_models: list[Run] = []  # by number; compiled code keeps the number

_library = torch.library.Library("persona_axis", "FRAGMENT")
_library.define("hold_(Tensor(a!) hidden, Tensor? residual, int layer, int model) -> ()")


def _hold(hidden: Tensor, residual: Tensor | None, layer: int, model: int) -> None:
    _models[model](hidden, residual, layer)


_library.impl("hold_", _hold, "CPU")
_library.impl("hold_", _hold, "CUDA")
_library.impl("hold_", lambda *_: None, "Meta")


def next_model() -> int:
    """The number that the next model armed in this process will have."""
    return len(_models)


def vllm_layers(model: Any, n_layers: int) -> dict[int, nn.Module]:
    """The decoder layers of a vLLM model that this process holds, by their global numbers.

    Raises:
        ModelError: none or several lists of ``n_layers`` modules.
    """
    root = model.get_language_model() if hasattr(model, "get_language_model") else model
    outer, seen = lists_of_blocks(root, n_layers)
    if len(outer) == 1:
        return {layer: block for layer, block in enumerate(outer[0][1]) if not _is_missing(block)}
    raise ModelError(
        f"Cannot tell which modules of {type(model).__name__} are its {n_layers} decoder layers "
        f"({len(outer)} lists match). Saw {seen}. The model cannot be held; PERSONA_AXIS_DISABLE=1 serves it without."
    )


def arm(blocks: Mapping[int, nn.Module], run: Run) -> None:
    """Call ``run`` after every one of a model's decoder layers.

    Raises:
        ModelError: a layer has a ``forward`` besides its class's, which would run instead of the operator's.
    """
    own = [layer for layer, block in blocks.items() if "forward" in vars(block)]
    if own:
        raise ModelError(
            f"Layer {own[0]} has a forward of its own, as layers with offloaded weights have: it would run unheld. "
            "Turn offloading off (--cpu-offload-gb, --offload-group-size), or serve without the plugin "
            "(PERSONA_AXIS_DISABLE=1)."
        )
    number = next_model()
    for layer, block in blocks.items():
        block.__class__ = _armed(type(block))
        block.persona_axis_layer, block.persona_axis_model = layer, number  # type: ignore[assignment]
    _models.append(run)


def armed(blocks: Mapping[int, nn.Module]) -> tuple[int, ...]:
    """Which of them carry the operator: asked of the modules themselves, for the launcher's check."""
    return tuple(layer for layer, block in blocks.items() if getattr(type(block), "persona_axis", False))


def _is_missing(block: nn.Module) -> bool:
    """A placeholder for a layer of another pipeline stage."""
    return type(block).__name__ in ("PPMissingLayer", "StageMissingLayer")


def _armed(kind: type[nn.Module]) -> type[nn.Module]:
    """The layer's class with the operator after its ``forward``."""
    plain: Callable[..., Any] = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        hidden, residual = stream_of(output, kind.__name__)
        torch.ops.persona_axis.hold_(hidden, residual, self.persona_axis_layer, self.persona_axis_model)
        return output

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "persona_axis": True})


def stream_of(output: Any, where: str) -> tuple[Tensor, Tensor | None]:
    """The halves of the residual stream in what a layer returns.

    Raises:
        ModelError: it is neither ``hidden`` nor ``(hidden, residual or None)`` of one shape.
    """
    parts = output if isinstance(output, tuple) and output else (output,)
    hidden, residual = parts[0], parts[1] if len(parts) > 1 else None
    if (
        len(parts) <= 2
        and isinstance(hidden, Tensor)
        and hidden.dim() == 2
        and (residual is None or (isinstance(residual, Tensor) and residual.shape[1:] == hidden.shape[1:]))
    ):
        return hidden, residual
    shapes = ", ".join(str(list(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts)
    raise ModelError(
        f"A layer {where} returned ({shapes}), where hidden states [tokens, d_model], or these and their residual, "
        "were expected: the model cannot be held. PERSONA_AXIS_DISABLE=1 serves it without."
    )
