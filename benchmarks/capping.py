"""What holding a model costs: the decoding loop with 8 capped layers against the same loop without.

    python -m benchmarks --only capping

Claim: at least 0.98 times the tokens per second. Embedded model in the dtype that ``auto`` gives, T 0.7, top-p 0.9, 96
prompts from the catalog in one batch, exactly 24 new tokens each, no capture. The directions are random; the floors
lie where about half of the tokens are changed in each of layers 20 to 27 (`share_changed`). The hooks are entered anew
for each timing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.material import embedded, prompts
from benchmarks.measure import QUICK_PAIRS, Claim, Result, alone, compare
from benchmarks.rollouts import endless, loop_all
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Request
from persona_axis.model.layers import tapped
from persona_axis.pipeline import default_batch_tokens
from persona_axis.steering import interventions
from persona_axis.steering.hooks import held
from persona_axis.steering.policy import Policy

CLAIM = Claim("capping", "8 capped layers cost <= 2 %", 0.98, "x tokens/s without")
COUNT, TOKENS = 96, 24
LAYERS = tuple(range(20, 28))
CAPPING_PAIRS = 24  # a difference of a percent
PASSES = 3  # floors of one layer move the projections at the next


def run(quick: bool = False) -> Iterator[Result]:
    chat = endless(embedded())
    count, tokens = (16, 4) if quick else (COUNT, TOKENS)
    requests = prompts(chat, count)
    loop = DecodingLoop(chat, (), default_batch_tokens(chat), capture=False)
    policy = calibrated(loop, requests, tokens)

    def capped() -> None:
        with held(chat, policy):
            loop_all(loop, requests, tokens)

    found = compare(capped, lambda: loop_all(loop, requests, tokens), rounds=QUICK_PAIRS if quick else CAPPING_PAIRS)
    seen = projections(loop, policy, requests, tokens)
    share = [float((p < part.lo).float().mean()) for p, part in zip(seen, policy.interventions, strict=True)]
    settings = {"model": "embedded", "dtype": chat.dtype, "prompts": count, "new_tokens": tokens, "layers": LAYERS}
    details = {"share_changed": share, "seconds_capped_plain": found.seconds()}
    yield Result(CLAIM, found.ratio(1, 0), settings, details)


def calibrated(loop: DecodingLoop, requests: list[Request], tokens: int) -> Policy:
    """Caps whose floors are the medians of what each layer sees, those before it capped."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(len(LAYERS), loop.chat.d_model, generator=random)
    policy = _caps(directions, [-torch.inf] * len(LAYERS))
    for _ in range(PASSES):
        policy = _caps(directions, [float(p.median()) for p in projections(loop, policy, requests, tokens)])
    return policy


def _caps(directions: Tensor, floors: list[float]) -> Policy:
    return Policy(tuple(map(interventions.cap, LAYERS, directions, floors)))


def projections(loop: DecodingLoop, policy: Policy, requests: list[Request], tokens: int) -> list[Tensor]:
    """Of every token at every layer of a held model, before that layer's intervention; one ``[n]`` per layer."""
    seen: list[list[Tensor]] = [[] for _ in LAYERS]

    def see(i: int, hidden: Tensor) -> None:
        seen[i].append((hidden.float() @ policy.interventions[i].V[0]).flatten())

    # Entered first, so it sees each output before it is changed.
    with tapped([loop.chat.blocks[layer] for layer in LAYERS], see), held(loop.chat, policy):
        loop_all(loop, requests, tokens)
    return [torch.cat(parts) for parts in seen]


if __name__ == "__main__":
    alone(run)
