"""What capture costs: the decoding loop with every layer captured against the same loop without capture.

    python -m benchmarks --only capture

Claim: at most 1.03 times the seconds. Embedded model in the dtype that ``auto`` gives, T 0.7, top-p 0.9, 96
prompts from the catalog in one batch, exactly 24 new tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.material import embedded, prompts
from benchmarks.measure import QUICK_PAIRS, Claim, Result, alone, compare
from benchmarks.rollouts import endless, loop_all
from persona_axis.model.decode import DecodingLoop
from persona_axis.pipeline import default_batch_tokens

CLAIM = Claim("capture", "capture of all layers costs <= 3 %", 1.03, "x seconds without capture", at_most=True)
COUNT, TOKENS = 96, 24
CAPTURE_PAIRS = 14  # a difference of some percent


def run(quick: bool = False) -> Iterator[Result]:
    chat = endless(embedded())
    count, tokens = (16, 4) if quick else (COUNT, TOKENS)
    requests = prompts(chat, count)
    layers, batch_tokens = tuple(range(chat.n_layers)), default_batch_tokens(chat)
    on, off = (DecodingLoop(chat, layers, batch_tokens, capture) for capture in (True, False))
    found = compare(
        lambda: loop_all(on, requests, tokens),
        lambda: loop_all(off, requests, tokens),
        rounds=QUICK_PAIRS if quick else CAPTURE_PAIRS,
    )
    settings = {
        "model": "embedded",
        "dtype": chat.dtype,
        "prompts": count,
        "new_tokens": tokens,
        "captured_layers": len(layers),
    }
    yield Result(CLAIM, found.ratio(), settings, {"seconds_on_off": found.seconds()})


if __name__ == "__main__":
    alone(run)
