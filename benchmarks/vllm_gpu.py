"""The vLLM plugin on a GPU: is what it does right in CUDA graphs, and what does it cost?

    python -m benchmarks.vllm_gpu [--model Qwen/Qwen3-0.6B] [--starts 5] [--out runs/bench/vllm_gpu.json]

in an environment that has vLLM. Exit code 0: every check is met. 1: one is not. 2: no CUDA device, or no vLLM. A check
that could not be made (one GPU), or a figure whose interval holds its aim, is "open" and fails nothing.

Engines are started one after another, each in a process of its own, when the first check needs it:

- `graphs`: as vLLM starts by itself, model runner V2; `V1`: the other runner; `eager`; `pair`: on two GPUs
- `plain`: the same with ``PERSONA_AXIS_DISABLE=1``; `cached`: with prefix caching; `preempted`: with too small a cache
- `speed`: engines with the plugin and without, in turn (``benchmarks/serving.py``)

The policies are caps on random directions in eight layers: two well above what the model does by itself, one of these
also for generated tokens alone, and one at the medians, whose replies stay readable. What the checks demand, and what
they allow, is in ``benchmarks/vllm_gpu_checks.py``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import serving
from benchmarks.machine import machine
from benchmarks.vllm_child import ChildFailed, Start, environment, in_child, missing, start_of, with_start
from benchmarks.vllm_gpu_checks import CAPPED, DECODING, POLICIES, WORDS, Check, Outcome, Runs, checks
from persona_axis.errors import PersonaAxisError
from persona_axis.files.atomic import make_folder, write_json
from persona_axis.steering.artifact import load_policy
from persona_axis.steering.policy import Policy

TYPICAL = "typical"
LIFTS = {**dict.fromkeys(CAPPED, 3.0), TYPICAL: 0.0}  # of the floors over the medians, in standard deviations
CAPTURED = ("off", TYPICAL)
CAPTURING = ("graphs", "V1", "eager", "pair", "cached", "preempted")  # whose replies Hugging Face reads again
SEQUENCES = 32
CRAMPED = {"positions": 3072, "tokens": 192, "statistics": True}  # a cache for a third of what 32 requests want


# ---- engines --------------------------------------------------------------------------------------------------------


class Asked(dict[str, Any]):
    """What engines and Hugging Face said, by name; each is asked when it is first looked up, and once."""

    def __init__(self, makers: Mapping[str, Callable[[Asked], Any]]) -> None:
        super().__init__()
        self.makers = makers
        self.failed: dict[str, ChildFailed] = {}

    def __missing__(self, name: str) -> Any:
        if name in self.failed:
            raise self.failed[name]
        print(f"-- {name}", file=sys.stderr, flush=True)
        try:
            self[name] = self.makers[name](self)
        except ChildFailed as e:
            self.failed[name] = e
            raise
        return self[name]

    def need(self, name: str) -> None:
        """Have it asked now."""
        self.__getitem__(name)


def makers(start: Start, starts: int, folder: Path) -> dict[str, Callable[[Asked], Any]]:
    """How each is asked. ``folder`` is for policies and replies."""
    caps = folder / "policies"

    def child(function: str, begun: Start, runner: str = "", **arguments: Any) -> Any:
        variables = environment(begun, caps, runner=runner)
        return in_child(f"benchmarks.vllm_gpu_engines:{function}", variables, **with_start(begun, **arguments))

    def observed(name: str, runs: Asked, runner: str = "", **changes: Any) -> Any:
        runs.need("policies")
        replies = {"captured": CAPTURED, "replies": str(folder / name)}
        return child("observe", replace(start, **changes), runner, policies=POLICIES, folder=str(caps), **replies)

    def special(function: str, runs: Asked, policies: Sequence[str], **changes: Any) -> Any:
        runs.need("policies")
        begun = replace(start, **changes)
        return child(function, begun, policies=policies, folder=str(caps), replies=str(folder / function))

    def plain(runs: Asked) -> Any:
        arguments = with_start(start, policies=[None] * len(POLICIES), folder=None)
        return in_child("benchmarks.vllm_gpu_engines:observe", environment(start, disabled=True), **arguments)

    def read_again(name: str, runs: Asked) -> Any:
        runs.need(name)
        arguments = {"model": start.source, "dtype": start.dtype, "folder": str(caps), "replies": str(folder / name)}
        return in_child("benchmarks.vllm_gpu_engines:read_again", environment(start), **arguments)

    return {
        "policies": lambda _: made_policies(start, caps),
        "plain": plain,
        "graphs": partial(observed, "graphs"),
        "V1": partial(observed, "V1", runner="V1"),
        "eager": partial(observed, "eager", eager=True),
        "pair": partial(observed, "pair", tensor_parallel=2),
        "cached": lambda runs: special("cached", runs, ("off", *CAPPED), prefix_caching=True),
        "preempted": lambda runs: special("preempted", runs, CAPTURED, **CRAMPED),
        **{f"{name}, read again": partial(read_again, name) for name in CAPTURING},
        "speed": lambda runs: speed(start, starts, caps, runs["policies"]),
    }


def made_policies(start: Start, folder: Path) -> Any:
    """Write the policies; the share of tokens that each changes."""
    arguments = with_start(start, folder=str(folder), lifts=LIFTS)
    shares = in_child("benchmarks.vllm_child:random_caps", environment(start), **arguments)
    Policy(load_policy(folder / CAPPED[0]).interventions, positions="decode").save(folder / DECODING)
    return shares


def speed(start: Start, starts: int, folder: Path, shares: Mapping[str, Any]) -> Any:
    """``benchmarks/serving.py``'s comparison of engines with the plugin and without."""
    held = serving.Held(folder / TYPICAL, TYPICAL, {"share_changed": shares[TYPICAL]})
    result = serving.plugin(serving.Plan(replace(start, sequences=64), starts), held)
    return {**result.row(), "line": result.line()}


# ---- the command -------------------------------------------------------------------------------------------------


def judged(made: Sequence[Check], runs: Runs) -> Iterator[Outcome]:
    """Each check in turn; one whose engine failed is not met, and says why."""
    for check in made:
        try:
            yield check(runs)
        except ChildFailed as e:
            yield Outcome(name_of(check), False, str(e))


def name_of(check: Check) -> str:
    """For people: the check, and what it is of."""
    given = check.args if isinstance(check, partial) else ()
    function = check.func if isinstance(check, partial) else check
    words = [a.__name__ if callable(a) else str(a) for a in given]
    return " ".join([function.__name__, *words]).replace("check_", "")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line each, and how many are met."""
    ends = ", ".join(f"{sum(o.holds is value for o in outcomes)} {word}" for value, word in WORDS.items())
    return "\n".join([*(o.line() for o in outcomes), f"\n{len(outcomes)} checks: {ends}"])


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 when a check is not met."""
    return int(any(o.holds is False for o in outcomes))


def lacking() -> str:
    """Why nothing can be checked here; "" when it can."""
    if not torch.cuda.is_available():
        return "This machine has no CUDA device: nothing was checked or measured."
    return missing()


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    if lacking():
        print(lacking(), file=sys.stderr)
        return 2
    try:
        start = start_of(args.model, "bfloat16", sequences=SEQUENCES)
        about = {"model": start.name, "machine": machine(), **_devices(start)}
    except (PersonaAxisError, ChildFailed) as e:
        print(e, file=sys.stderr)
        return 1
    print(about, flush=True)
    outcomes: list[Outcome] = []
    with TemporaryDirectory() as folder:
        runs = Asked(makers(start, args.starts, Path(folder)))
        for outcome in judged(checks(len(about["gpus"])), runs):
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
            _store(args.out, about, outcomes)
    print(f"\n{about['gpus']}\n{table(outcomes)}\n\n{args.out}")
    return exit_code(outcomes)


def _devices(start: Start) -> dict[str, Any]:
    return dict(in_child("benchmarks.vllm_gpu_engines:devices", environment(start)))


def _store(path: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """After every check, so that an interruption loses nothing."""
    make_folder(path.parent)
    write_json(path, finite({**about, "checks": [asdict(o) for o in outcomes]}))


def finite(value: Any) -> Any:
    """As JSON has it: what is not a finite number becomes null."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="of engines with the plugin and without")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/vllm_gpu.json"), metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
