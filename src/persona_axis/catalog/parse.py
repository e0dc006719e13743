"""From a catalog file to checked values. Every complaint names the file and the field.

Catalog files are TOML; a user's own lists may also be JSON, JSONL or plain text. Unknown and missing keys,
wrong types, empty lists and repeated entries are refused, so that a misspelt key never drops a text silently.
"""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_axis.errors import CatalogError, UsageError

OWN_GROUP = "own"
OWN_CATEGORY = "own"
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_RESERVED_NAMES = {"default"}  # the persona of the neutral prompts
_ROLE_KEYS = ("description", "prompts", "questions", "rubric")
_PROMPT_SUFFIXES = ".txt (one prompt: the whole file), .jsonl, .json, .toml"


@dataclass(frozen=True, slots=True)
class Role:
    """A character: system prompts that ask for it, questions of its own, and how a judge scores it."""

    name: str
    group: str
    description: str
    prompts: tuple[str, ...]
    questions: tuple[str, ...]
    rubric: str


@dataclass(frozen=True, slots=True)
class Question:
    """A user message put to every persona."""

    id: str
    category: str
    text: str


def read_text(path: Path) -> str:
    """Read a UTF-8 file (a byte order mark is dropped). CatalogError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: cannot be read ({error})") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. CatalogError with file and line if it is broken."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"{path}: not valid TOML: {error}") from error


def read_json(path: Path) -> Any:
    """Parse a JSON file. CatalogError with file and line if it is broken."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CatalogError(f"{path}: not valid JSON: {error}") from error


def read_jsonl(path: Path) -> list[tuple[str, Any]]:
    """Parse a JSONL file into ("file, line n", value); blank lines are skipped. CatalogError if broken."""
    values = []
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values.append((where, json.loads(line)))
        except json.JSONDecodeError as error:
            raise CatalogError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error
    return values


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without blank ones and without comments (lines that begin with '#')."""
    lines = (line.strip() for line in read_text(path).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def check_keys(where: str, value: Any, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """`value` as a table with every required key and no unknown one. CatalogError otherwise."""
    if not isinstance(value, dict):
        raise CatalogError(f"{where}: expected a table of keys, found {_kind(value)}")
    required, allowed = set(required), {*required, *optional}
    if missing := sorted(required - value.keys()):
        raise CatalogError(f"{where}: missing key(s): {', '.join(missing)}")
    if unknown := sorted(value.keys() - allowed):
        raise CatalogError(f"{where}: unknown key(s): {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}")
    return value


def check_text(where: str, field: str, value: Any, *, may_be_empty: bool = False) -> str:
    """`value` as a text without surrounding whitespace. CatalogError if it is not one, or is empty."""
    if not isinstance(value, str):
        raise CatalogError(f"{where}: '{field}' must be a text, found {_kind(value)}")
    text = value.strip()
    if not text and not (may_be_empty and value == ""):
        raise CatalogError(f"{where}: '{field}' is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" in a JSON file; a tokenizer would fail much later
        raise CatalogError(f"{where}: '{field}' holds half a character (lone surrogate)") from error
    return text


def check_texts(where: str, field: str, value: Any, *, may_be_empty: bool = False) -> tuple[str, ...]:
    """`value` as a list of different texts, at least one. `may_be_empty` allows the text ""."""
    if not isinstance(value, list):
        raise CatalogError(f"{where}: '{field}' must be a list of texts, found {_kind(value)}")
    if not value:
        raise CatalogError(f"{where}: '{field}' is an empty list")
    texts = tuple(check_text(where, f"{field}[{i}]", item, may_be_empty=may_be_empty) for i, item in enumerate(value))
    if repeated := repeats(texts):
        raise CatalogError(f"{where}: '{field}' holds this text twice: {repeated[0]!r}")
    return texts


def check_name(where: str, field: str, value: Any) -> str:
    """`value` as a name of a role, group or question: lower case, begins with a letter, not reserved."""
    name = check_text(where, field, value)
    if not _NAME.fullmatch(name):
        raise CatalogError(
            f"{where}: '{field}' is {name!r}; use lower-case letters, digits, '_' and '-', a letter first"
        )
    if name in _RESERVED_NAMES:
        raise CatalogError(f"{where}: '{field}' is {name!r}, which is reserved for the default persona")
    return name


def repeats(items: Sequence[str]) -> list[str]:
    """The items that occur more than once, in order of first occurrence."""
    return [item for item, count in Counter(items).items() if count > 1]


def parse_role(where: str, value: Any, name: str, group: str) -> Role:
    """A role from the table of its file. CatalogError naming `where` and the field."""
    table = check_keys(where, value, _ROLE_KEYS)
    return Role(
        name=name,
        group=group,
        description=check_text(where, "description", table["description"]),
        prompts=check_texts(where, "prompts", table["prompts"]),
        questions=check_texts(where, "questions", table["questions"]),
        rubric=check_text(where, "rubric", table["rubric"]),
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
        items = _json_items(path)
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
    if repeated := repeats([role.name for role in roles]):
        raise CatalogError(f"{path}: 'name' {repeated[0]!r} is used twice")
    return roles


def parse_questions(path: Path) -> tuple[Question, ...]:
    """The shared questions of a catalog: ``[[question]]`` tables with id, category and text."""
    tables = check_keys(str(path), read_toml(path), ("question",))["question"]
    if not isinstance(tables, list) or not tables:
        raise CatalogError(f"{path}: 'question' must be one or more [[question]] tables")
    questions = []
    for number, item in enumerate(tables, start=1):
        where = f"{path}, question {number}"
        table = check_keys(where, item, ("id", "category", "text"))
        questions.append(
            Question(
                id=check_name(where, "id", table["id"]),
                category=check_name(where, "category", table["category"]),
                text=check_text(where, "text", table["text"]),
            )
        )
    _check_different(path, questions)
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


def require_file(path: Path | str) -> Path:
    """`path` as a Path. UsageError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    return path


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


def _json_items(path: Path) -> list[tuple[str, Any]]:
    value = read_json(path)
    if not isinstance(value, list):
        raise CatalogError(f"{path}: expected a list, found {_kind(value)}")
    return [(f"{path}, item {number}", item) for number, item in enumerate(value, start=1)]


def _kind(value: Any) -> str:
    kinds = {dict: "a table", list: "a list", str: "a text", type(None): "null", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), "a date or time")  # all that TOML has left
