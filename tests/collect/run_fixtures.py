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


@pytest.fixture(scope="session")
def halvable_run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model: 8 roles, 14 questions, 3 default prompts. Tests copy it before they write."""
    import torch

    from persona_axis.pipeline import run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two of a busy machine wait longer than they compute
    folder = tmp_path_factory.mktemp("halvable")
    save_inputs(folder / "inputs", 8, 14)
    result = run(
        model=str(model_folder),
        out=folder / "run",
        roles=str(folder / "inputs" / "roles.jsonl"),
        questions=str(folder / "inputs" / "questions.txt"),
        default_prompts=folder / "inputs" / "neutral.json",
        max_tokens=6,
        min_count=4,
        filter="none",  # a random model expresses its roles too seldom
        dtype="float32",
        device="cpu",
    )
    torch.set_num_threads(threads)
    return result.path
