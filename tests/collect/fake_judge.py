"""A judge behind an OpenAI-compatible server on this machine: ``--judge openai-api/fake/judge``."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

JUDGE = "openai-api/fake/judge"
DEAD_URL = "http://127.0.0.1:9/v1"  # the discard port: nobody listens


@dataclass
class FakeJudge:
    """Answers with ``reply(prompt)``: words, or an HTTP status that is an error. Records prompts and requests."""

    url: str
    reply: Callable[[str], str | int] = lambda prompt: "In voice.\nScore: 3"
    prompts: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"FAKE_BASE_URL": self.url, "FAKE_API_KEY": "secret", "NO_PROXY": "127.0.0.1"}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed hangs up in mid-answer."""


@contextmanager
def serving() -> Iterator[FakeJudge]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with lock:
                fake.bodies.append(body)
                fake.prompts.append(prompt)
                said = fake.reply(prompt)
            status = said if isinstance(said, int) else 200
            answer = {"error": {"message": "no"}} if isinstance(said, int) else completion(said)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    http = _Quiet(("127.0.0.1", 0), Handler)
    fake = FakeJudge(f"http://127.0.0.1:{http.server_port}/v1")
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield fake
    finally:
        http.shutdown()
        http.server_close()


def completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice], "usage": usage}
