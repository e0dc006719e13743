"""Small runs for the tests of collect, pipeline and cli.

Texts and plans of a few rollouts; an engine, a judge and a chat model that stand in for the real ones and keep a
record of what they were asked; a model folder with the inputs of ``persona-axis run``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

from persona_axis.catalog.catalog import Question, Role
from persona_axis.collect.plan import Plan, make_plan
from persona_axis.collect.rundir import RunDir
from persona_axis.collect.verdicts import Exchange, Verdict
from persona_axis.model.engine import OnTokens, Reply, Request, Sampling, nobody

NAMES = ("bard", "demon", "oracle", "teacher", "pirate", "ghost", "critic", "farmer")
CONFIG = {"model": "tiny", "seed": 0}  # of a run folder

# ---- plans -------------------------------------------------------------------------------------------------------


def make_roles(n: int = 4, prompts: int = 2, questions: int = 1) -> list[Role]:
    return [
        Role(
            name,
            "near" if name == "teacher" else "far",
            f"A {name}.",
            tuple(f"You are a {name}, manner {i}." for i in range(prompts)),
            tuple(f"What does a {name} do, part {i}?" for i in range(questions)),
            f"3: speaks as a {name}.",
        )
        for name in NAMES[:n]
    ]


def make_questions(n: int = 8, categories: Sequence[str] = ("daily", "deep")) -> list[Question]:
    return [Question(f"q{i}", categories[i % len(categories)], f"Question {i}, why?") for i in range(n)]


def small_plan(
    n_roles: int = 4, n_questions: int = 8, neutral: Sequence[str] = ("", "Help.", "Answer me."), **options: Any
) -> Plan:
    return make_plan(make_roles(n_roles), make_questions(n_questions), neutral, **options)


def open_run(folder: Path, plan: Plan | None = None, **config: Any) -> RunDir:
    return RunDir.open(folder, {**CONFIG, **config}, plan or small_plan())


# ---- stand-ins ---------------------------------------------------------------------------------------------------


class StubTemplate:
    """Byte ids of the system prompt, a separator, byte ids of the question."""

    def messages(self, system: str, question: str) -> tuple[str, str]:
        return system, question

    def prompt_ids(self, messages: tuple[str, str]) -> tuple[int, ...]:
        system, question = messages
        return (*system.encode(), 256, *question.encode())


def stub_chat(d_model: int = 8) -> Any:
    """As much of a chat model as the collector needs."""
    return SimpleNamespace(
        d_model=d_model, template=StubTemplate(), decode=lambda ids: " ".join(str(i) for i in ids), stop_ids={2}
    )


Activate = Callable[[str], np.ndarray | None]  # rollout key -> [n_layers, d_model], None when nothing counts


@dataclass
class ScriptedEngine:
    """Replies made from the rollout's key alone, last asked first answered; no model."""

    activate: Activate | None = None
    layers: tuple[int, ...] = (0, 1, 2)
    d_model: int = 8
    batch: int = 5  # requests read ahead
    name: str = "scripted"
    asked: list[Request] = field(default_factory=list)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: OnTokens = nobody
    ) -> Iterator[Reply]:
        waiting: list[Request] = []
        for request in requests:
            self.asked.append(request)
            waiting.append(request)
            if len(waiting) == self.batch:
                yield self.reply(waiting.pop())
        while waiting:
            yield self.reply(waiting.pop())

    def reply(self, request: Request) -> Reply:
        random = np.random.default_rng(list(request.key.encode()))
        n = int(random.integers(2, 7))
        ids = random.integers(3, 200, n).astype(np.int32)
        stopped = bool(random.integers(2))
        ids[-1] = 2 if stopped else ids[-1]
        shape = len(self.layers), self.d_model
        values = random.normal(size=shape) if self.activate is None else self.activate(request.key)
        return Reply(
            key=request.key,
            token_ids=ids,
            logprobs=-random.random(n).astype(np.float32),
            finish_reason="stop" if stopped else "length",
            n_counted=0 if values is None else n - 1,
            content_start=0,
            activation=None if values is None else torch.from_numpy(values.astype(np.float32)),
        )

    @property
    def asked_keys(self) -> list[str]:
        return [request.key for request in self.asked]


@dataclass
class Interrupted:
    """An engine that is interrupted (``error``) after so many replies."""

    engine: Any
    after: int
    error: type[BaseException] = KeyboardInterrupt
    handed_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.engine.name)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.engine.layers)

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: OnTokens = nobody
    ) -> Iterator[Reply]:
        for reply in self.engine.generate(requests, sampling, on_tokens):
            if len(self.handed_out) == self.after:
                raise self.error("interrupted by the test")
            self.handed_out.append(reply.key)
            yield reply


@dataclass
class ScriptedJudge:
    """Verdicts from a function of the exchange, in reverse order; stops with ``error`` after so many."""

    decide: Callable[[Exchange], Verdict]
    name: str = "likelihood"
    kind: Literal["evidence", "score"] = "evidence"
    stop_after: int | None = None
    error: type[BaseException] = KeyboardInterrupt
    asked: list[str] = field(default_factory=list)

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]:
        for exchange in reversed(exchanges):
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise self.error("stopped by the test")
            self.asked.append(exchange.key)
            yield self.decide(exchange)


def evidence_judge(value: Callable[[Exchange], float], **options: Any) -> ScriptedJudge:
    return ScriptedJudge(lambda e: Verdict(e.key, "ok", evidence=value(e)), **options)


# ---- files for `persona-axis run` --------------------------------------------------------------------------------


def _tiny_models() -> Any:
    """The module of ``tests/conftest.py``; by path, because every folder's conftest has that name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_model(
    folder: Path, *, arch: str = "llama", template: str | None = "chatml", stop: bool = True, nan: bool = False
) -> Path:
    """A tiny random model with its tokenizer, as Transformers saves them."""
    made = _tiny_models()
    model = made.tiny_weights(arch)
    tokenizer = made.tiny_tokenizer(made.TEMPLATES[template] if template else None)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [end, *made.STOP_IDS] if stop else end
    if nan:
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_inputs(folder: Path, n_roles: int = 4, n_questions: int = 8) -> list[str]:
    """Roles, questions and default prompts as files; the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = ("name", "group", "description", "prompts", "questions", "rubric")
    rows = [json.dumps({name: getattr(role, name) for name in fields}) for role in make_roles(n_roles)]
    (folder / "roles.jsonl").write_text("\n".join(rows))
    (folder / "questions.txt").write_text("\n".join(q.text for q in make_questions(n_questions)))
    (folder / "neutral.json").write_text(json.dumps(["", "Help.", "Answer me."]))
    named = {"--roles": "roles.jsonl", "--questions": "questions.txt", "--default-prompts": "neutral.json"}
    return [word for option, file in named.items() for word in (option, str(folder / file))]


def contents(run: Path) -> dict[str, tuple[Any, ...]]:
    """What decides a rollout's later fate, by key: ids, finish reason, text, counted tokens."""
    import pyarrow.parquet as pq

    rows: dict[str, tuple[Any, ...]] = {}
    for file in sorted((run / "rollouts").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert row["key"] not in rows, f"{row['key']} is in two shards"
            rows[row["key"]] = (tuple(row["reply_ids"]), row["finish_reason"], row["text"], row["n_counted"])
    return rows
