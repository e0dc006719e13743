"""From a file to roles, traits, questions and default prompts: the catalog's own files and those of a user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_axis.catalog.fields import (
    check_different,
    check_keys,
    check_name,
    check_tables,
    check_text,
    check_texts,
    json_items,
    read_json,
    read_jsonl,
    read_lines,
    read_tables,
    read_text,
    read_toml,
    repeats,
    require_file,
)
from persona_axis.catalog.texts import PromptPair, Question, Role, Trait, judge_prompt
from persona_axis.errors import CatalogError, UsageError

OWN_GROUP = "own"
OWN_CATEGORY = "own"
_ROLE_KEYS = ("description", "prompts", "questions", "rubric")
_TRAIT_KEYS = ("description", "opposite", "questions", "evaluation", "pair")
_PROMPT_SUFFIXES = ".txt (one prompt: the whole file), .jsonl, .json, .toml"


def parse_role(where: str, value: Any, name: str, group: str) -> Role:
    """A role from the table of its file. CatalogError naming `where` and the field."""
    table = check_keys(where, value, _ROLE_KEYS)
    return Role(
        name=name,
        group=group,
        description=check_text(where, "description", table["description"]),
        prompts=check_texts(where, "prompts", table["prompts"]),
        questions=check_texts(where, "questions", table["questions"]),
        rubric=_check_criteria(where, "rubric", table["rubric"]),
    )


def load_roles_file(path: Path | str) -> list[Role]:
    """A user's own roles. ``name.toml`` = one role in the catalog's format; ``.json`` = a list of roles and
    ``.jsonl`` = one per line, each with the same keys plus ``name`` and optionally ``group`` ("own").

    UsageError if there is no such file, its suffix is none of these, or it holds no role; CatalogError if
    its content breaks the format or names a role twice.
    """
    path = require_file(path)
    if path.suffix == ".toml":
        return [parse_role(str(path), read_toml(path), check_name(str(path), "file name", path.stem), OWN_GROUP)]
    if path.suffix == ".jsonl":
        items = read_jsonl(path)
    elif path.suffix == ".json":
        items = json_items(path)
    else:
        raise UsageError(f"{path}: roles are read from .toml, .json or .jsonl, not from '{path.suffix}'")
    roles = []
    for where, item in items:
        table = dict(check_keys(where, item, ("name", *_ROLE_KEYS), ("group",)))
        name = check_name(where, "name", table.pop("name"))
        group = check_name(where, "group", table.pop("group", OWN_GROUP))
        roles.append(parse_role(where, table, name, group))
    if not roles:
        raise UsageError(f"{path}: holds no role")
    check_different(str(path), "name", [role.name for role in roles])
    return roles


def parse_trait(where: str, value: Any, name: str, group: str) -> Trait:
    """A trait from the table of its file. CatalogError naming `where` and the field."""
    table = check_keys(where, value, _TRAIT_KEYS)
    pairs = []
    for place, item in check_tables(where, "pair", table["pair"]):
        pair = check_keys(place, item, ("positive", "negative"))
        pairs.append(PromptPair(*(check_text(place, pole, pair[pole]) for pole in ("positive", "negative"))))
    for pole in ("positive", "negative"):
        check_different(where, pole, [getattr(pair, pole) for pair in pairs])
    return Trait(
        name=name,
        group=group,
        description=check_text(where, "description", table["description"]),
        opposite=check_name(where, "opposite", table["opposite"]),
        pairs=tuple(pairs),
        questions=check_texts(where, "questions", table["questions"]),
        evaluation=_check_criteria(where, "evaluation", table["evaluation"]),
    )


def _check_criteria(where: str, field: str, value: Any) -> str:
    """A rubric or evaluation text; one that is a whole judge prompt (`judge_prompt`) must format."""
    text = check_text(where, field, value)
    try:
        judge_prompt(text, "", "")
    except (KeyError, IndexError, ValueError) as error:
        raise CatalogError(
            f"{where}: '{field}' is a whole judge prompt ({{answer}} stands in it), but its braces do not format: "
            f"{error!r}. Only {{question}} and {{answer}} are filled in; write other braces twice"
        ) from error
    return text


def parse_questions(path: Path, field: str = "question") -> tuple[Question, ...]:
    """Questions from ``[[question]]`` (or ``[[probe]]``) tables with id, category and text.

    Ids differ. A text may occur twice, as in the reference's questions; `validate` complains about it.
    """
    questions = []
    for where, item in read_tables(path, field):
        table = check_keys(where, item, ("id", "category", "text"))
        questions.append(
            Question(
                id=check_name(where, "id", table["id"]),
                category=check_name(where, "category", table["category"]),
                text=check_text(where, "text", table["text"]),
            )
        )
    check_different(str(path), "id", [question.id for question in questions])
    return tuple(questions)


def load_questions_file(path: Path | str) -> list[Question]:
    """A user's own questions. ``.txt`` = one per line ('#' begins a comment line), category "own";
    ``.jsonl`` = one object per line with ``question`` or ``text``, optionally ``id`` and ``category``.
    Without an id, the n-th question is called ``own_00n``.

    UsageError if there is no such file, its suffix is neither, or it holds no question; CatalogError if its
    content breaks the format or holds an id or a question twice.
    """
    path = require_file(path)
    if path.suffix == ".txt":
        texts = read_lines(path)
        questions = [Question(_own_id(i), OWN_CATEGORY, text) for i, text in enumerate(texts, start=1)]
    elif path.suffix == ".jsonl":
        questions = [_own_question(i, *item) for i, item in enumerate(read_jsonl(path), start=1)]
    else:
        raise UsageError(f"{path}: questions are read from .txt or .jsonl, not from '{path.suffix}'")
    if not questions:
        raise UsageError(f"{path}: holds no question")
    _check_different(path, questions)
    return questions


def read_default_prompts(path: Path | str) -> tuple[str, ...]:
    """System prompts of the default Assistant, for example those of the user's own product.

    ``.txt`` = ONE prompt, the whole file; ``.jsonl`` = one per line, ``{"prompt": ...}`` or a JSON string;
    ``.json`` = a list of texts; ``.toml`` = ``prompts = [...]``. The prompt "" means no system message;
    white space around a prompt is dropped.

    UsageError if there is no such file, its suffix is none of these, or it holds no prompt; CatalogError if
    its content breaks the format or holds a prompt twice.
    """
    path = require_file(path)
    where = str(path)
    if path.suffix == ".txt":
        text = read_text(path).strip()
        prompts: Any = [text] if text else []
    elif path.suffix == ".jsonl":
        prompts = [
            item if isinstance(item, str) else check_keys(line, item, ("prompt",))["prompt"]
            for line, item in read_jsonl(path)
        ]
    elif path.suffix == ".json":
        prompts = read_json(path)
    elif path.suffix == ".toml":
        prompts = check_keys(where, read_toml(path), ("prompts",))["prompts"]
    else:
        raise UsageError(f"{path}: prompts are read from {_PROMPT_SUFFIXES}, not from '{path.suffix}'")
    if prompts == []:
        raise UsageError(f"{path}: holds no prompt")
    return check_texts(where, "prompts", prompts, may_be_empty=True)


def _own_question(number: int, where: str, value: Any) -> Question:
    table = check_keys(where, value, (), ("question", "text", "id", "category"))
    fields = [field for field in ("question", "text") if field in table]
    if len(fields) != 1:
        raise CatalogError(f"{where}: needs exactly one of 'question' and 'text'")
    return Question(
        id=check_text(where, "id", table.get("id", _own_id(number))),
        category=check_text(where, "category", table.get("category", OWN_CATEGORY)),
        text=check_text(where, fields[0], table[fields[0]]),
    )


def _own_id(number: int) -> str:
    return f"own_{number:03d}"


def _check_different(path: Path, questions: Sequence[Question]) -> None:
    for field, values in (("id", [q.id for q in questions]), ("text", [q.text for q in questions])):
        if repeated := repeats(values):
            raise CatalogError(f"{path}: two questions have the {field} {repeated[0]!r}")
