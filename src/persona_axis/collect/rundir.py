"""The run folder: where each stage's files are, and whose configuration they belong to."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from persona_axis.collect.plan import Plan
from persona_axis.errors import RunConflict, UsageError
from persona_axis.files.atomic import make_folder, read_json, remove_stale_temps, write_json
from persona_axis.files.shards import ReadLog, is_complete

ROLLOUT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("persona", pa.dictionary(pa.int32(), pa.string())),
        ("question_index", pa.int32()),
        ("block", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("reply_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("content_start", pa.int32()),
        ("n_counted", pa.int32()),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)
VERDICT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("score", pa.int8()),
        ("evidence", pa.float64()),
        ("detail", pa.string()),
    ]
)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}"


@dataclass(frozen=True)
class RunDir:
    """A run folder that belongs to one configuration.

    Attributes:
        path: the folder.
        config_hash: over everything that decides the rollouts; every shard carries it.
        plan: what is to be done.
        log: counts reads of finished shards.
    """

    path: Path
    config_hash: str
    plan: Plan
    log: ReadLog

    @classmethod
    def open(cls, path: str | Path, generation: dict[str, Any], plan: Plan, catalog_hash: str = "") -> RunDir:
        """Create the folder, or resume one with the same configuration.

        Args:
            path: created when missing.
            generation: everything that decides the rollouts, JSON-ready (the plan's digest is added).
            plan: must be the one the folder was made with.
            catalog_hash: of the catalog the plan came from; recorded when the folder is made. A catalog that
                changed elsewhere and gives the same plan goes on with the run.

        Raises:
            RunConflict: the folder holds rollouts of another configuration; lists what differs.
            UsageError: a file is in the way.
        """
        folder = Path(path)
        if blocking := [place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()]:
            raise UsageError(f"--out {folder}: {blocking[0]} is a file. Name another folder.")
        make_folder(folder)
        wanted = {**generation, "plan": plan.digest()}
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        file = folder / "run.json"
        if file.exists():
            found = read_json(file)
            differences = _differences(found.get("generation", {}), wanted)
            if differences and _holds_work(folder):
                raise RunConflict(
                    f"{folder} belongs to a run with another configuration:\n  "
                    + "\n  ".join(differences)
                    + "\nUse the same options to resume it, or another --out."
                )
            if differences:  # a first try that failed before it made anything (a misspelt model, say)
                _forget(folder)
        elif any(folder.iterdir()):
            others = [p.name for p in folder.iterdir() if not p.name.endswith(".tmp") and p.name != "plan.parquet"]
            if others:
                raise RunConflict(
                    f"{folder} is not empty and holds no run (it has {', '.join(sorted(others)[:4])}). "
                    "Name another --out."
                )
        for part in ("", "rollouts", "folded", "fit", "facts"):
            remove_stale_temps(folder / part)
        if not file.exists():
            plan.write(folder / "plan.parquet")
            write_json(file, {"config_hash": digest, "catalog": catalog_hash, "generation": wanted})
        return cls(folder, digest, plan, ReadLog())

    @classmethod
    def load(cls, path: str | Path) -> RunDir:
        """An existing run as it is.

        Raises:
            FileNotFoundError: there is no run.
        """
        folder = Path(path)
        if not (folder / "run.json").exists():
            raise FileNotFoundError(f"{folder} holds no run (no run.json). Make one with: persona-axis run")
        plan = Plan.read(folder / "plan.parquet")
        return cls(folder, read_json(folder / "run.json")["config_hash"], plan, ReadLog())

    @property
    def configuration(self) -> dict[str, Any]:
        """What decided the rollouts."""
        return dict(read_json(self.path / "run.json")["generation"])

    @property
    def catalog_hash(self) -> str:
        """Content hash of the catalog the run was planned from."""
        return str(read_json(self.path / "run.json")["catalog"])

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def folded(self) -> Path:
        return self.path / "folded"

    @property
    def fit(self) -> Path:
        return self.path / "fit"

    def judge(self, name: str) -> Path:
        """The folder of one judge's verdicts."""
        return self.path / "judge" / re.sub(r"[^A-Za-z0-9.-]+", "-", name)

    def has_rollouts(self, shard: int) -> bool:
        return is_complete(self.rollouts, shard_name(shard), self.config_hash)

    def facts(self, name: str) -> dict[str, Any]:
        """A stage's own small record (``facts/<name>.json``), {} when it has not run."""
        file = self.path / "facts" / f"{name}.json"
        return dict(read_json(file)) if file.exists() else {}

    def write_facts(self, name: str, facts: dict[str, Any]) -> None:
        make_folder(self.path / "facts")
        write_json(self.path / "facts" / f"{name}.json", facts)


def _holds_work(folder: Path) -> bool:
    return any(not file.name.endswith(".tmp") for file in (folder / "rollouts").glob("*"))


def _forget(folder: Path) -> None:
    """Remove the configuration of a run that holds no rollout."""
    for part in ("facts", "rollouts"):
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "run.json").unlink()


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line per differing setting; the plan's digest only when nothing more telling differs."""
    names = [k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
    telling = [k for k in names if k != "plan"]
    if names and not telling:
        return ["the plan (the catalog's texts or the selection of roles, questions or prompts)"]
    return [f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} asked for" for k in telling]
