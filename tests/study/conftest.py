"""Fixtures for the tests of study: a finished run of a tiny model, large enough to be halved."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "collect"))
sys.path.insert(0, str(Path(__file__).parents[1] / "geometry"))

from run_fixtures import halvable_run, model_folder

from persona_axis import pipeline
from persona_axis.collect.rundir import RunDir
from persona_axis.model.engine import Engine, Sampling
from persona_axis.model.loading import ChatModel, load_model
from persona_axis.model.selfcheck import choose_engine
from persona_axis.study.measures import Measures

__all__ = ["halvable_run", "model_folder"]


@pytest.fixture
def copied_run(halvable_run: Path, tmp_path: Path) -> Callable[[], Path]:
    """``copied_run()``: a folder of the test's own with the finished run in it."""

    def copy() -> Path:
        return Path(shutil.copytree(halvable_run, tmp_path / f"run{len(list(tmp_path.iterdir()))}"))

    return copy


@pytest.fixture(scope="session")
def chat(model_folder: Path) -> ChatModel:
    return load_model(str(model_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def engine(chat: ChatModel) -> Engine:
    return choose_engine(chat, (2,), 4096).engine


@pytest.fixture
def make_measures(halvable_run: Path, chat: ChatModel, engine: Engine) -> Callable[..., Measures]:
    """``make_measures(pressure=None)``: of the finished run, with nothing computed before."""
    run = RunDir.load(halvable_run)
    made = run.configuration
    sampling = Sampling(made["max_tokens"], made["temperature"], made["top_p"], made["seed"])
    return lambda pressure=None: Measures(chat, engine, sampling, run.plan.neutral_prompts, pressure)


@pytest.fixture
def one_load(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calibrations load the model that is in memory; what they asked for."""
    asked: list[Any] = []

    def load(path: Path, axis: Any, **options: Any) -> ChatModel:
        asked.append((path, options))
        return chat

    monkeypatch.setattr(pipeline, "load_origin", load)
    return asked


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on two threads of a busy machine wait longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
