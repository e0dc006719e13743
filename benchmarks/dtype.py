"""The dtype that ``auto`` chooses on this CPU against the other one: bfloat16 where the CPU has it, else float32.

    python -m benchmarks --only dtype

Claim: the other one takes at least as long. Embedded model, both loaded side by side, 16 prompts from the catalog, 8
new tokens each, no capture.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.material import embedded, prompts
from benchmarks.measure import PAIRS, QUICK_PAIRS, Claim, Result, alone, compare
from benchmarks.rollouts import endless, loop_all
from persona_axis.model.decode import DecodingLoop
from persona_axis.pipeline import default_batch_tokens

CLAIM = Claim("dtype", "auto chooses the faster dtype", 1, "x seconds in the other dtype")
COUNT, TOKENS = 16, 8


def run(quick: bool = False) -> Iterator[Result]:
    count, tokens = (8, 2) if quick else (COUNT, TOKENS)
    chosen = endless(embedded())
    other = endless(embedded("float32" if chosen.dtype == "bfloat16" else "bfloat16"))
    requests = prompts(chosen, count)
    theirs, ours = (DecodingLoop(chat, (), default_batch_tokens(chat), capture=False) for chat in (other, chosen))
    found = compare(
        lambda: loop_all(theirs, requests, tokens),
        lambda: loop_all(ours, requests, tokens),
        rounds=QUICK_PAIRS if quick else PAIRS,
    )
    settings = {"model": "embedded", "auto": chosen.dtype, "other": other.dtype, "prompts": count, "new_tokens": tokens}
    yield Result(CLAIM, found.ratio(), settings, {"seconds_other_auto": found.seconds()})


if __name__ == "__main__":
    alone(run)
