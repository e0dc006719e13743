"""Real trouble for the file tests: a disk of 64 KiB, a limit on file size, a writer killed at any moment."""

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted tmpfs of 64 KiB; skips where mounting is not allowed."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """``with file_size_limit(1000):`` no file of this process may grow past that many bytes."""

    @contextmanager
    def limit(size_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def run_and_kill() -> Callable[[str, Path, int], int]:
    """``run_and_kill(script, folder, round)``: kill -9 a writer; the last number it said was on the disk.

    The script gets the folder as sys.argv[1] and prints a line ``done <n>`` after step n is durable.
    """

    def run(script: str, folder: Path, seed: int) -> int:
        writer = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        first = writer.stdout.readline()  # imports are over, writing has begun
        time.sleep(random.Random(seed).uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        said = [first, *writer.stdout.read().splitlines(keepends=True)]
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL, "the writer ended by itself"
        return max(int(line.split()[1]) for line in said if line.endswith("\n"))

    return run
