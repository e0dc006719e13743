"""Opening the catalog against reading, hashing and validating all of it.

    python -m benchmarks --only catalog

Claim: opening it (listing every role and trait, parsing none) takes at most 50 milliseconds. Beside it the seconds that
hashing every text and validating every text take, each on a catalog opened anew. The files are in the page cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from benchmarks.measure import Claim, Ratio, Result, alone
from persona_axis.catalog.catalog import Catalog, load_catalog
from persona_axis.catalog.validate import validate

CLAIM = Claim("catalog", "the catalog opens lazily", 50, "ms to open it", at_most=True)


def run(quick: bool = False) -> Iterator[Result]:
    rounds = 2 if quick else 12
    catalog = load_catalog()

    def opened() -> Catalog:
        return load_catalog(catalog.folder)  # by its folder, because the embedded one is opened once in a process

    opening = [1000 * _seconds(opened) for _ in range(rounds)]
    hashing = [_seconds(lambda: opened().content_hash()) for _ in range(rounds)]
    validating = [_seconds(lambda: validate(opened(), promised=True)) for _ in range(min(rounds, 3))]
    settings = {"roles": len(catalog.role_names), "traits": len(catalog.trait_names), "rounds": rounds}
    details = {"seconds_hash": statistics.median(hashing), "seconds_validate": statistics.median(validating)}
    yield Result(CLAIM, Ratio.of(opening), settings, details)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    alone(run)
