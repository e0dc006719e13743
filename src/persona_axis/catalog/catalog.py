"""The roles, questions and default prompts a run is made of; embedded, or a folder of the user's.

A catalog folder holds ``roles/<group>/<name>.toml``, ``questions.toml``, ``default_prompts.toml`` and,
optionally, ``order.toml`` (the order of the groups, and of the roles in each, for picks by number).
Listing reads folder names and ``order.toml`` only; a role's file is parsed when the role is asked for.
"""

import difflib
import hashlib
import json
from dataclasses import astuple
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from persona_axis.catalog.parse import (
    Question,
    Role,
    check_keys,
    check_name,
    check_texts,
    load_questions_file,
    load_roles_file,
    parse_questions,
    parse_role,
    read_default_prompts,
    read_lines,
    read_toml,
    repeats,
    require_file,
)
from persona_axis.errors import CatalogError, UsageError

__all__ = [
    "Catalog",
    "Question",
    "Role",
    "load_catalog",
    "load_questions_file",
    "load_roles_file",
    "read_default_prompts",
]

_EMBEDDED = Path(__file__).parent / "data"
_ROLE_FILES = (".jsonl", ".json", ".toml")
_QUESTION_FILES = (".txt", ".jsonl")


class Catalog:
    """A catalog folder. Make one with `load_catalog`.

    `groups` maps each group to its role names in alphabetical order, groups in the order of ``order.toml``
    (those it does not list follow alphabetically); `role_names` are the same names in one row.
    """

    folder: Path
    groups: dict[str, tuple[str, ...]]
    role_names: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        """List the folder. CatalogError if it has no roles, a name breaks the rules or is used twice, or
        ``order.toml`` is broken or names what does not exist."""
        self.folder = folder
        listed = _list_roles(folder / "roles")
        self._pick_order = _order_roles(folder / "order.toml", listed)
        self.groups = {group: listed[group] for group in self._pick_order}
        self._group_of = {name: group for group, names in self.groups.items() for name in names}
        self.role_names = tuple(self._group_of)
        self._roles: dict[str, Role] = {}

    def role(self, name: str) -> Role:
        """One role. UsageError with close matches if unknown, CatalogError if its file is broken."""
        if name not in self._group_of:
            raise UsageError(self._unknown_role(name))
        if name not in self._roles:
            group = self._group_of[name]
            path = self.folder / "roles" / group / f"{name}.toml"
            self._roles[name] = parse_role(str(path), read_toml(path), name, group)
        return self._roles[name]

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The shared questions in file order. CatalogError if their file is missing or broken."""
        return parse_questions(self.folder / "questions.toml")

    @cached_property
    def default_prompts(self) -> tuple[str, ...]:
        """System prompts of the default Assistant. CatalogError if their file is missing or broken."""
        path = self.folder / "default_prompts.toml"
        prompts = check_keys(str(path), read_toml(path), ("prompts",))["prompts"]
        return check_texts(str(path), "prompts", prompts, may_be_empty=True)

    def content_hash(self) -> str:
        """SHA-256 over every text as it is used: roles by name, questions and prompts in their order.

        Layout of the files (comments, quoting, line ends, order of keys) and ``order.toml`` do not count.
        Reads every file: CatalogError if one is broken.
        """
        content = {
            "roles": [astuple(self.role(name)) for name in sorted(self.role_names)],
            "questions": [astuple(question) for question in self.questions],
            "default_prompts": self.default_prompts,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def select_roles(self, spec: str | int | None = None) -> list[Role]:
        """The roles of a user's ``--roles``, in the order asked for.

        None: all. A number (or digits): that many, one from each group in turn in the order of
        ``order.toml``; a larger pick begins with every smaller one. Otherwise comma-separated names;
        ``@file`` or an existing ``.txt`` file: names, one per line, '#' begins a comment; ``.toml``,
        ``.json``, ``.jsonl`` (with or without '@'): the user's own roles (`load_roles_file`).

        UsageError for an unknown or repeated role, a number out of range, an empty or missing file;
        CatalogError for a broken role file.
        """
        if spec is None:
            return [self.role(name) for name in self.role_names]
        if (number := _as_number(spec)) is not None:
            return [self.role(name) for name in self._pick(number)]
        spec = str(spec).strip()
        path = Path(spec.removeprefix("@"))
        if path.suffix in _ROLE_FILES:
            return load_roles_file(path)
        if spec.startswith("@") or path.suffix == ".txt":
            lines = read_lines(require_file(path))
            names, source = [line.partition("#")[0].strip() for line in lines], f"{path}: "
        else:
            names, source = [name.strip() for name in spec.split(",") if name.strip()], ""
        if not names:
            raise UsageError(f"{source}no role is named; {self._examples()}")
        if unknown := [name for name in names if name not in self._group_of]:
            raise UsageError(source + "; ".join(self._unknown_role(name) for name in unknown))
        if repeated := repeats(names):
            raise UsageError(f"{source}role {repeated[0]!r} is named twice")
        return [self.role(name) for name in names]

    def select_questions(self, spec: str | int | None = None) -> list[Question]:
        """The questions of a user's ``--questions``. None: all. A number (or digits): the first that many,
        balanced over the categories because the file is. A ``.txt`` or ``.jsonl`` path: the user's own
        (`load_questions_file`).

        UsageError for a number out of range, an empty or missing file, or anything else; CatalogError for a
        broken file.
        """
        if spec is None:
            return list(self.questions)
        if (number := _as_number(spec)) is not None:
            _check_range(number, len(self.questions), "questions")
            return list(self.questions[:number])
        path = Path(str(spec).strip().removeprefix("@"))
        if path.suffix in _QUESTION_FILES:
            return load_questions_file(path)
        raise UsageError(
            f"questions: {str(spec)!r} is neither a number (1 to {len(self.questions)}) nor a .txt or .jsonl file"
        )

    def _pick(self, number: int) -> list[str]:
        _check_range(number, len(self.role_names), "roles")
        rounds = zip_longest(*self._pick_order.values())
        return [name for turn in rounds for name in turn if name is not None][:number]

    def _unknown_role(self, name: str) -> str:
        wanted = name.lower().replace(" ", "_").replace("-", "_")
        close = difflib.get_close_matches(wanted, self.role_names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else self._examples()
        return f"there is no role {name!r}; {hint}"

    def _examples(self) -> str:
        first = [names[0] for names in self._pick_order.values()]
        return f"the catalog has {len(self.role_names)}, such as {', '.join(first)}"


def load_catalog(folder: Path | str | None = None) -> Catalog:
    """The catalog in `folder`, or the embedded one. UsageError if there is no such folder, CatalogError if
    its listing is broken; the files inside are checked when they are used."""
    path = _EMBEDDED if folder is None else Path(folder)
    if not path.is_dir():
        raise UsageError(f"{path}: no such catalog folder")
    return Catalog(path)


def _list_roles(folder: Path) -> dict[str, tuple[str, ...]]:
    """Role names by group, both in alphabetical order, from the names of folders and files alone."""
    if not folder.is_dir():
        raise CatalogError(f"{folder}: no such folder; roles are files roles/<group>/<name>.toml")
    if stray := [path for path in sorted(folder.glob("*.toml")) if not path.name.startswith(".")]:
        raise CatalogError(f"{stray[0]}: a role belongs in the folder of its group, roles/<group>/<name>.toml")
    listed: dict[str, tuple[str, ...]] = {}
    seen: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*.toml")):
        if path.name.startswith("."):  # what editors and macOS leave behind
            continue
        name = check_name(str(path), "file name", path.stem)
        group = check_name(str(path.parent), "folder name", path.parent.name)
        if name in seen:
            raise CatalogError(f"{path}: role {name!r} is also in {seen[name]}; names are unique")
        seen[name] = path
        listed[group] = (*listed.get(group, ()), name)
    if not listed:
        raise CatalogError(f"{folder}: holds no role (roles/<group>/<name>.toml)")
    return listed


def _order_roles(path: Path, listed: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The listed roles as ``order.toml`` orders them; what it leaves out follows in the listed order."""
    order: dict[str, tuple[str, ...]] = {}
    if path.exists():
        tables = check_keys(str(path), read_toml(path), ("group",))["group"]
        if not isinstance(tables, list) or not tables:
            raise CatalogError(f"{path}: 'group' must be one or more [[group]] tables")
        for number, item in enumerate(tables, start=1):
            where = f"{path}, group {number}"
            table = check_keys(where, item, ("name", "roles"))
            group = check_name(where, "name", table["name"])
            names = check_texts(where, "roles", table["roles"])
            if group in order:
                raise CatalogError(f"{where}: 'name' {group!r} is used twice")
            if strangers := sorted(set(names) - set(listed.get(group, ()))):
                raise CatalogError(f"{where}: 'roles' names {strangers[0]!r}, which is not in roles/{group}")
            order[group] = names
    for group, names in listed.items():
        ordered = order.get(group, ())
        order[group] = ordered + tuple(name for name in names if name not in ordered)
    return order


def _as_number(spec: str | int) -> int | None:
    if isinstance(spec, bool):
        raise UsageError(f"expected a number or names, found {spec}")
    if isinstance(spec, int):
        return spec
    digits = spec.strip()
    return int(digits) if digits.removeprefix("-").isdecimal() else None


def _check_range(number: int, largest: int, what: str) -> None:
    if not 1 <= number <= largest:
        raise UsageError(f"{number} {what} asked for; the catalog has 1 to {largest}")
