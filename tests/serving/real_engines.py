"""vLLM engines for the tests: in this process, one at a time, or in processes of their own."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona_axis.serve.vllm.frontend import Report, report_of

DEFAULT = "floor"  # of requests that name none
QUESTIONS = (
    "What is rain?",
    "Who are you, and what do you want?",
    "Tell me about the sea and the people who live by it.",
    "How should I spend a free afternoon in autumn?",
)
ROLE = "You are a pirate of the Caribbean. Speak like one, with songs and curses."
BLOCK = 32  # tokens of a block of the key/value cache: the smallest that vLLM has on a CPU
KINDS: dict[str, dict[str, Any]] = {
    "roomy": {"dtype": "float32", "kv_cache_memory_bytes": 1 << 28},
    # Two dozen blocks for sixteen requests, and a prompt goes in by pieces.
    "cramped": {
        "dtype": "float32",
        "num_gpu_blocks_override": 24,
        "kv_cache_memory_bytes": 1 << 28,
        "max_num_batched_tokens": 40,
    },
    "half": {"dtype": "bfloat16", "kv_cache_memory_bytes": 1 << 27},
    "tiny": {"dtype": "float32", "kv_cache_memory_bytes": 1 << 24, "max_model_len": 256},
}
SHARED: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}


class Engines:
    """In this process. Asking for another kind ends the one there is."""

    def __init__(self) -> None:
        self.kind = ""
        self._llm: Any = None

    def __call__(self, kind: str, model: str) -> Any:
        if kind != self.kind:
            self.end()
            from vllm import LLM

            self._llm, self.kind = LLM(model, **{**SHARED, **KINDS[kind]}), kind
        self._llm.reset_prefix_cache()
        return self._llm

    def end(self) -> None:
        """A test that broke its engine calls this too."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self.kind = None, ""
        gc.collect()
        cleanup_dist_env_and_memory()


# ---- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A greedy request."""

    prompt: Sequence[int]
    policy: str | None = None
    strength: float | None = None
    capture: bool = False
    projections: bool = False
    tokens: int = 24
    salt: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of SamplingParams

    @property
    def input(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.prompt), **({"cache_salt": self.salt} if self.salt else {})}

    @property
    def parameters(self) -> Any:
        from vllm import SamplingParams

        keys = {"policy": self.policy, "strength": self.strength}
        keys |= {"capture": self.capture or None, "projections": self.projections or None}
        extra = {f"persona_axis_{name}": value for name, value in keys.items() if value is not None}
        options = {"temperature": 0, "max_tokens": self.tokens, "ignore_eos": True, **self.options}
        return SamplingParams(extra_args=extra or None, **options)


@dataclass(frozen=True)
class Answer:
    """What came back."""

    ask: Ask
    tokens: list[int]
    text: str
    finish_reason: str
    cached: int
    report: Report

    @classmethod
    def of(cls, ask: Ask, output: Any) -> Answer:
        said = output.outputs[0]
        return cls(
            ask, list(said.token_ids), said.text, said.finish_reason, output.num_cached_tokens, report_of(output)
        )

    @property
    def ids(self) -> list[int]:
        """Prompt and reply."""
        return [*self.ask.prompt, *self.tokens]

    @property
    def counted(self) -> tuple[int, int]:
        """Where the reply's tokens that count lie in ``ids``: all but the last."""
        return len(self.ask.prompt), len(self.ids) - 1


def together(llm: Any, asks: Sequence[Ask]) -> list[Answer]:
    """All in one batch."""
    outputs = llm.generate([a.input for a in asks], [a.parameters for a in asks], use_tqdm=False)
    return [Answer.of(a, output) for a, output in zip(asks, outputs, strict=True)]


def alone(llm: Any, ask: Ask) -> Answer:
    """With nothing in the cache before it, and nobody beside it."""
    llm.reset_prefix_cache()
    return together(llm, [ask])[0]


def by_hand(llm: Any, asks: Mapping[str, Ask]) -> None:
    """Into the engine, which is then driven by its ``step``."""
    for name, ask in asks.items():
        llm.llm_engine.add_request(name, ask.input, ask.parameters)


def steps(llm: Any, asks: Mapping[str, Ask], n: int | None = None) -> dict[str, Answer]:
    """Answers that ended within ``n`` steps, or until there is nothing to do."""
    ended: dict[str, Answer] = {}
    while llm.llm_engine.has_unfinished_requests() and n != 0:
        for output in llm.llm_engine.step():
            if output.finished:
                ended[output.request_id] = Answer.of(asks[output.request_id], output)
        n = None if n is None else n - 1
    return ended


# ---- inside of the engine ------------------------------------------------------------------------------------------


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def worker_of(llm: Any) -> Any:
    return core_of(llm).model_executor.driver_worker.worker


def held_of(llm: Any) -> Any:
    from persona_axis.serve.vllm.worker import armed_of

    return armed_of(worker_of(llm)).held


# ---- other processes -----------------------------------------------------------------------------------------------


def environment(**changes: str | Path | None) -> dict[str, str]:
    """For a process: this one's, without the plugin's variables and vLLM's choice of processes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_AXIS_")}
    kept.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return {**kept, **{k: str(v) for k, v in changes.items() if v is not None}}


def python(code: str, *arguments: str | Path, seconds: float = 240, **changes: str | Path | None) -> Any:
    """Run a script to its end; its ``CompletedProcess``."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )


def program(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).parent / name)


SERVE = (
    *("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16"),
    *("--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(1 << 27)),
)


class Server:
    """A server in a process of its own, on a free port of this machine; ended at the end of the block."""

    def __init__(self, command: Sequence[str | Path], log: Path, seconds: float = 400, **changes: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        self._seconds = seconds
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*map(str, command), *SERVE, "--port", str(self.port)],
                env=environment(**changes),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Server:
        try:
            self._wait()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _wait(self) -> None:
        until = time.monotonic() + self._seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"The server ended with {self.process.returncode}:\n{self.said}")
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            time.sleep(0.5)
        raise AssertionError(f"The server was not ready within {self._seconds} s:\n{self.said}")

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self) -> int:
        """Wait until it ends by itself; its exit code."""
        try:
            return self.process.wait(self._seconds)
        finally:
            self.end()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    # ---- requests ----

    def get(self, path: str) -> Any:
        return json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60))

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and JSON; greedy and by the one model that is served, where the body does not say otherwise."""
        status, content = self.post_raw(path, body)
        return status, json.loads(content)

    def post_raw(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        whole = {"model": "held", "temperature": 0, "max_tokens": 24, **body}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(whole).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()
