"""Real processes of ``persona-axis`` that start in milliseconds.

Importing torch and Transformers takes seconds. So one process imports them and forks for each command: the child has
its own process id, its own files for stdout and stderr, runs ``main()`` and ends as the command does. It can be
killed at any moment. Two things help a test that kills it: ``pause`` (seconds before every journal record, so that
there is time to be killed in) and ``trace`` (a file that gets a line ``reply KEY`` or
``verdict KEY`` as each is made).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ---- on the test's side ------------------------------------------------------------------------------------------


class Forkserver:
    """``start("run", "--out", folder)`` makes a process; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = 0

    def __enter__(self) -> Forkserver:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a pool of threads would not survive the fork
        )
        assert self.receive() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stdin.close()  # type: ignore[union-attr]
        self.server.wait(timeout=20)

    def receive(self) -> Any:
        return json.loads(self.server.stdout.readline())  # type: ignore[union-attr]

    def order(self, **order: Any) -> Any:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return self.receive()

    def start(
        self,
        *argv: object,
        pause: float = 0.0,
        trace: Path | None = None,
        env: dict[str, str] | None = None,
        stdin: Path | None = None,  # a named pipe or a terminal; nothing by default
    ) -> Process:
        self.started += 1
        out, err = (self.folder / f"{self.started}.{name}" for name in ("out", "err"))
        order = {"argv": [str(a) for a in argv], "out": str(out), "err": str(err), "pause": pause, "env": env or {}}
        order["stdin"] = str(stdin or os.devnull)
        pid = self.order(do="start", trace=str(trace or ""), **order)
        return Process(self, pid, out, err)


@dataclass
class Process:
    """A running command."""

    server: Forkserver
    pid: int
    out_file: Path
    err_file: Path
    code: int | None = None  # -9 when killed

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        return self.err_file.read_text()

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.order(do="poll", pid=self.pid)
        return self.code

    def wait(self, seconds: float = 60.0) -> int:
        return wait_for(self.poll, seconds, lambda: f"still running; it said: {self.err}")

    def wait_for(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        """Until the condition holds; fails when the process ends before."""
        wait_for(
            lambda: condition() or (self.poll() is not None and "ended"),
            seconds,
            lambda: f"waited in vain; it said: {self.err}",
        )
        assert condition(), f"ended with {self.code} too early: {self.err}"

    def signal(self, number: signal.Signals) -> None:
        if self.poll() is None:  # not reaped: the pid is still its own
            os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL; the code it ended with."""
        self.signal(signal.SIGKILL)
        return self.wait()


def wait_for(condition: Callable[[], Any], seconds: float, words: Callable[[], str]) -> Any:
    end = time.monotonic() + seconds
    while (found := condition()) is None or found is False:
        assert time.monotonic() < end, words()
        time.sleep(0.01)
    return found


# ---- on the server's side ----------------------------------------------------------------------------------------


def serve() -> None:
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import persona_axis.pipeline  # noqa: F401
    from persona_axis.report.figure_base import new_figure

    new_figure(100)  # Plotly imports its parts when they are used
    if importlib.util.find_spec("inspect_ai") is not None:
        import inspect_ai.model  # noqa: F401
        import openai  # noqa: F401

    gc.collect()
    gc.freeze()  # a child's collector would touch, and so copy, everything that was imported
    answer("ready")
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if order["do"] == "poll":
            done, status = os.waitpid(order["pid"], os.WNOHANG)
            answer(os.waitstatus_to_exitcode(status) if done else None)
            continue
        pid = os.fork()
        if pid == 0:
            run(order)  # ends with SystemExit, through the interpreter's own shutdown
        answer(pid)


def answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def run(order: dict[str, Any]) -> None:
    from persona_axis.cli.app import main

    for number, name in ((0, order["stdin"]), (1, order["out"]), (2, order["err"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY | os.O_NOCTTY)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(order["env"])
    if order["pause"]:
        slow_down(order["pause"])
    if order["trace"]:
        trace(order["trace"])
    sys.argv = ["persona-axis", *order["argv"]]
    main()
    sys.exit(0)


def slow_down(seconds: float) -> None:
    from persona_axis.files.journal import Journal

    append = Journal.append

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        time.sleep(seconds)
        append(self, *args, **kwargs)

    Journal.append = slow  # type: ignore[method-assign]


def trace(path: str) -> None:
    from persona_axis.collect.likelihood import LikelihoodJudge
    from persona_axis.model.decode import DecodingLoop

    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def traced(original: Callable[..., Iterator[Any]], what: str) -> Callable[..., Iterator[Any]]:
        def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for made in original(*args, **kwargs):
                os.write(file, f"{what} {made.key}\n".encode())
                yield made

        return wrapper

    DecodingLoop.generate = traced(DecodingLoop.generate, "reply")  # type: ignore[method-assign]
    LikelihoodJudge.judge = traced(LikelihoodJudge.judge, "verdict")  # type: ignore[method-assign]


if __name__ == "__main__":
    serve()
