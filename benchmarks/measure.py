"""Ratios measured side by side, and what a claim makes of them.

Two pieces of work run in turn in one process, A B B A A B ..., after a warm-up of both. Drift of the machine falls on
both alike; each round gives one ratio, the figure is their median with a bootstrap interval. A claim is
*resolved* when its number lies outside that interval; only then is it met or not met.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PAIRS = 12
QUICK_PAIRS = 2
DRAWS = 10_000

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    pairs: int  # how many single ratios, or draws, it comes from

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> Ratio:
        """Median of ``values``, bootstrap interval of that median."""
        picks = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
        medians = np.median(np.asarray(values, dtype=float)[picks], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        return cls(float(np.median(values)), float(low), float(high), len(values))

    @classmethod
    def exact(cls, value: float) -> Ratio:
        """A count: nothing to be unsure of."""
        return cls(value, value, value, 1)


@dataclass(frozen=True)
class Claim:
    """What is claimed of a ratio."""

    name: str
    text: str
    target: float
    unit: str
    at_most: bool = False  # else at least

    def resolved(self, ratio: Ratio) -> bool:
        return ratio.low == ratio.high or not ratio.low < self.target < ratio.high

    def met(self, ratio: Ratio) -> bool | None:
        """None when the interval cannot tell."""
        if not self.resolved(ratio):
            return None
        return ratio.high <= self.target if self.at_most else ratio.low >= self.target


@dataclass(frozen=True)
class Result:
    """One row of ``results.json``."""

    claim: Claim
    ratio: Ratio
    settings: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        return {
            "name": self.claim.name,
            "claim": self.claim.text,
            "ratio": self.ratio.value,
            "low": self.ratio.low,
            "high": self.ratio.high,
            "unit": self.claim.unit,
            "target": self.claim.target,
            "resolved": self.claim.resolved(self.ratio),
            "met": self.claim.met(self.ratio),
            "pairs": self.ratio.pairs,
            "settings": self.settings,
            "details": self.details,
        }

    def line(self) -> str:
        r, verdict = self.ratio, {None: "not resolved", True: "met", False: "NOT MET"}[self.claim.met(self.ratio)]
        return (
            f"{self.claim.name:<34} {r.value:8.3f} [{r.low:.3f}, {r.high:.3f}] {self.claim.unit}, "
            f"{r.pairs} pairs: {verdict} ({self.claim.text})"
        )


Run = Callable[[bool], Iterator[Result]]  # a benchmark; True is a smoke test


@dataclass(frozen=True)
class Compared:
    """Seconds of several pieces of work, run in turn: one list per piece, an entry per round."""

    runs: list[list[float]]

    def ratio(self, a: int = 0, b: int = 1) -> Ratio:
        """Seconds of piece ``a`` per second of piece ``b``, round by round."""
        return Ratio.of([x / y for x, y in zip(self.runs[a], self.runs[b], strict=True)])

    def seconds(self) -> list[float]:
        """Median seconds of each."""
        return [float(np.median(run)) for run in self.runs]


def compare(*works: Work, rounds: int = PAIRS, warm_up: bool = True) -> Compared:
    """Time pieces of work in turn, each round in the reverse order of the last (A B B A for two)."""
    for work in works if warm_up else ():
        work()
    runs: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    for i in range(rounds):
        for which in order if i % 2 == 0 else order[::-1]:
            runs[which].append(timed(works[which]))
    return Compared(runs)


def timed(work: Work) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alone(run: Run) -> None:
    """``python -m benchmarks.<name>``: one benchmark, printed only."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a smoke test: its figures mean nothing")
    quick = parser.parse_args().quick
    for result in run(quick):
        print(result.line(), result.settings, result.details, sep="\n  ")
