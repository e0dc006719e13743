"""Decoder models of three small layers, shaped as vLLM's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from small_policies import WIDTH
from torch import Tensor, nn

from persona_axis.serve.vllm.layers import Run

N_LAYERS, ROWS = 3, 5
Seen = list[tuple[int, Tensor]]  # layer, stream


class Fused(nn.Module):
    """The stream in two halves, which the layer's norm adds; the first layer is given no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return self.mlp(self.norm(residual)), residual


class Plain(nn.Module):
    """The stream as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        return hidden + self.mlp(self.norm(hidden))


class Paired(Plain):
    """The stream as one tensor, and a second that is none."""

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        return super().forward(hidden, None), None


class PPMissingLayer(nn.Identity):
    """What stands for a layer of another pipeline stage."""


class Decoder(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module], n_layers: int = N_LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(n_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden, residual = hidden * 1, None
        for layer in self.layers:
            if isinstance(layer, PPMissingLayer):
                continue
            out = layer(hidden, residual)
            hidden, residual = out if isinstance(out, tuple) else (out, None)
        return hidden if residual is None else hidden + residual


class ForCausalLM(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.model = Decoder(kind)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(hidden)


class WithVision(nn.Module):
    """A vision tower of as many layers beside the language model."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.vision_tower, self.language_model = Decoder(Plain), ForCausalLM(kind)

    def get_language_model(self) -> nn.Module:
        return self.language_model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.language_model(hidden)


KINDS = [Fused, Plain, Paired]


def a_model(kind: Callable[[], nn.Module] = Fused, seed: int = 0) -> ForCausalLM:
    torch.manual_seed(seed)
    return ForCausalLM(kind).eval().requires_grad_(False)


def inputs(rows: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def streams(
    model: ForCausalLM, hidden: Tensor, moved: Callable[[int, Tensor], Tensor] = lambda _, h: h
) -> list[Tensor]:
    """After each layer of a model without the operator, each ``moved`` before the next reads it."""
    seen = []
    for i, layer in enumerate(model.model.layers):
        out = type(layer).forward(layer, hidden, None)  # the whole stream is given as hidden
        hidden, residual = out if isinstance(out, tuple) else (out, None)
        hidden = moved(i, hidden if residual is None else hidden + residual)
        seen.append(hidden)
    return seen


def watching(seen: Seen) -> Run:
    """What notes the layers that it runs at, and their streams."""

    def run(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
        seen.append((layer, hidden.clone() if residual is None else hidden + residual))

    return run
