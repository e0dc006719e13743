"""The checks of ``benchmarks/vllm_gpu.py``: what engines said, judged. Nothing here starts an engine or needs a GPU.

Kernels on a GPU give other last bits in a batch than alone, so nothing is compared bit for bit. Log-probabilities of
given texts, and of greedy replies up to where they part, may differ between two ways of running a request by
`SLACK` times what plain vLLM's differ by between alone and batched (or, between engines, what requests that are off
differ by); and a policy must change them by `CONTRAST` times more than that, else nothing could be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

SLACK = 2.0
CONTRAST = 5.0
LEAST = 1e-3  # nats; below it nothing is called a difference
CAPTURE_ERROR, BOUNDS_ERROR = 1e-2, 2e-3  # relative, of bfloat16
CAPPED = ("first", "second")
DECODING = "decoding"  # the first, for generated tokens alone: only decode steps can change anything under it
POLICIES = ("off", *CAPPED, DECODING)
PATHS = ("given", "greedy")
ENDINGS = ("eos", "length", "string")

WORDS = {True: "met", False: "NOT MET", None: "open"}
Runs = Mapping[str, Any]  # what engines and Hugging Face said, by name


@dataclass(frozen=True)
class Outcome:
    """Of a check. ``holds`` None: it could not be made, or told."""

    name: str
    holds: bool | None
    detail: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.name:<58} {WORDS[self.holds]:<8} {self.detail}".rstrip()


# ---- comparisons -------------------------------------------------------------------------------------------------


def entries(run: Mapping[str, Any], path: str, company: str, policy: str | None) -> list[dict[str, Any]]:
    """Of one policy, in the order of the texts; of plain vLLM (``policy`` None), all."""
    names = run["policies"]
    return [e for i, e in enumerate(run[path][company]) if names[i % len(names)] == policy]


def distance(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> float:
    """Mean difference of log-probabilities, token by token, up to the first token at which a pair says different ones:
    that one included, its prefix is still the same. nan without a token.

    An entry is ``ids``, and ``steps``: of each token, log-probabilities by id, the likeliest ones or its own. One that
    is not among them counts as the least that is: it differs by more.
    """
    differences: list[float] = []
    for x, y in zip(a, b, strict=True):
        for i in range(min(alike(x["ids"], y["ids"]) + 1, len(x["ids"]), len(y["ids"]))):
            token, there = str(x["ids"][i]), y["steps"][i]
            differences.append(abs(x["steps"][i][token] - there.get(token, min(there.values()))))
    return float(np.mean(differences)) if differences else math.nan


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def plain_noise(runs: Runs, path: str) -> float:
    """What plain vLLM's log-probabilities differ by between alone and batched."""
    plain = runs["plain"]
    return distance(entries(plain, path, "alone", None), entries(plain, path, "batched", None))


def largest(values: Iterable[float]) -> float:
    """nan when there is none, or one is."""
    found = list(values)
    return float(np.max(found)) if found else math.nan


def within(got: float, noise: float) -> bool:
    """Whether a difference is no more than arithmetic makes; nan is not."""
    return got <= max(LEAST, SLACK * noise)


def effect(run: Mapping[str, Any]) -> float:
    """Of the policy that changes given texts least."""
    off = entries(run, "given", "alone", "off")
    return min(distance(entries(run, "given", "alone", name), off) for name in CAPPED)


def contrasts(found: float, noise: float) -> bool:
    return found >= CONTRAST * max(LEAST, noise)


# ---- checks ------------------------------------------------------------------------------------------------------


def check_runner(engine: str, wanted: str, runs: Runs) -> Outcome:
    found = {worker["runner"] for worker in runs[engine]["workers"]}
    return Outcome(f"{engine}: model runner {wanted}", found == {wanted}, ", ".join(sorted(found)))


def check_graphs(runs: Runs) -> Outcome:
    run = runs["graphs"]
    holds = not run["eager"] and run["graphs"] != "NONE" and runs["eager"]["eager"]
    return Outcome("graphs: CUDA graphs are on", holds, run["graphs"])


def check_asynchronous(runs: Runs) -> Outcome:
    return Outcome("graphs: asynchronous scheduling is on", runs["graphs"]["asynchronous"])


def check_batchmates(engine: str, path: str, runs: Runs) -> Outcome:
    """Requests under several policies in one batch, against each alone."""
    run, noise = runs[engine], plain_noise(runs, path)
    got = largest(distance(entries(run, path, "alone", p), entries(run, path, "batched", p)) for p in POLICIES)
    seen = effect(run)
    holds = within(got, noise) and contrasts(seen, max(got, noise))
    detail = f"{got:.1e} nats, plain vLLM {noise:.1e}, a policy changes {seen:.1e}"
    figures = {"difference": got, "plain": noise, "effect": seen}
    return Outcome(f"{engine}: batchmates as alone, {path} tokens", holds, detail, figures)


def check_as_eager(path: str, runs: Runs) -> Outcome:
    """What is held in CUDA graphs, against an eager engine."""
    graphs, eager = runs["graphs"], runs["eager"]
    off, *held = (distance(entries(graphs, path, "alone", p), entries(eager, path, "alone", p)) for p in POLICIES)
    holds = within(largest(held), off)
    detail = f"{largest(held):.1e} nats, requests that are off {off:.1e}"
    return Outcome(
        f"graphs: capped as in an eager engine, {path} tokens", holds, detail, {"difference": held, "off": off}
    )


def check_changes(engine: str, runs: Runs) -> Outcome:
    """Caps change given texts; the one for generated tokens leaves these and changes replies."""
    run = runs[engine]
    off, decoding = (entries(run, "given", "alone", name) for name in ("off", DECODING))
    seen, still = effect(run), distance(off, decoding)
    plain, held = (entries(run, "greedy", "alone", name) for name in ("off", DECODING))
    share = float(np.mean([a["ids"] != b["ids"] for a, b in zip(plain, held, strict=True)]))
    holds = contrasts(seen, still) and share >= 0.5 and within(still, plain_noise(runs, "given"))
    detail = f"given texts by {seen:.1e} nats, {share:.0%} of replies in decode steps alone"
    return Outcome(f"{engine}: capped output differs from off", holds, detail, {"effect": seen, "replies": share})


def check_captured(engine: str, runs: Runs) -> Outcome:
    """Means of replies of every ending, against Hugging Face."""
    replies = runs[engine]["replies"]
    ended = {(reply["policy"], ending_of(reply)) for reply in replies}
    lacking = [ending for ending in ENDINGS if ("off", ending) not in ended]
    miscounted = [r for r in replies if r["n_counted"] != r["tokens"] - 1]
    errors = runs[f"{engine}, read again"]
    holds = largest(errors) < CAPTURE_ERROR and not miscounted and not lacking
    detail = f"off by {largest(errors):.1e}" + (f"; no reply ended by {', '.join(lacking)}" if lacking else "")
    return Outcome(f"{engine}: captured means as Hugging Face's", holds, detail, {"errors": errors})


def ending_of(reply: Mapping[str, Any]) -> str:
    if reply["finish"] == "length":
        return "length"
    return "string" if isinstance(reply["stop"], str) else "eos"


def check_bounds(engine: str, runs: Runs) -> Outcome:
    worst = largest(reply["bounds_error"] for reply in runs[engine]["replies"] if reply["policy"] != "off")
    name = f"{engine}: projections and captured means fit the bounds"
    return Outcome(name, worst < BOUNDS_ERROR, f"off by {worst:.1e} of the norm")


def check_abort(engine: str, runs: Runs) -> Outcome:
    found = runs[engine]["after_abort"]
    holds = found["places_taken_before"] > 0 and not found["users"] and not found["places_taken"]
    return Outcome(f"{engine}: aborted requests free what they held", holds and found["running"] <= 1, str(found))


def check_cache(runs: Runs) -> Outcome:
    """The first request of each policy finds nothing of the others', the second what the first left."""
    found = [reply["cached"] for reply in runs["cached"]]
    holds = len(found) > 1 and not any(found[0::2]) and all(found[1::2])
    return Outcome("prefix caching: within a policy, never across", holds, f"tokens found: {found}")


def check_cached_capture(runs: Runs) -> Outcome:
    worst = largest(runs["cached, read again"])
    return Outcome("prefix caching: captured means as Hugging Face's", worst < CAPTURE_ERROR, f"off by {worst:.1e}")


def check_preemption(runs: Runs) -> Outcome:
    """Preempted replies are captured as if they had not been: each position once."""
    run, worst = runs["preempted"], largest(runs["preempted, read again"])
    whole = all(reply["n_counted"] == reply["tokens"] - 1 for reply in run["replies"])
    holds = run["preemptions"] > 0 and whole and worst < CAPTURE_ERROR
    return Outcome("preemption: each position once", holds, f"{run['preemptions']} preemptions, off by {worst:.1e}")


def check_disabled(runs: Runs) -> Outcome:
    """``PERSONA_AXIS_DISABLE=1`` leaves vLLM as it is, and our launchers refuse to serve it."""
    plain, graphs = runs["plain"], runs["graphs"]
    got, near = [], True
    for path in PATHS:
        theirs = entries(plain, path, "alone", None)[:: len(plain["policies"])]
        got.append(distance(entries(graphs, path, "alone", "off"), theirs))
        near &= within(got[-1], plain_noise(runs, path))
    holds = not plain["armed"] and bool(plain["refusal"]) and near
    return Outcome(
        "PERSONA_AXIS_DISABLE=1: no plugin, and refused", holds, f"off differs from it by {largest(got):.1e} nats"
    )


def check_speed(runs: Runs) -> Outcome:
    row = runs["speed"]
    more = row["details"]["milliseconds_per_step_more"]
    detail = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] x tokens/s, {more:+.3f} ms per step"
    return Outcome(f"plugin and policy >= {row['target']} x tokens/s without", row["met"], detail, row)


def check_pair(check: Callable[[str, Runs], Outcome], gpus: int, runs: Runs) -> Outcome:
    """A check of an engine on two GPUs, where there are two."""
    if gpus < 2:
        return Outcome(f"pair: {check.__name__.removeprefix('check_')}", None, "one GPU")
    return check("pair", runs)


def check_ranks(engine: str, runs: Runs) -> Outcome:
    states = [{k: worker[k] for k in ("layers", "policies", "version")} for worker in runs[engine]["workers"]]
    holds = len(states) == 2 and states[0] == states[1] and len(states[0]["layers"]) > 0
    return Outcome(f"{engine}: both ranks hold every layer, alike", holds, f"{len(states)} ranks")


Check = Callable[[Runs], Outcome]


def checks(gpus: int) -> list[Check]:
    """All of them; those of two GPUs need two."""
    engines = ("graphs", "V1", "eager")
    return [
        partial(check_runner, "graphs", "V2"),
        partial(check_runner, "V1", "V1"),
        check_graphs,
        check_asynchronous,
        *(partial(check, engine) for check in (check_changes, check_bounds, check_captured) for engine in engines),
        *(partial(check_batchmates, engine, path) for engine in engines for path in PATHS),
        *(partial(check_as_eager, path) for path in PATHS),
        *(partial(check_abort, engine) for engine in engines),
        check_cache,
        check_cached_capture,
        check_preemption,
        check_disabled,
        *(partial(check_pair, c, gpus) for c in (check_ranks, check_changes, check_bounds, check_captured)),
        check_speed,
    ]
