"""``python -m benchmarks [--only NAME] [--out FILE] [--quick]``: measure the claims, one row each.

The file is rewritten after every figure, so an interruption loses nothing; rows of benchmarks that did not run stay.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from persona_axis.files.atomic import make_folder, read_json, write_json

NAMES = (
    "attention",
    "capping",
    "capture",
    "catalog",
    "dtype",
    "reading",
    "resume",
    "rollouts",
    "sample_efficiency",
    "serving",
)


def main() -> None:
    args = _arguments()
    where = machine()
    for name in args.only or NAMES:
        start = time.perf_counter()
        fresh: list[dict[str, Any]] = []
        for result in importlib.import_module(f"benchmarks.{name}").run(args.quick):
            seconds = round(time.perf_counter() - start, 1)
            fresh.append({"benchmark": name, **result.row(), "quick": args.quick, "machine": where, "seconds": seconds})
            print(f"{result.line()}, {seconds:.0f} s", flush=True)
            if args.out:
                _store(args.out, name, fresh)
            start = time.perf_counter()


def _store(path: Path, benchmark: str, fresh: list[dict[str, Any]]) -> None:
    """Put this benchmark's rows in place of its earlier ones of the same name."""
    found = read_json(path) if path.exists() else []
    names = {row["name"] for row in fresh}
    make_folder(path.parent)
    kept = [row for row in found if row["benchmark"] != benchmark or row["name"] not in names]
    write_json(path, sorted([*kept, *fresh], key=lambda row: (row["benchmark"], row["name"])))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results.json")
    parser.add_argument("--quick", action="store_true", help="a smoke test: its figures mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
