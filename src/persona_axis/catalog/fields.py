"""Reading catalog files and checking their fields. Every complaint names the file and the field.

Catalog files are TOML; a user's own lists may also be JSON, JSONL or plain text. Unknown and missing keys,
wrong types, empty lists and repeated entries are refused, so that a misspelt key never drops a text silently.
"""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from persona_axis.errors import CatalogError, UsageError

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_RESERVED_NAMES = {"default"}  # the persona of the neutral prompts


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
        raise CatalogError(f"{where}: expected a table of keys, found {kind_of(value)}")
    required, allowed = set(required), {*required, *optional}
    if missing := sorted(required - value.keys()):
        raise CatalogError(f"{where}: missing key(s): {', '.join(missing)}")
    if unknown := sorted(value.keys() - allowed):
        raise CatalogError(f"{where}: unknown key(s): {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}")
    return value


def check_text(where: str, field: str, value: Any, *, may_be_empty: bool = False) -> str:
    """`value` as a text without surrounding whitespace. CatalogError if it is not one, or is empty."""
    if not isinstance(value, str):
        raise CatalogError(f"{where}: '{field}' must be a text, found {kind_of(value)}")
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
        raise CatalogError(f"{where}: '{field}' must be a list of texts, found {kind_of(value)}")
    if not value:
        raise CatalogError(f"{where}: '{field}' is an empty list")
    texts = tuple(check_text(where, f"{field}[{i}]", item, may_be_empty=may_be_empty) for i, item in enumerate(value))
    if repeated := repeats(texts):
        raise CatalogError(f"{where}: '{field}' holds this text twice: {repeated[0]!r}")
    return texts


def check_tables(where: str, field: str, value: Any) -> list[tuple[str, Any]]:
    """`value` as a list of tables, at least one: ("file, field n", table). CatalogError otherwise."""
    if not isinstance(value, list) or not value:
        raise CatalogError(f"{where}: '{field}' must be one or more [[{field}]] tables")
    return [(f"{where}, {field} {number}", item) for number, item in enumerate(value, start=1)]


def read_tables(path: Path, field: str) -> list[tuple[str, Any]]:
    """The ``[[field]]`` tables that a TOML file consists of, each with where it stands. CatalogError otherwise."""
    return check_tables(str(path), field, check_keys(str(path), read_toml(path), (field,))[field])


def grouped_files(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """``<folder>/<group>/<name>.toml`` as (path, group, name), sorted. CatalogError if a name breaks the rules."""
    for path in sorted(folder.glob("*/*.toml")):
        if path.name.startswith("."):  # what editors and macOS leave behind
            continue
        name = check_name(str(path), "file name", path.stem)
        yield path, check_name(str(path.parent), "folder name", path.parent.name), name


def check_different(where: str, field: str, values: Iterable[str]) -> None:
    """CatalogError if a value occurs twice."""
    if repeated := repeats(list(values)):
        raise CatalogError(f"{where}: '{field}' {repeated[0]!r} is used twice")


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


def require_file(path: Path | str) -> Path:
    """`path` as a Path. UsageError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    return path


def json_items(path: Path) -> list[tuple[str, Any]]:
    """The items of a JSON list as ("file, item n", value). CatalogError if it is not one."""
    value = read_json(path)
    if not isinstance(value, list):
        raise CatalogError(f"{path}: expected a list, found {kind_of(value)}")
    return [(f"{path}, item {number}", item) for number, item in enumerate(value, start=1)]


def kind_of(value: Any) -> str:
    """What `value` is, in words for an error."""
    kinds = {dict: "a table", list: "a list", str: "a text", type(None): "null", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), "a date or time")  # all that TOML has left
