"""Fixtures for the tests of the command line: commands in this process, and real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "collect"))

from forkserver import Forkserver
from run_fixtures import fake_judge, halvable_run, inputs, model_folder

__all__ = ["fake_judge", "halvable_run", "inputs", "model_folder"]


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What the user is told; fails unless it is exactly one message without a traceback."""
        assert "Traceback" not in self.err
        assert self.err.count("persona-axis: ") == 1
        return self.err.partition("persona-axis: ")[2].strip()


Invoke = Callable[..., Ended]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    """``invoke("run", "--out", folder)``: the command line in this process."""
    from persona_axis.cli.app import main

    def call(*argv: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["persona-axis", *map(str, argv)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        said = capfd.readouterr()
        return Ended(code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def options(model_folder: Path, inputs: Path) -> list[str]:
    """The options of a small run (56 rollouts in one shard), without --out."""
    named = {
        "--model": model_folder,
        "--roles": inputs / "roles.jsonl",
        "--questions": inputs / "questions.txt",
        "--default-prompts": inputs / "neutral.json",
        "--max-tokens": 6,
        "--min-count": 3,
        "--dtype": "float32",
        "--device": "cpu",
    }
    return [str(word) for pair in named.items() for word in pair]


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forkserver]:
    """Starts real processes of persona-axis."""
    with Forkserver(tmp_path_factory.mktemp("processes")) as server:
        yield server


@dataclass(frozen=True)
class Disk:
    """A mounted tmpfs."""

    folder: Path

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 64 KiB; skips where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", str(folder)], check=True)
