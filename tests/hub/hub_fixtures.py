"""Fixtures for tests that talk to a Hub on loopback (imported by the conftest here and by the tests of cli)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from artifacts import make_run
from fake_hub import WRITE, FakeHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A Hub that the real client of this process talks to, with a token that may write."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    home = tmp_path_factory.mktemp("hf-home")
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        template = f"{fake.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name, place in {"HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token", "AGENT_HARNESSES_PATH": "known"}.items():
            monkeypatch.setattr(constants, name, str(home / place))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield fake
        close_session()


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """For a process of its own that talks to the Hub on loopback."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITE,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run with an axis and a policy."""
    return make_run(tmp_path / "run")
