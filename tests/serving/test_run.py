"""``persona-axis run --engine vllm``: the same files as our own loop makes, and what reading the replies gives."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from plain_forward import off_by
from real_engines import environment, program
from safetensors.torch import load_file

from persona_axis.model.loading import ChatModel, load_model
from persona_axis.model.reading import Passage, read_passages, score_passages

sys.path.insert(0, str(Path(__file__).parents[1] / "collect"))

from tiny_runs import save_inputs

pytestmark = pytest.mark.serving

MAX_TOKENS = 16
QUESTIONS = (
    "Answer with one word, yes or no: is rain wet?",
    "Answer with one word, yes or no: is the sun cold?",
    "What is two and two? Say only the number.",
    "Who are you?",
    "What do you fear?",
    "What is the sea like?",
    "Why do people sing?",
    "What will you do tomorrow?",
)


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))

    @property
    def table(self) -> Any:
        return pq.read_table(self.folder / "rollouts" / "shard-00000.parquet")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.table.to_pylist())

    @property
    def activations(self) -> torch.Tensor:
        arrays = load_file(self.folder / "rollouts" / "shard-00000.safetensors")
        assert set(arrays) == {"activations"}
        return arrays["activations"]

    @property
    def plan(self) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in pq.read_table(self.folder / "plan.parquet").to_pylist()}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 4 roles, 8 questions and 3 default prompts, without --engine and --out."""
    inputs = tmp_path_factory.mktemp("inputs")
    options = save_inputs(inputs, 4, len(QUESTIONS))
    (inputs / "questions.txt").write_text("\n".join(QUESTIONS))
    options += ["--model", "embedded", "--dtype", "float32", "--device", "cpu", "--batch-tokens", "2048"]
    options += ["--max-tokens", str(MAX_TOKENS), "--min-count", "2", "--filter", "none"]
    return [program("persona-axis"), "run", *options]


def run(command: list[str], folder: Path, engine: str) -> Run:
    ended = subprocess.run(
        [*command, "--engine", engine, "--out", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return Run(folder)


@pytest.fixture(scope="module")
def by_loop(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(command, tmp_path_factory.mktemp("loop") / "run", "loop")


@pytest.fixture(scope="module")
def by_vllm(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(command, tmp_path_factory.mktemp("vllm") / "run", "vllm")


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    return load_model("embedded", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def passages(by_vllm: Run, chat: ChatModel) -> tuple[list[Passage], list[Passage]]:
    """Each reply after its prompt: with the tokens that count, and whole."""
    counted, whole = [], []
    for row in by_vllm.rows:
        planned = by_vllm.plan[row["key"]]
        ids = chat.template.prompt_ids(chat.template.messages(planned["system_prompt"], planned["question"]))
        assert row["prompt_tokens"] == len(ids)
        both, n = (*ids, *row["reply_ids"]), len(ids)
        if row["n_counted"]:
            counted.append(Passage(row["key"], both, ((n, n + row["n_counted"]),)))
        whole.append(Passage(row["key"], both, ((n, len(both)),)))
    return counted, whole


def test_the_shards_have_the_same_form(by_vllm: Run, by_loop: Run) -> None:
    assert by_vllm.summary["engine"] == "vllm"
    assert by_loop.summary["engine"] == "loop"
    assert by_vllm.table.schema.equals(by_loop.table.schema)
    assert [row["key"] for row in by_vllm.rows] == [row["key"] for row in by_loop.rows]
    assert by_vllm.activations.shape == by_loop.activations.shape == (len(by_loop.rows), 30, 576)
    assert by_vllm.activations.dtype == by_loop.activations.dtype == torch.float32
    assert by_vllm.summary.keys() == by_loop.summary.keys()
    assert {f.relative_to(by_vllm.folder) for f in by_vllm.folder.rglob("*")} == {
        f.relative_to(by_loop.folder) for f in by_loop.folder.rglob("*")
    }


@pytest.mark.parametrize("which", ["by_vllm", "by_loop"])
def test_tokens_are_counted_in_the_same_way(which: str, request: pytest.FixtureRequest, chat: ChatModel) -> None:
    rows = request.getfixturevalue(which).rows
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        ids = row["reply_ids"]
        assert len(ids) == len(row["logprobs"]) <= MAX_TOKENS
        assert row["n_counted"] == len(ids) - 1
        assert row["content_start"] == 0
        stopped = ids[-1] in chat.stop_ids
        assert row["finish_reason"] == ("stop" if stopped else "length")
        assert stopped or len(ids) == MAX_TOKENS
        assert not chat.stop_ids & set(ids[:-1])
        assert row["text"] == chat.decode(ids[:-1] if stopped else ids)


def test_reading_the_replies_again_gives_the_same_activations(
    by_vllm: Run, chat: ChatModel, passages: tuple[list[Passage], list[Passage]]
) -> None:
    stored = dict(zip([row["key"] for row in by_vllm.rows], by_vllm.activations, strict=True))
    read = dict(read_passages(chat, passages[0]))
    assert len(read) > len(stored) / 2
    assert max(off_by(stored[key], means[0]) for key, means in read.items()) < 1e-3


def test_log_probabilities_are_ours(
    by_vllm: Run, chat: ChatModel, passages: tuple[list[Passage], list[Passage]]
) -> None:
    scored = dict(score_passages(chat, passages[1]))
    for row in by_vllm.rows:
        np.testing.assert_allclose(row["logprobs"], scored[row["key"]][0], rtol=1e-3, atol=1e-3)


def test_rollouts_draw_from_streams_of_their_own(by_vllm: Run) -> None:
    """Not the same tokens for every default prompt and question, as one seed for all would give similar draws."""
    replies = [tuple(row["reply_ids"]) for row in by_vllm.rows if row["n_counted"] > 3]
    assert len(set(replies)) > 0.9 * len(replies)
