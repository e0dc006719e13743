"""Folders to share: a run with an axis and a policy, and with texts that must stay at home."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona_axis.collect.plan import make_plan
from persona_axis.files.arrays import write_arrays
from persona_axis.files.atomic import write_json
from persona_axis.geometry.axis import Axis
from persona_axis.geometry.fit import DroppedRole, Fit, Interval, LayerFit, RankedRole
from persona_axis.steering.policy import Policy

SECRET = "the words of a reply that must stay at home"
MODEL = "someone/some-model"
REVISION = "0123456789abcdef0123456789abcdef01234567"
RULE = "the largest reduction at a perplexity of at most x1.05"
LAYERS = (0, 1, 2, 3)
D_MODEL = 32
AXIS_FILES = ["fit/axis.safetensors", "fit/vectors.safetensors", "fit/fit.json", "summary.json"]
POLICY_FILES = [
    "calibration/calibration.json",
    "calibration/policy/policy.json",
    "calibration/policy/policy.safetensors",
]


def make_run(folder: Path, *, model: str = MODEL, revision: str = REVISION, policy: bool = True, seed: int = 0) -> Path:
    """A finished run; every figure in it is distinct."""
    axis = make_axis(model, revision, seed)
    axis.save(folder / "fit" / "axis.safetensors")
    write_arrays(folder / "fit" / "vectors.safetensors", {"roles": np.ones((2, 4, D_MODEL), np.float32)})
    write_json(folder / "fit" / "fit.json", {**asdict(make_fit()), "vector_roles": ["bard"], "metadata": axis.metadata})
    judge = {"name": "likelihood", "kept": 1234, "dropped": 56, "failed": 7}
    write_json(
        folder / "summary.json",
        {"n_layers": 4, "d_model": D_MODEL, "dtype": "float32", "rollouts": 9876, "judge": judge, "seed": 3},
    )
    stay_at_home(folder)
    if policy:
        held_out = make_outcome(0.614, 1.043)
        said = {"percentile_assistant": 75.0, "percentile_paper": 25.0, "pool": 4321}
        known = {"rule": RULE, "held_out": held_out}
        held = Policy.cap(axis, {2: 3.25, 3: -4.75}, calibration=known, **said)
        held.save(folder / "calibration" / "policy")
        write_json(folder / "calibration" / "calibration.json", make_calibration(held, held_out))
    return folder


def make_axis(model: str = MODEL, revision: str = REVISION, seed: int = 0) -> Axis:
    vectors = torch.randn(len(LAYERS), D_MODEL, generator=torch.Generator().manual_seed(seed))
    pool = {"n": 4321, "percentiles": {"75": [1.5, 2.5, 3.25, -4.75]}}
    return Axis(vectors, LAYERS, 2, {"model": model, "revision": revision, "judge": "likelihood", "pool": pool})


def make_fit() -> Fit:
    def layer(i: int) -> LayerFit:
        return LayerFit(i, Interval(-0.81, -0.86, -0.74), 0.5, [0.4], 3, 5, 9, 0.93, 7.0)

    return Fit(
        n_layers=4,
        d_model=D_MODEL,
        layers=list(LAYERS),
        layer=2,
        most_reliable_layer=3,
        estimator="paired",
        filter="expressed",
        filter_note="",
        min_count=11,
        assistant=Interval(5.0, 4.0, 6.0),
        edge_distance=Interval(-0.12, -0.2, 0.01),
        edge_distance_in_sample=-0.3,
        per_layer=[layer(i) for i in LAYERS],
        layer_cosine=[[1.0] * 4] * 4,
        ranking=[RankedRole(name, "far", Interval(0.0, -1.0, 1.0), 20, 24) for name in ("bard", "ghost")],
        dropped=[DroppedRole("demon", "kept 2 rollouts, fewer than 11")],
        points=[],
        assistant_places=[],
        bootstrap_draws=1000,
    )


def make_outcome(reduction: float, ratio: float) -> dict[str, Any]:
    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.01, "high": value + 0.02}

    return {
        "pressure": {"reduction": around(reduction), "held": 0.127, "plain": 0.329, "prompts": 288, "missing": 0},
        "capability": {"perplexity_ratio": around(ratio), "top1_agreement": around(0.967), "replies": 96},
        "fluent": True,
        "fluency": {"objections": []},
    }


def make_calibration(policy: Policy, held_out: dict[str, Any]) -> dict[str, Any]:
    chosen = {
        "layers": list(policy.layers),
        "percentile_paper": 25.0,
        "percentile_assistant": 75.0,
        "policy_hash": policy.content_hash,
        **make_outcome(0.888, 1.777),  # of the half that chose: never to be shown
        "held_out": held_out,
    }
    pool = {"n": 4321, "roles": 4000, "traits": 0, "default": 321, "cross_fitted": True}
    return {"candidates": [chosen], "chosen": chosen, "rule": RULE, "pool": pool, "split": {"A": {"roles": ["bard"]}}}


def stay_at_home(folder: Path) -> None:
    """What a run folder holds beside."""
    from persona_axis.catalog.catalog import Question, Role

    roles = [Role(name, "far", SECRET, (SECRET, "b"), (), SECRET) for name in ("bard", "ghost", "demon")]
    questions = [Question(f"q{i}", "daily", f"{SECRET} {i}") for i in range(6)]
    make_plan(roles, questions, ["", "Help."]).write(folder / "plan.parquet")
    generation = {"model": "/home/me/model", "chat_template": SECRET, "max_tokens": 321, "temperature": 0.7}
    write_json(folder / "run.json", {"config_hash": "c", "catalog": "k", "generation": generation})
    for name in ("report.html", "rollouts/shard-00000.parquet", "judge/likelihood/shard-00000.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its name with slashes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def contents_of_pull(out: Path) -> dict[str, bytes]:
    """The same without the record of where it came from."""
    found = contents(out)
    del found["source.json"]
    return found


def leftovers(out: Path) -> list[Path]:
    """Hidden things beside a folder."""
    return [path for path in out.parent.iterdir() if path.name.startswith(".")]
