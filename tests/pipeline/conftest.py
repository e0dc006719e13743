"""Fixtures for the tests of the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "collect"))

from fake_judge import FakeJudge, serving  # noqa: E402
from tiny_runs import save_inputs, save_model  # noqa: E402


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model as a folder."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny-chat")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with roles.jsonl (4 roles), questions.txt (8) and neutral.json (3 default prompts)."""
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder


@pytest.fixture
def fake_judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    pytest.importorskip("inspect_ai")
    from persona_axis.llm import client

    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    with serving() as fake:
        for name, value in fake.environment.items():
            monkeypatch.setenv(name, value)
        yield fake
