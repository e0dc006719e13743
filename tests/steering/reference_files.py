"""Files as the paper's reference implementation writes them, and its rule, written down independently."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

N_LAYERS, WIDTH = 4, 32  # of the tiny models
MODEL = "org/model"


def random_vectors(seed: int = 0, n_layers: int = N_LAYERS, width: int = WIDTH) -> Tensor:
    """``[n_layers, width]``, of no particular length."""
    return 5 * torch.randn(n_layers, width, generator=torch.Generator().manual_seed(seed))


def capping_config(caps: Mapping[int, float], axis: Tensor, experiment: str = "layers_1:3-p0.25") -> dict[str, Any]:
    """One experiment that caps ``role - default`` (the negated axis) at each layer."""
    vectors = {
        f"layer_{layer}/contrast_role_pos3_default1": {"vector": -axis[layer].bfloat16(), "layer": layer}
        for layer in range(len(axis))
    }
    interventions = [
        {"vector": f"layer_{layer}/contrast_role_pos3_default1", "cap": cap} for layer, cap in caps.items()
    ]
    return {"vectors": vectors, "experiments": [{"id": experiment, "interventions": interventions}]}


@contextmanager
def capped_by_the_reference(blocks: Sequence[Any], config: Mapping[str, Any], experiment: int = 0) -> Iterator[None]:
    """``h <- h - max(0, <h, v> - cap) v`` with v normalised, one intervention after another."""
    with ExitStack() as stack:
        for intervention in config["experiments"][experiment]["interventions"]:
            entry = config["vectors"][intervention["vector"]]
            v = entry["vector"].float() / entry["vector"].float().norm()

            def hook(block: Any, args: Any, output: Any, v: Tensor = v, cap: float = intervention["cap"]) -> Any:
                h = output[0] if isinstance(output, tuple) else output
                excess = ((h * v).sum(-1, keepdim=True) - cap).clamp(min=0)
                return (h - excess * v, *output[1:]) if isinstance(output, tuple) else h - excess * v

            stack.callback(blocks[entry["layer"]].register_forward_hook(hook).remove)
        yield


class RunsCode:
    """Unpickling one makes a file, if it is let."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)
