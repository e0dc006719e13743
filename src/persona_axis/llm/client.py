"""The one client for judges and auditors: many prompts to one model, answers as they finish.

Inspect knows the providers: it builds the request, reads the reply with its token counts, and says which
errors are worth another try. Three things are done here because Inspect cannot be told to:

1. **Pace.** ``requests_per_minute`` holds for every request, repeats included. So the repeats of Inspect and
   of the provider's SDK are switched off and the loop around a request is ours (``LLMClient._answer``).
2. **Concurrency.** Inspect keys its connection pools by account and model for the whole process, the first
   size wins, and a pool must not be waited for from two event loops. So the bound is ours, per iterator, and
   Inspect's pool never fills.
3. **Giving up.** A single failure is a ``Failure``; a judge nobody can talk to is a ``JudgeError``, soon.

One background event loop lives as long as the client: pooled connections, and a vLLM server that Inspect
started, belong to the loop that made them. No log is written and no handler or hook stays installed.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from persona_axis.errors import JudgeError, MissingDependency, UsageError

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from pydantic import BaseModel

FORMS = (
    "openai/gpt-4.1-mini, anthropic/<model>, vllm/<model>, or openai-api/<service>/<model> for any "
    "OpenAI-compatible server (<SERVICE>_BASE_URL and <SERVICE>_API_KEY in the environment)"
)

BACKOFF_SECONDS = 2.0  # before the first repeat; doubled before each further one
DEAD_AT_START = 8  # failures in a row before any answer: nobody is there
DEAD_LATER = 64  # the same once there were answers: minutes of outage, not a hiccup
POOL = 10_000  # Inspect's own pool, see point 2 above
REASON_CHARACTERS = 400

# The endpoint works and this prompt does not: malformed, too long, refused.
PROMPT_STATUSES = frozenset({400, 413, 422})


@dataclass(frozen=True, slots=True)
class Prompt:
    key: str  # the caller's; comes back with the answer
    text: str
    system: str | None = None
    answer: type[BaseModel] | None = None  # its JSON schema goes to providers that can hold a model to one


@dataclass(frozen=True, slots=True)
class Answer:
    key: str
    text: str  # without reasoning; never empty
    input_tokens: int  # cached ones included; 0 when the server does not count
    output_tokens: int  # reasoning included
    cut: bool = False  # stopped by max_tokens: the end is missing


@dataclass(frozen=True, slots=True)
class Failure:
    key: str
    reason: str
    retryable: bool  # whether the same prompt may well succeed later


class Pace:
    """Evenly spaced turns: never two closer than ``60 / per_minute`` seconds. ``None`` is no limit.

    The gap counts from when a turn was given, not from when it was due: a late turn followed by a punctual
    one would otherwise let more than ``per_minute`` through in some minute.
    """

    def __init__(
        self,
        per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        import anyio

        self._gap_seconds = 60 / per_minute if per_minute else 0.0
        self._due = -float("inf")
        self._clock = clock
        self._sleep = sleep or anyio.sleep
        self._lock = anyio.Lock()

    async def turn(self) -> None:
        """Return when a request may be sent."""
        if not self._gap_seconds:
            return
        async with self._lock:  # first come, first served
            while (wait := self._due - self._clock()) > 0:
                await self._sleep(wait)
            self._due = self._clock() + self._gap_seconds


class LLMClient:
    """Asks one model many things. A context manager; without one call :meth:`close`, or let the process end.

    ``model`` is Inspect's name for it, ``model_args`` go to its provider. ``timeout_seconds`` is for one
    request; ``max_retries`` counts its repeats after transient errors, with growing waits between.
    ``max_tokens`` includes a reasoning model's thoughts, hence its size. ``temperature=None`` leaves that to
    the provider.

    Raises ``MissingDependency`` without Inspect, ``UsageError`` for a bad number and ``JudgeError`` for an
    unknown provider or a missing key: at construction, before anything has been done for the judge.
    """

    def __init__(
        self,
        model: str,
        *,
        max_connections: int = 16,
        requests_per_minute: float | None = None,
        max_retries: int = 4,
        timeout_seconds: int = 120,
        temperature: float | None = 0.0,
        max_tokens: int = 1024,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        _at_least(max_connections=(max_connections, 1), max_retries=(max_retries, 0))
        _at_least(timeout_seconds=(timeout_seconds, 1), max_tokens=(max_tokens, 1))
        if requests_per_minute is not None and not 0 < requests_per_minute < float("inf"):
            raise UsageError(f"requests_per_minute must be more than 0, not {requests_per_minute}")
        require_inspect()
        from anyio.from_thread import start_blocking_portal

        self.model = model
        self.max_connections = max_connections
        self.max_retries = max_retries
        self.timeout_seconds = timeout_seconds
        self.max_tokens = max_tokens
        settings = {"attempt_timeout": timeout_seconds, "max_tokens": max_tokens, "temperature": temperature}
        self._model = _open_model(model, settings, model_args or {})
        self._pace = Pace(requests_per_minute)
        self._jitter = random.Random()
        self._failed_in_a_row = 0
        self._ever_answered = False
        self._exit = ExitStack()
        self._portal: BlockingPortal | None = self._exit.enter_context(start_blocking_portal(name="persona-axis-llm"))

    def __enter__(self) -> LLMClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is in flight, close the connections, end the background loop. Twice is once."""
        if self._portal is None:
            return
        portal, self._portal = self._portal, None
        with self._exit:
            portal.call(self._model.api.aclose)
            portal.call(portal.stop, True)  # what a half-read iterator or Ctrl-C left running ends here

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[Answer | Failure]:
        """One result per prompt, in the order in which they finish.

        At most ``max_connections`` requests are in flight and as many results wait to be taken: a slow caller
        slows the requests. Leaving the loop early, or Ctrl-C, cancels what is in flight. Raises
        ``JudgeError`` when the judge cannot be used at all; what was yielded before stays valid.
        """
        import anyio

        portal = self._portal
        if portal is None:
            raise RuntimeError("this client is closed")
        results, taken = anyio.create_memory_object_stream[Answer | Failure | JudgeError](self.max_connections)
        leave = anyio.Event()
        try:
            running = portal.start_task_soon(self._serve, prompts, results, taken, leave)
            while (result := portal.call(_next, taken)) is not None:
                if isinstance(result, JudgeError):
                    raise result
                yield result
            running.result()  # a bug in the tasks surfaces here, with its traceback
        finally:
            # Not `running.cancel()`: Ctrl-C may come when the tasks run and their handle is not returned yet.
            if self._portal is not None:
                portal.start_task_soon(leave.set)

    async def _serve(self, prompts: Sequence[Prompt], results: Any, taken: Any, leave: Any) -> None:
        import anyio

        async def cancel_on_leaving() -> None:
            await leave.wait()
            taken.close()  # nobody will read the rest
            everything.cancel_scope.cancel()

        slots = anyio.Semaphore(self.max_connections)
        try:
            async with results, anyio.create_task_group() as everything:
                everything.start_soon(cancel_on_leaving)
                async with anyio.create_task_group() as tasks:
                    for prompt in prompts:
                        await slots.acquire()
                        # A task per prompt also frees what Inspect records of each call in the task's context.
                        tasks.start_soon(self._run, prompt, slots, results)
                everything.cancel_scope.cancel()
        except anyio.get_cancelled_exc_class():  # the client is being closed
            taken.close()
            raise

    async def _run(self, prompt: Prompt, slots: Any, results: Any) -> None:
        try:
            await results.send(await self._answer(prompt))
        finally:
            slots.release()

    async def _answer(self, prompt: Prompt) -> Answer | Failure | JudgeError:
        import anyio

        for attempt in count():
            await self._pace.turn()
            try:
                output = await self._request(prompt)
            except Exception as raised:
                # Providers raise what they like. One error is this prompt's Failure, in its own words; the
                # same for everybody becomes a JudgeError that carries it.
                error, transient = _unwrap(raised)
                if (refusal := self._refusal(error)) is not None:
                    return refusal
                if not transient or attempt >= self.max_retries:
                    return self._failed(prompt, error, transient)
                await anyio.sleep(self._backoff_seconds(attempt, error))
            else:
                self._failed_in_a_row, self._ever_answered = 0, True
                return _read(prompt, output, self.max_tokens)
        raise AssertionError("unreachable")

    async def _request(self, prompt: Prompt) -> Any:
        from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig

        # Set each time: vLLM's client exists only after its first request, and a new key makes a new client.
        sdk: Any = getattr(self._model.api, "client", None)
        if hasattr(sdk, "max_retries"):
            sdk.max_retries = 0
        system = [ChatMessageSystem(content=prompt.system)] if prompt.system else []
        messages = [*system, ChatMessageUser(content=prompt.text)]
        return await self._model.generate(messages, config=GenerateConfig(response_schema=_schema(prompt)))

    def _backoff_seconds(self, attempt: int, error: BaseException) -> float:
        wait = BACKOFF_SECONDS * 2**attempt * self._jitter.uniform(0.5, 1.5)
        asked_for = getattr(self._model.api.should_retry(error), "retry_after", None) or 0.0
        return min(max(wait, asked_for), self.timeout_seconds)

    def _failed(self, prompt: Prompt, error: BaseException, transient: bool) -> Failure | JudgeError:
        in_a_row = 0 if _status(error) in PROMPT_STATUSES else self._failed_in_a_row + 1
        self._failed_in_a_row = in_a_row
        if in_a_row >= (DEAD_LATER if self._ever_answered else DEAD_AT_START):
            return self._dead(error)
        return Failure(prompt.key, _reason(error), retryable=transient)

    def _dead(self, error: BaseException) -> JudgeError:
        which = "in a row" if self._ever_answered else "and none succeeded"
        return _caused(
            error,
            f"{self.model} cannot be used: {self._failed_in_a_row} requests failed {which}, the last with "
            f"{_reason(error)}. Check that {self._endpoint()} is up, reachable from here and serves this "
            "model, then run the same command again: what was answered is not asked twice.",
        )

    def _refusal(self, error: BaseException) -> JudgeError | None:
        """What no other prompt will get past: no valid key (401), no money (402)."""
        if _status(error) == 401:
            key = (getattr(self._model.api, "api_key_vars", None) or ["the API key"])[0]
            return _caused(error, f"{self.model} refuses the key: {_reason(error)}. Check {key}.")
        if _status(error) == 402 or getattr(error, "code", None) == "insufficient_quota":
            return _caused(error, f"{self.model}: the account has no credit left: {_reason(error)}.")
        return None

    def _endpoint(self) -> str:
        url = getattr(self._model.api, "base_url", None)
        return str(url).rpartition("@")[2] if url else "the provider"  # never user:password@


def require_inspect() -> None:
    """Raise ``MissingDependency`` unless Inspect can be imported (which takes seconds: not for --help)."""
    try:
        import inspect_ai.model  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f'LLM judges need Inspect ({error}). Install it: pip install "persona-axis[judge]"'
        ) from error


def _at_least(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, not {value}")


def _open_model(name: str, settings: dict[str, Any], model_args: dict[str, Any]) -> Any:
    from inspect_ai.model import GenerateConfig, get_model

    config = GenerateConfig(max_connections=POOL, max_retries=0, **settings)
    try:
        with _same_excepthook():
            return get_model(name, config=config, memoize=False, **model_args)
    except Exception as error:
        # PrerequisiteError (no key, no package) has no public import path. A TypeError is a bug, unless the
        # user's own arguments caused it.
        known = isinstance(error, ValueError) or type(error).__name__ == "PrerequisiteError"
        if known or (model_args and isinstance(error, TypeError)):
            raise JudgeError(f"cannot use {name!r}: {_plain(error)}. Names look like {FORMS}.") from error
        raise


def _schema(prompt: Prompt) -> Any:
    from inspect_ai.model import ResponseSchema
    from inspect_ai.util import json_schema

    if prompt.answer is None:
        return None
    return ResponseSchema(name=prompt.answer.__name__, json_schema=json_schema(prompt.answer))


@contextmanager
def _same_excepthook() -> Iterator[None]:
    """Inspect replaces ``sys.excepthook`` when it makes a model; the process keeps its own."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def _plain(error: BaseException) -> str:
    """The message on one line, without the rich markup of Inspect's own errors."""
    text = re.sub(r"\[/?(bold|blue|green|/)*\]", "", str(error))
    return " ".join(text.split()).rstrip(".").removeprefix("ERROR: ")


async def _next(results: Any) -> Answer | Failure | JudgeError | None:
    """The next result, or None after the last."""
    import anyio

    try:
        return await results.receive()
    except anyio.EndOfStream:
        results.close()
        return None


def _read(prompt: Prompt, output: Any, max_tokens: int) -> Answer | Failure:
    """What a finished request says. Empty, filtered and too long are failures, not answers."""
    if output.empty:
        return Failure(prompt.key, "the reply has no content", retryable=True)
    stop, text = output.stop_reason, output.completion.strip()
    if stop == "content_filter":
        return Failure(prompt.key, f"refused by the provider's filter: {text[:REASON_CHARACTERS]}", False)
    if stop == "model_length":
        return Failure(prompt.key, f"longer than the model's context: {text[:REASON_CHARACTERS]}", False)
    if not text and stop == "max_tokens":
        return Failure(prompt.key, f"reasoning used up max_tokens={max_tokens}; allow more", False)
    if not text:
        return Failure(prompt.key, f"an empty reply (stop reason: {stop})", retryable=True)
    read, written = _tokens(output.usage)
    return Answer(prompt.key, text, read, written, cut=stop == "max_tokens")


def _tokens(usage: Any) -> tuple[int, int]:
    if usage is None:
        return 0, 0
    cached = (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
    return usage.input_tokens + cached, usage.output_tokens


def _unwrap(raised: Exception) -> tuple[BaseException, bool]:
    """The provider's error, and whether Inspect thinks a repeat may help.

    With its own repeats off, Inspect raises an error it would have repeated as tenacity's ``RetryError`` and
    every other one as it is.
    """
    from tenacity import RetryError

    if isinstance(raised, RetryError):
        return raised.last_attempt.exception() or raised, True
    return raised, False


def _status(error: BaseException) -> int | None:
    """The HTTP status of a provider's error: most SDKs say ``status_code``, Google says ``code``."""
    for name in ("status_code", "code"):
        if isinstance(value := getattr(error, name, None), int):
            return value
    return None


def _reason(error: BaseException) -> str:
    """One line: the error and, for a wrapped one, what began it (``Connection refused``)."""
    # Inspect's own wrapper quotes the whole request; what the provider said stands beside it.
    if said := getattr(error, "provider_message", None):
        return " ".join(said.split())[:REASON_CHARACTERS]
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    began = " ".join(str(root).split())
    if began and began not in text:
        text = f"{text.rstrip('.')} ({began})"
    return text[:REASON_CHARACTERS]


def _caused(error: BaseException, message: str) -> JudgeError:
    judge_error = JudgeError(message)
    judge_error.__cause__ = error  # made in one thread, raised in another
    return judge_error
