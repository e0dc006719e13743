"""lm-eval's tasks on the plain and the held model, kept on disk: they may take hours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persona_axis.files.atomic import read_json, write_json
from persona_axis.model.loading import ChatModel
from persona_axis.settings import CalibrationSettings
from persona_axis.steering.hooks import held
from persona_axis.steering.policy import Policy
from persona_axis.study.lm_eval import TaskScore, evaluate_tasks, relative_scores


def task_scores(
    folder: Path, chat: ChatModel, policy: Policy | None, settings: CalibrationSettings, seed: int
) -> dict[str, TaskScore]:
    """Scores of the tasks that settings name, read from ``folder`` when they were measured before.

    Raises:
        MissingDependency, UsageError, PersonaAxisError: as :func:`~persona_axis.study.lm_eval.evaluate_tasks`.
    """
    asked = {
        "model": chat.name,
        "revision": chat.revision,
        "dtype": chat.dtype,
        "policy": policy.content_hash if policy else None,
        "tasks": list(settings.tasks),
        "limit": settings.task_limit,
        "include": str(settings.task_folder) if settings.task_folder else None,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    file = folder / f"tasks-{digest[:12]}.json"
    if file.exists():
        return {name: TaskScore(**score) for name, score in read_json(file)["scores"].items()}
    with held(chat, policy) if policy else nullcontext():
        scores = evaluate_tasks(chat, settings.tasks, settings.task_limit, seed, settings.task_folder)
    write_json(file, {"asked": asked, "scores": {name: asdict(score) for name, score in scores.items()}})
    return scores


def tasks_record(plain: Mapping[str, TaskScore], held: Mapping[str, TaskScore]) -> dict[str, Any]:
    """For ``calibration.json``: every task's two scores, and their ratio with its interval."""
    relative = relative_scores(plain, held)
    return {
        name: {
            "plain": asdict(plain[name]),
            "held": asdict(held[name]),
            "held_over_plain": asdict(ratio) if ratio else None,
        }
        for name, ratio in relative.items()
    }
