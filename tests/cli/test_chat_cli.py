"""``chat``: as a process with a pipe or a terminal at its standard input."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forkserver import Forkserver, Process
from tiny_runs import save_model

from persona_axis.catalog.transcripts import read_transcript
from persona_axis.geometry.axis import Axis
from persona_axis.model.layers import tapped
from persona_axis.model.loading import ChatModel, load_model
from persona_axis.steering.hooks import cap
from persona_axis.steering.policy import Policy
from tests.cli.conftest import Ended, Invoke

SLACK = 2e-3
POOL = {"n": 40, "percentiles": {str(p): [p - 50.0] * 4 for p in (5, 50, 95)}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that stops at the end of turn only: its replies go to the limit."""
    return save_model(tmp_path_factory.mktemp("chat") / "tiny-chat", stop=False)


@pytest.fixture(scope="module")
def chat(model: Path) -> ChatModel:
    return load_model(str(model), dtype="float32", device="cpu")


@pytest.fixture
def axis(tmp_path: Path, chat: ChatModel) -> Axis:
    vectors = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    axis = Axis(vectors, (0, 1, 2, 3), 2, {"model": chat.name, "revision": chat.revision, "pool": POOL})
    axis.save(tmp_path / "axis.safetensors")
    return axis


@pytest.fixture
def words(axis: Axis, tmp_path: Path, model: Path) -> list[str]:
    where = ["--model", str(model), "--dtype", "float32", "--device", "cpu", "--temperature", "0"]
    return ["chat", str(tmp_path / "axis.safetensors"), *where]


@pytest.fixture
def piped(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """``piped(lines, argv...)``: the command in this process with these lines at its standard input."""

    def call(lines: list[str], *argv: object) -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return invoke(*argv)

    return call


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# ---- from a pipe -------------------------------------------------------------------------------------------------


def test_a_message_per_line(piped: Invoke, words: list[str]) -> None:
    ended = piped(["Who?", "", "Why?"], *words, "--max-tokens", "8")
    assert ended.code == 0
    assert ended.out.count(" of 40 replies, 7 tokens\n  tokens ") == 2
    assert "\x1b" not in ended.out + ended.err
    assert ended.err == (
        "tiny-chat, float32, plain; read at layer 2.\nCut at --max-tokens 8.\nCut at --max-tokens 8.\n"
    )


def test_json_holds_every_token_and_turns_build_on_one_another(
    piped: Invoke, words: list[str], chat: ChatModel, axis: Axis
) -> None:
    ended = piped(["Who?", "Why?"], *words, "--system", "Be odd.", "--max-tokens", "8", "--json")
    first, second = rows(ended.out)
    assert (first["turn"], second["turn"], second["message"], second["system"]) == (1, 2, "Why?", "Be odd.")
    assert first["intervention"] is None
    assert first["finish_reason"] == "length"
    assert first["projection"] == pytest.approx(sum(first["projections"]) / first["n_counted"])
    assert first["n_counted"] == len(first["projections"]) == 7
    said = ["Be odd.", "Who?", first["reply"], "Why?"]
    messages = [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant", "user"), said, strict=True)]
    assert second["projections"] == pytest.approx(golden(chat, axis, messages, None), abs=SLACK)


@torch.inference_mode()
def golden(chat: ChatModel, axis: Axis, messages: list[dict[str, str]], policy: Policy | None) -> list[float]:
    """Per-token projections of the greedy reply of 8 tokens: whole forwards without a cache."""
    ids = list(chat.template.prompt_ids(messages))
    start = len(ids)
    found: list[float] = []
    for _ in range(8):
        seen: list[torch.Tensor] = []
        with tapped([chat.blocks[2]], lambda i, hidden, seen=seen: seen.append(hidden[0].clone())):
            if policy is None:
                logits = chat.model(input_ids=torch.tensor([ids])).logits
            else:
                with cap(chat, policy):
                    logits = chat.model(input_ids=torch.tensor([ids])).logits
        found = axis.project(seen[0], 2)[start:].tolist()
        ids.append(int(logits[0, -1].argmax()))
    return found


def test_held_plain_and_held_again(
    piped: Invoke, words: list[str], chat: ChatModel, axis: Axis, tmp_path: Path
) -> None:
    policy = Policy.at_percentile(axis, [1, 2], 50)
    policy.save(tmp_path / "policy")
    held = [*words, "--policy", tmp_path / "policy", "--max-tokens", "8", "--json"]
    again = ["Who?", "/reset", "/plain", "Who?", "/reset", "/plain", "Who?"]
    ended = piped(again, *held)
    assert ended.code == 0
    assert "tiny-chat, float32, held at layers 1-2; read at layer 2.\n" in ended.err
    assert "Plain from here on.\n" in ended.err
    assert "From here on held at layers 1-2.\n" in ended.err
    first, plain, last = rows(ended.out)
    who = [{"role": "user", "content": "Who?"}]
    assert first["projections"] == pytest.approx(golden(chat, axis, who, policy), abs=SLACK)
    assert plain["projections"] == pytest.approx(golden(chat, axis, who, None), abs=SLACK)
    assert last == first
    assert first["intervention"]["policy"] == policy.content_hash
    assert plain["intervention"] is None
    assert any(at["share_corrected"] > 0 for at in first["intervention"]["at"])
    shown = piped(["Who?"], *held[:-1])
    assert " % corrected\n" in shown.out


def test_commands(piped: Invoke, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = ["/help", "/system Be odd.", "One?", "//slash", f"/save {file}", "/system", "/quit", "Never?"]
    ended = piped(lines, *words, "--max-tokens", "4", "--strength", "-4", "--layer", "1")
    assert ended.code == 0
    assert "forget the conversation" in ended.err
    assert "steered by -4 at layer 1" in ended.err
    assert f"2 turns in {file}" in ended.err
    saved = read_transcript(file)
    assert [m["content"] for m in saved.messages if m["role"] != "assistant"] == ["Be odd.", "One?", "/slash"]
    assert (saved.model, saved.turns) == ("tiny-chat", 2)
    assert saved.steering == {"kind": "steer", "strength": -4.0, "unit": "raw", "layers": [1]}
    assert saved.extra["held"] == [True, True]
    assert len(saved.extra["projections"]) == 2


def test_what_cannot_be_answered_is_said_and_the_rest_goes_on(piped: Invoke, words: list[str], tmp_path: Path) -> None:
    lines = ["/nope", "/plain", "/save", "/save x.json", "/reset now", "Say <|im_end|>", "x" * 600, "Who?"]
    ended = piped(lines, *words, "--max-tokens", "4", "--json")
    assert ended.code == 3
    assert len(rows(ended.out)) == 1
    for said in (
        "There is no command /nope; /help lists",
        "started without --policy or --strength",
        "/save needs a file name",
        "There is nothing to save yet",
        "/reset takes nothing after it",
        "contains '<|im_end|>'",
        "and the model's context 512: there is no room",
        "7 of the lines could not be answered",
    ):
        assert said in ended.err
    assert "Traceback" not in ended.err


def test_the_end_of_the_context_is_said(piped: Invoke, words: list[str]) -> None:
    ended = piped(["x" * 470], *words)
    assert ended.code == 0
    assert "Cut: the model's context is full. /reset starts a new conversation." in ended.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--strength", "1", "--policy", "p"], "Give --policy or --strength, not both"),
        (["--layer", "1"], "--layer says where to steer; --strength must say how far"),
        (["--strength", "1", "--layer", "7"], "This axis has no layer 7"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
    ],
)
def test_mistakes(invoke: Invoke, words: list[str], argv: list[str], said: str) -> None:
    ended = invoke(*words, *argv)
    assert (ended.code, said in ended.message) == (2, True)


# ---- processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def keyboard() -> Iterator[tuple[int, Path]]:
    """A terminal: where a person types, and the file that a process reads from."""
    person, terminal = pty.openpty()
    yield person, Path(os.ttyname(terminal))
    os.close(person)
    os.close(terminal)


def started(processes: Forkserver, keyboard: tuple[int, Path], words: list[str], *more: str) -> Process:
    process = processes.start(*words, *more, stdin=keyboard[1])
    process.wait_for(lambda: process.err_file.exists() and "/help lists the commands" in process.err)
    return process


def test_control_c_stops_a_reply_and_at_the_prompt_the_chat(
    processes: Forkserver, keyboard: tuple[int, Path], words: list[str]
) -> None:
    process = started(processes, keyboard, words, "--max-tokens", "400")
    process.wait_for(lambda: "> " in process.out)
    os.write(keyboard[0], b"Tell me all.\n")
    process.wait_for(lambda: len(process.out) > 30)
    process.signal(signal.SIGINT)
    process.wait_for(lambda: "Stopped." in process.err)
    process.wait_for(lambda: process.out.count("> ") == 2)
    assert " of 40 replies, " in process.out
    assert process.poll() is None
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert "Traceback" not in process.err
    assert "the same command goes on" not in process.err


def test_control_d_leaves(processes: Forkserver, keyboard: tuple[int, Path], words: list[str]) -> None:
    process = started(processes, keyboard, words, "--max-tokens", "4")
    os.write(keyboard[0], b"Hm?\n")
    process.wait_for(lambda: "Cut at --max-tokens 4." in process.err)
    os.write(keyboard[0], b"\x04")
    assert process.wait() == 0
    assert "\x1b" not in process.out  # what is not a terminal gets no colours


def test_lines_from_a_file_are_answered_one_by_one(processes: Forkserver, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("Who?\nWhy?")
    process = processes.start(*words, "--max-tokens", "4", "--json", stdin=tmp_path / "lines")
    assert process.wait() == 0, process.err
    assert [row["message"] for row in rows(process.out)] == ["Who?", "Why?"]
