"""The client against Inspect's mock model and against a real OpenAI-compatible server on this machine."""

import builtins
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_axis.errors import JudgeError, MissingDependency, UsageError
from persona_axis.llm import client as client_module
from persona_axis.llm.client import DEAD_AT_START, Answer, Failure, LLMClient, Pace, Prompt

anyio = pytest.importorskip("anyio")
inspect_model = pytest.importorskip("inspect_ai.model")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tenacity, as Inspect calls it

MODEL = "openai-api/fake/judge-1"


def prompts(number: int) -> list[Prompt]:
    return [Prompt(f"key-{index}", f"prompt {index}", system="Be brief.") for index in range(number)]


def completion(text: str, finish: str = "stop", **usage: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    counts = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14, **usage}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-1",
        "choices": [choice],
        "usage": counts,
    }


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "code": code}}


Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, body, headers


@dataclass
class FakeServer:
    """Answers with ``reply(nth request, its body)``; records when requests came and how many were open."""

    reply: Callable[[int, dict[str, Any]], Reply] = lambda nth, body: (200, completion("fine"))
    seconds: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    open_now: int = 0
    open_most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.bodies.append(body)
            self.times.append(time.monotonic())
            nth = len(self.bodies) - 1
            self.open_now += 1
            self.open_most = max(self.open_most, self.open_now)
        time.sleep(self.seconds)
        with self.lock:
            self.open_now -= 1
        return self.reply(nth, body)


class QuietHTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in mid-answer is what some of these tests are about."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer, *headers = fake.handle(body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            sent = {"Content-Type": "application/json", **(headers[0] if headers else {})}
            for name, value in {**sent, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    http = QuietHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("FAKE_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    monkeypatch.setenv("FAKE_API_KEY", "secret-key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield fake
    http.shutdown()
    http.server_close()


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0.02)


def mock_output(text: str, stop: str = "stop") -> Any:
    output = inspect_model.ModelOutput.from_content("mockllm", text, stop_reason=stop)
    # With counts of its own, or Inspect's mock fetches a tokenizer from the network to count.
    output.usage = inspect_model.ModelUsage(
        input_tokens=5, output_tokens=2, input_tokens_cache_read=30, input_tokens_cache_write=1
    )
    return output


def mocked(reply: Callable[..., Any], **options: Any) -> LLMClient:
    return LLMClient("mockllm/model", model_args={"custom_outputs": reply}, **options)


# --- answers ------------------------------------------------------------------------------------------------


def test_one_answer_per_prompt_with_the_counts_of_the_server(server: FakeServer) -> None:
    server.reply = lambda nth, body: (200, completion(f"re: {body['messages'][-1]['content']}"))
    with LLMClient(MODEL) as client:
        answers = list(client.ask(prompts(20)))
    assert sorted(answers, key=lambda answer: int(answer.key[4:])) == [
        Answer(f"key-{index}", f"re: prompt {index}", 11, 3) for index in range(20)
    ]
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert server.bodies[0]["model"] == "judge-1"
    assert server.bodies[0]["temperature"] == 0
    assert server.bodies[0]["max_tokens"] == 1024
    assert len(server.bodies) == 20


def test_answers_come_as_they_finish_not_as_they_were_asked(server: FakeServer) -> None:
    first_may_end = threading.Event()

    def reply(nth: int, body: dict[str, Any]) -> Reply:
        if body["messages"][-1]["content"] == "prompt 0":
            assert first_may_end.wait(5)
        return 200, completion("x")

    server.reply = reply
    with LLMClient(MODEL) as client:
        answers = client.ask(prompts(3))
        early = {next(answers).key, next(answers).key}
        assert early == {"key-1", "key-2"}
        first_may_end.set()
        assert [answer.key for answer in answers] == ["key-0"]


def test_no_prompts_no_answers() -> None:
    with mocked(lambda *_: mock_output("x")) as client:
        assert list(client.ask([])) == []


def test_a_client_serves_many_iterators_and_two_at_a_time() -> None:
    with mocked(lambda *_: mock_output("x"), max_connections=2) as client:
        one, other = client.ask(prompts(9)), client.ask(prompts(9))
        assert len([answer for pair in zip(one, other, strict=True) for answer in pair]) == 18
        assert len(list(client.ask(prompts(3)))) == 3


def test_cached_input_tokens_count_as_input() -> None:
    with mocked(lambda *_: mock_output("x")) as client:
        assert next(client.ask(prompts(1))) == Answer("key-0", "x", input_tokens=36, output_tokens=2)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Score", "max_tokens", Answer("key-0", "Score", 36, 2, cut=True)),
        ("  ", "stop", Failure("key-0", "an empty reply (stop reason: stop)", True)),
        ("", "max_tokens", Failure("key-0", "reasoning used up max_tokens=1024; allow more", False)),
        ("I cannot", "content_filter", Failure("key-0", "refused by the provider's filter: I cannot", False)),
        ("too long", "model_length", Failure("key-0", "longer than the model's context: too long", False)),
    ],
)
def test_what_is_no_full_answer_is_not_passed_off_as_one(text: str, stop: str, expected: Any) -> None:
    with mocked(lambda *_: mock_output(text, stop)) as client:
        assert list(client.ask(prompts(1))) == [expected]


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_transient_error_is_repeated(server: FakeServer, status: int) -> None:
    server.reply = lambda nth, body: (status, error("busy")) if nth < 2 else (200, completion("at last"))
    with LLMClient(MODEL, max_retries=2) as client:
        assert list(client.ask(prompts(1))) == [Answer("key-0", "at last", 11, 3)]
    assert len(server.bodies) == 3


def test_the_servers_own_waiting_time_is_kept(server: FakeServer) -> None:
    busy = (429, error("busy"), {"Retry-After": "1"})
    server.reply = lambda nth, body: busy if nth == 0 else (200, completion("x"))
    with LLMClient(MODEL) as client:
        list(client.ask(prompts(1)))
    assert server.times[1] - server.times[0] >= 1.0


def test_repeats_are_counted_and_none_are_hidden_in_the_sdk(server: FakeServer) -> None:
    server.reply = lambda nth, body: (500, error("broken"))
    with LLMClient(MODEL, max_retries=3) as client:
        (failure,) = client.ask(prompts(1))
    assert isinstance(failure, Failure)
    assert failure.retryable
    assert "broken" in failure.reason
    assert len(server.bodies) == 4  # one request and three repeats


def test_a_bad_request_is_this_prompts_own_and_not_repeated(server: FakeServer) -> None:
    server.reply = lambda nth, body: (400, error("what is this"))
    with LLMClient(MODEL) as client:
        failures = list(client.ask(prompts(3 * DEAD_AT_START)))  # so many, and still not the endpoint's fault
    assert all(isinstance(failure, Failure) and not failure.retryable for failure in failures)
    assert "what is this" in failures[0].reason  # type: ignore[union-attr]
    assert len(server.bodies) == 3 * DEAD_AT_START


@pytest.mark.parametrize("garbage", [b"<html>", b"{", b"[]", b"{}", b'{"choices": []}', b'"x"', b"\xff\xfe"])
def test_garbage_is_a_failure_and_the_next_prompt_goes_on(server: FakeServer, garbage: bytes) -> None:
    server.reply = lambda nth, body: (200, garbage) if nth == 0 else (200, completion("fine"))
    with LLMClient(MODEL, max_retries=0, max_connections=1) as client:
        first, second = client.ask(prompts(2))
    assert isinstance(first, Failure)
    assert first.reason
    assert second == Answer("key-1", "fine", 11, 3)


def test_a_request_without_end_is_given_up(server: FakeServer) -> None:
    server.seconds = 6.0
    with LLMClient(MODEL, max_retries=0, timeout_seconds=1) as client:
        begun = time.monotonic()
        (failure,) = client.ask(prompts(1))
        assert time.monotonic() - begun < 5
    assert isinstance(failure, Failure)
    assert failure.retryable


def test_a_dead_server_stops_the_run(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BASE_URL", "http://127.0.0.1:9/v1")  # the discard port: nobody listens
    failures: list[Any] = []
    begun = time.monotonic()
    with LLMClient(MODEL, max_retries=1) as client, pytest.raises(JudgeError) as caught:
        failures.extend(client.ask(prompts(10_000)))
    assert time.monotonic() - begun < 10
    assert len(failures) < DEAD_AT_START + 16
    assert all(isinstance(failure, Failure) and failure.retryable for failure in failures)
    assert "http://127.0.0.1:9/v1" in str(caught.value)
    assert "connection attempts failed" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_few_failures_are_failures_even_when_all_fail(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    monkeypatch.setenv("FAKE_BASE_URL", "http://127.0.0.1:9/v1")
    with LLMClient(MODEL, max_retries=0) as client:
        assert len(list(client.ask(prompts(DEAD_AT_START - 1)))) == DEAD_AT_START - 1
        with pytest.raises(JudgeError):  # an auditor that asks one thing at a time is told as well
            list(client.ask(prompts(1)))


def test_an_outage_after_answers_is_borne_longer(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    monkeypatch.setattr(client_module, "DEAD_LATER", 20)
    server.reply = lambda nth, body: (200, completion("x")) if nth == 0 else (503, error("gone"))
    results: list[Any] = []
    with (
        LLMClient(MODEL, max_retries=0, max_connections=1) as client,
        pytest.raises(JudgeError, match="gone"),
    ):
        results.extend(client.ask(prompts(100)))
    assert isinstance(results[0], Answer)
    assert len(results) == 20  # the answer and 19 failures; the 20th stops it


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, error("bad key", "invalid_api_key"), "FAKE_API_KEY"),
        (402, error("pay up"), "no credit"),
        (429, error("quota", "insufficient_quota"), "no credit"),
    ],
)
def test_a_refused_account_stops_at_once(server: FakeServer, status: int, body: Any, words: str) -> None:
    server.reply = lambda nth, request: (status, body)
    with LLMClient(MODEL, max_connections=1) as client, pytest.raises(JudgeError, match=words) as caught:
        list(client.ask(prompts(100)))
    assert len(server.bodies) <= 3
    assert "secret-key" not in str(caught.value)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(client_module, "_read", broken)
    with mocked(lambda *_: mock_output("x")) as client, pytest.raises(ExceptionGroup) as caught:
        list(client.ask(prompts(3)))
    assert caught.group_contains(ZeroDivisionError, match="a bug of ours")


# --- names and arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody/model", "gpt-4.1-mini", "openai-api/model-without-service"])
def test_an_unknown_model_names_the_valid_forms(name: str) -> None:
    with pytest.raises(JudgeError, match="openai-api/<service>/<model>") as caught:
        LLMClient(name)
    assert name in str(caught.value)


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="FAKE_API_KEY") as caught:
        LLMClient(MODEL)
    assert "[bold]" not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_connections": 0},
        {"requests_per_minute": 0.0},
        {"requests_per_minute": float("nan")},
        {"max_retries": -1},
        {"timeout_seconds": 0},
        {"max_tokens": 0},
    ],
)
def test_bad_numbers_are_usage_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        LLMClient("mockllm/model", **bad)


def test_without_inspect_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_inspect(name: str, *rest: Any) -> Any:
        if name.startswith("inspect_ai"):
            raise ImportError("No module named 'inspect_ai'")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_inspect)
    with pytest.raises(MissingDependency, match=r'pip install "persona-axis\[judge\]"'):
        LLMClient("mockllm/model")


def test_nothing_is_left_behind(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))
    hook, threads = sys.excepthook, set(threading.enumerate())
    with mocked(lambda *_: mock_output("x")) as client:
        list(client.ask(prompts(3)))
    client.close()  # twice is once
    assert sys.excepthook is hook
    assert set(threading.enumerate()) <= threads
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="closed"):
        next(client.ask(prompts(1)))


# --- stopping -----------------------------------------------------------------------------------------------


class Slow:
    """The first prompt is answered, the others take half a minute; counts those in flight."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.started = threading.Event()

    async def __call__(self, messages: Any, *_: Any) -> Any:
        if messages[-1].text == "prompt 0":
            return mock_output("x")
        self.in_flight += 1
        self.started.set()
        try:
            await anyio.sleep(30)
        finally:
            self.in_flight -= 1


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_leaving_early_cancels_what_is_in_flight() -> None:
    slow = Slow()
    with mocked(slow) as client:
        for _ in client.ask(prompts(50)):
            assert slow.started.wait(5)
            break
        wait_until(lambda: slow.in_flight == 0)


def test_closing_with_a_half_read_iterator_does_not_hang() -> None:
    slow = Slow()
    client = mocked(slow)
    answers = client.ask(prompts(50))
    next(answers)
    begun = time.monotonic()
    client.close()
    assert time.monotonic() - begun < 5
    assert slow.in_flight == 0


def test_control_c_gets_through_and_cancels() -> None:
    slow = Slow()

    def interrupt() -> None:
        slow.started.wait(5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    begun = time.monotonic()
    with mocked(slow) as client:
        with pytest.raises(KeyboardInterrupt):
            list(client.ask(prompts(50)))
        assert time.monotonic() - begun < 10
        wait_until(lambda: slow.in_flight == 0)


def test_a_caller_who_waits_makes_the_requests_wait() -> None:
    asked = []
    with mocked(lambda messages, *_: asked.append(1) or mock_output("x"), max_connections=4) as client:
        answers = client.ask(prompts(200))
        next(answers)
        time.sleep(0.3)
        assert len(asked) <= 1 + 4 + 4 + 1  # taken, waiting to be taken, in a slot, and one about to be
        assert len(list(answers)) == 199


# --- concurrency and pace -----------------------------------------------------------------------------------


def test_the_server_sees_at_most_max_connections(server: FakeServer) -> None:
    server.seconds = 0.05
    for bound in (1, 3):  # the second client is not held to the first one's bound
        server.open_most = 0
        with LLMClient(MODEL, max_connections=bound) as client:
            assert len(list(client.ask(prompts(4 * bound)))) == 4 * bound
        assert min(bound, 2) <= server.open_most <= bound


def test_the_pace_holds_for_repeats_too(server: FakeServer) -> None:
    server.reply = lambda nth, body: (429, error("busy")) if nth % 2 == 0 else (200, completion("x"))
    with LLMClient(MODEL, requests_per_minute=1200, max_retries=8) as client:
        assert all(isinstance(answer, Answer) for answer in client.ask(prompts(6)))
    assert len(server.times) == 12
    # 50 ms apart when sent; the way to the server can move the first and the last only a little.
    assert server.times[-1] - server.times[0] >= 0.9 * 11 * 0.05


class FakeClock:
    """Time that passes only while somebody sleeps, and then rather too much."""

    def __init__(self, late: list[float]) -> None:
        self.now = 100.0
        self.late = iter(late)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds + next(self.late, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    per_minute=st.floats(0.5, 600),
    late=st.lists(st.floats(0, 3), max_size=40),
    busy=st.lists(st.floats(0, 5), min_size=2, max_size=40),
)
def test_no_minute_holds_more_turns_than_asked_for(per_minute: float, late: list[float], busy: list[float]) -> None:
    clock = FakeClock(late)
    turns: list[float] = []

    async def take_turns() -> None:
        pace = Pace(per_minute, clock=clock, sleep=clock.sleep)
        for seconds in busy:
            await pace.turn()
            turns.append(clock.now)
            clock.now += seconds

    anyio.run(take_turns)
    gaps = [later - earlier for earlier, later in pairwise(turns)]
    assert min(gaps) >= 60 / per_minute - 1e-6
    for begin in turns:
        assert sum(begin <= turn < begin + 60 - 1e-6 for turn in turns) <= max(1, -(-per_minute // 1))


def test_a_punctual_pace_wastes_no_time() -> None:
    clock = FakeClock([])

    async def take_turns() -> None:
        pace = Pace(60, clock=clock, sleep=clock.sleep)
        for _ in range(11):
            await pace.turn()

    anyio.run(take_turns)
    assert clock.now == pytest.approx(110.0)
