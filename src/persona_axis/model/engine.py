"""What every generation engine promises, whatever runs the model.

The collector asks for replies and gets each back with its exact token ids, log-probabilities and the mean
residual of its content, as soon as it is finished and in any order. ``model.decode`` implements this for
Hugging Face models; a serving engine implements it elsewhere and is found by the entry point group
``persona_axis.engines``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import entry_points
from typing import Literal, Protocol, cast

import numpy as np
import torch

from persona_axis.errors import UsageError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to generate."""

    key: str  # unique; seeds the reply's own random stream
    prompt_ids: tuple[int, ...]
    shared_prefix: int = 0  # leading prompt tokens that other requests share (prefilled once)
    replies: tuple[tuple[int, int], ...] = ()  # assistant turns among the prompt's tokens, start..end-1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. ``temperature=0`` is greedy; ``top_p=1`` is the whole distribution."""

    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """A finished reply.

    ``activation`` is the mean post-block residual over the counted tokens, ``[n_captured, d_model]`` float32,
    or None when nothing counts. The end-of-turn token never counts; the last token of a reply cut by the
    token limit does not either, because it was never an input. Thinking tokens do not count.
    """

    key: str
    token_ids: np.ndarray  # int32 [n], as generated, the end-of-turn token included when there was one
    logprobs: np.ndarray  # float32 [n], full softmax at temperature 1, nats
    finish_reason: FinishReason
    n_counted: int
    content_start: int  # index of the first content token (> 0 after a thinking block)
    activation: torch.Tensor | None


OnTokens = Callable[[int], None]  # told how many tokens were made, as they are made


def nobody(tokens: int) -> None:
    """An :data:`OnTokens` that is not interested."""


class Engine(Protocol):
    """Turns requests into replies; ``layers`` are the captured decoder blocks, in this order."""

    name: str
    layers: tuple[int, ...]

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: OnTokens = nobody
    ) -> Iterator[Reply]: ...

    def close(self) -> None:
        """Let go of processes and memory of its own, when no more is to be generated."""


LOOP = "loop"  # the engine of this package, or what stands in for it
ENGINES = "persona_axis.engines"  # entry points of others: a function (chat, layers or None, batch_tokens) -> Engine


def engine_named(name: str) -> Callable[..., Engine]:
    """What starts another engine than our own.

    Raises:
        UsageError: no installed package has it.
    """
    found = entry_points(group=ENGINES, name=name)
    if not found:
        known = ", ".join([LOOP, *sorted(entry_points(group=ENGINES).names)])
        raise UsageError(f"There is no engine {name!r}; choose from {known}.")
    return cast("Callable[..., Engine]", next(iter(found)).load())


def reply_seed(seed: int, key: str) -> int:
    """64 bits that belong to rollout ``key`` under ``seed``, for samplers that take a seed of their own."""
    return int.from_bytes(blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest(), "little")


def random_stream(seed: int, key: str, n: int) -> np.ndarray:
    """The ``n`` uniforms in [0, 1) that belong to rollout ``key`` under ``seed``; float64.

    Counter-based and keyed by content, so that a rollout draws the same numbers alone, in any batch and
    after a resume.
    """
    digest = blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n)
