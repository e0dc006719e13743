"""Fixtures shared by the tests of pipeline and cli (imported by their conftests)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_judge import FakeJudge, serving
from tiny_runs import save_inputs, save_model


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
    """A running server for ``--judge openai-api/fake/judge``."""
    pytest.importorskip("inspect_ai")
    from persona_axis.llm import client

    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    with serving() as fake:
        for name, value in fake.environment.items():
            monkeypatch.setenv(name, value)
        yield fake
