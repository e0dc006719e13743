"""The plan: which persona answers which question under which prompt. Written first; the unit of resume.

Every persona answers the same questions. ``rotated`` (default) asks each role each question once, dealing its
prompts over the questions evenly; ``crossed`` asks under every prompt. The default persona answers every question
under every default prompt, so the end of the axis that every role shares is the best measured one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from persona_axis.catalog.catalog import Question, Role
from persona_axis.errors import StorageError, UsageError
from persona_axis.files.atomic import replace_atomic

DEFAULT = "default"  # the default persona's name
SHARD_ROWS = 64
BLOCK_QUESTIONS = 16  # questions folded together when activations are not kept
MIN_BLOCKS = 5  # as many as cross-fitting folds
Design = Literal["rotated", "crossed"]


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One rollout to make."""

    key: str
    persona: str
    group: str  # "" for the default persona
    prompt_index: int
    question_id: str
    question_index: int  # over all questions of the plan, own ones included
    block: int  # what folded activations are summed over; one question each when activations are kept
    category: str
    system_prompt: str
    question: str
    rubric: str
    shard: int


SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        *((name, pa.dictionary(pa.int32(), pa.string())) for name in ("persona", "group")),
        ("prompt_index", pa.int32()),
        ("question_id", pa.dictionary(pa.int32(), pa.string())),
        ("question_index", pa.int32()),
        ("block", pa.int32()),
        *(
            (name, pa.dictionary(pa.int32(), pa.string()))
            for name in ("category", "system_prompt", "question", "rubric")
        ),
        ("shard", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """All rollouts, personas together, the default persona first."""

    rows: tuple[PlanRow, ...]

    @property
    def personas(self) -> list[str]:
        """In plan order, the default persona first."""
        return list(dict.fromkeys(row.persona for row in self.rows))

    @property
    def neutral_prompts(self) -> list[str]:
        """System prompts of the default persona's rollouts, one per rollout."""
        return [row.system_prompt for row in self.rows if row.persona == DEFAULT]

    @property
    def n_blocks(self) -> int:
        return max(row.block for row in self.rows) + 1

    @property
    def n_shards(self) -> int:
        return self.rows[-1].shard + 1

    def shards(self) -> Iterator[tuple[int, list[PlanRow]]]:
        """Shard number and its rows, in order."""
        for shard in range(self.n_shards):
            yield shard, list(self.rows[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS])

    def digest(self) -> str:
        """SHA-256 of every row."""
        h = hashlib.sha256()
        for row in self.rows:
            h.update(json.dumps(asdict(row), sort_keys=True).encode())
        return h.hexdigest()

    def write(self, path: Path) -> None:
        """As Parquet, atomically."""
        table = pa.Table.from_pylist([asdict(row) for row in self.rows], SCHEMA)
        with replace_atomic(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises StorageError when it is damaged, FileNotFoundError when absent."""
        if not path.exists():
            raise FileNotFoundError(path)
        try:
            return cls(tuple(PlanRow(**row) for row in pq.read_table(path).to_pylist()))
        except (pa.ArrowException, OSError, TypeError) as e:
            raise StorageError(f"The plan {path} is damaged ({e}). Delete it and run the same command.") from e


def make_plan(
    roles: Sequence[Role],
    questions: Sequence[Question],
    default_prompts: Sequence[str],
    *,
    design: Design = "rotated",
    prompts: Sequence[int] | None = None,
    own_questions: bool = False,
    keep_all: bool = True,
    seed: int = 0,
) -> Plan:
    """Lay out all rollouts.

    Args:
        roles: at least two.
        questions: put to every persona.
        default_prompts: neutral system prompts; "" is no system message.
        design: see module docstring.
        prompts: which of each role's prompts to use; None is all.
        own_questions: each role also answers its own questions, and so does the default persona.
        keep_all: every activation is kept; otherwise blocks of questions are summed.
        seed: deals prompts over questions.

    Raises:
        UsageError: too few roles or questions, or a prompt that a role does not have.
    """
    _check(roles, questions, default_prompts, prompts)
    asked = list(questions)
    own = {role.name: _own_questions(role) if own_questions else [] for role in roles}
    index = {q.id: i for i, q in enumerate([*asked, *(q for name in own for q in own[name])])}
    block_size = 1 if keep_all else max(1, min(BLOCK_QUESTIONS, len(index) // MIN_BLOCKS))
    rows: list[PlanRow] = []

    def add(persona: str, group: str, rubric: str, prompt: int, text: str, q: Question) -> None:
        i = index[q.id]
        shard = len(rows) // SHARD_ROWS
        key = f"{persona}/p{prompt}/{q.id}"
        rows.append(
            PlanRow(key, persona, group, prompt, q.id, i, i // block_size, q.category, text, q.text, rubric, shard)
        )

    for p, text in enumerate(default_prompts):
        for q in asked:
            add(DEFAULT, "", "", p, text, q)
    for i, q in enumerate(q for name in own for q in own[name]):
        p = i % len(default_prompts)
        add(DEFAULT, "", "", p, default_prompts[p], q)
    for role in roles:
        use = list(range(len(role.prompts))) if prompts is None else list(prompts)
        for p, q in _pairs(role.name, use, [*asked, *own[role.name]], design, seed):
            add(role.name, role.group, role.rubric, p, role.prompts[p], q)
    return Plan(tuple(rows))


def _pairs(
    name: str, prompts: list[int], questions: list[Question], design: Design, seed: int
) -> list[tuple[int, Question]]:
    """(prompt, question) of one role, prompts together (their prefix is prefilled once)."""
    if design == "crossed":
        return [(p, q) for p in prompts for q in questions]
    # Dealt after a shuffle: dealing in catalog order would tie each prompt to the same question categories.
    order = list(range(len(questions)))
    random.Random(f"{seed}/{name}").shuffle(order)
    dealt = {q: prompts[i % len(prompts)] for i, q in enumerate(order)}
    return [(p, questions[q]) for p in prompts for q in range(len(questions)) if dealt[q] == p]


def _own_questions(role: Role) -> list[Question]:
    return [Question(f"{role.name}:{i}", "own", text) for i, text in enumerate(role.questions)]


def _check(
    roles: Sequence[Role],
    questions: Sequence[Question],
    default_prompts: Sequence[str],
    prompts: Sequence[int] | None,
) -> None:
    if len(roles) < 3:
        raise UsageError(f"An axis needs at least 3 roles, not {len(roles)}.")
    if len(questions) < MIN_BLOCKS:
        raise UsageError(
            f"{len(questions)} questions are too few: figures are cross-fitted over {MIN_BLOCKS} folds of questions."
        )
    if not default_prompts:
        raise UsageError("There is no default prompt; an empty string stands for no system message.")
    if prompts is not None and len(set(prompts)) != max(1, len(prompts)):
        raise UsageError(f"Name at least one of the roles' prompts, and each once; got {list(prompts)}.")
    for role in roles:
        if role.name == DEFAULT:
            raise UsageError(f"A role cannot be called {DEFAULT!r}: that is the default persona.")
        wrong = [p for p in prompts or () if not 0 <= p < len(role.prompts)]
        if wrong:
            raise UsageError(f"Role {role.name} has prompts 0 to {len(role.prompts) - 1}, not {wrong[0]}.")


def fit_budget(budget: int, questions: Sequence[Question], per_question: int, fixed: int = 0) -> list[Question]:
    """As many questions as ``budget`` rollouts pay for, categories in balance; roles are never cut.

    Args:
        per_question: rollouts that one question costs, over all roles and default prompts.
        fixed: rollouts that do not depend on the questions (the roles' own).

    Raises:
        UsageError: fewer than 5 questions would remain; says the least budget.
    """
    n = min((budget - fixed) // per_question, len(questions))
    if n < MIN_BLOCKS:
        raise UsageError(
            f"--budget {budget} pays for {max(0, n)} questions; at least {fixed + MIN_BLOCKS * per_question} rollouts "
            f"({MIN_BLOCKS} questions) are needed. Raise it or name fewer --roles."
        )
    return balanced(questions, n)


def balanced(questions: Sequence[Question], n: int) -> list[Question]:
    """The first ``n``, taken from the categories in turn, in their original order."""
    by_category: dict[str, list[int]] = {}
    for i, q in enumerate(questions):
        by_category.setdefault(q.category, []).append(i)
    queues = list(by_category.values())
    taken: list[int] = []
    turn = 0
    while len(taken) < n:
        taken += [queue[turn] for queue in queues if turn < len(queue)]
        turn += 1
    return [questions[i] for i in sorted(taken[:n])]


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Counts for the configuration file."""
    return {
        "rollouts": len(plan.rows),
        "personas": len(plan.personas),
        "blocks": plan.n_blocks,
        "shards": plan.n_shards,
        "digest": plan.digest(),
    }
