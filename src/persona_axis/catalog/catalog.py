"""The catalog a run is made of: personas, questions, and the sets of studies; embedded, or a user's folder.

A folder holds ``roles/<group>/<name>.toml``, ``questions.toml`` and ``default_prompts.toml``; optionally
``traits/<group>/<name>.toml``, ``drift/users/<domain>/<user>.toml``, ``drift/scripts/<domain>/<topic>.toml``,
``probes.toml``, ``harm.toml``, ``exemplars/<set>/<class>.toml``, and ``order.toml`` (the order of the groups of
roles, and of roles in each, for picks by number). Listing reads folder names and ``order.toml`` only; a file is
parsed when what it holds is asked for.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple
from functools import cache, cached_property
from pathlib import Path

from persona_axis.catalog.fields import check_keys, check_texts, read_lines, read_toml, repeats, require_file
from persona_axis.catalog.index import Index, check_range
from persona_axis.catalog.parse import (
    load_questions_file,
    load_roles_file,
    parse_questions,
    parse_role,
    parse_trait,
    read_default_prompts,
)
from persona_axis.catalog.sets import read_exemplars, read_harm_categories, read_probes, read_scripts, read_users
from persona_axis.catalog.texts import Exemplars, HarmCategory, Question, Role, Script, Trait, User
from persona_axis.errors import CatalogError, UsageError

__all__ = [
    "Catalog",
    "Question",
    "Role",
    "Trait",
    "load_catalog",
    "load_questions_file",
    "load_roles_file",
    "read_default_prompts",
]

_ROLE_FILES = (".jsonl", ".json", ".toml")
_QUESTION_FILES = (".txt", ".jsonl")


class Catalog:
    """A catalog folder. Make one with `load_catalog`.

    `groups` maps each group to its role names in alphabetical order, groups in the order of ``order.toml``
    (those it does not list follow alphabetically); `role_names` are the same names in one row. `trait_groups`
    and `trait_names` are those of the traits, in alphabetical order.
    """

    folder: Path

    def __init__(self, folder: Path) -> None:
        """List the folder. CatalogError if it has neither roles nor traits, a name breaks the rules or is used
        twice, or ``order.toml`` is broken or names what does not exist."""
        self.folder = folder
        self._role_index = Index(folder, "role", folder / "order.toml")
        self._trait_index = Index(folder, "trait")
        if not self.role_names and not self.trait_names:
            raise CatalogError(f"{folder}: holds no role; roles are files roles/<group>/<name>.toml")
        self._roles: dict[str, Role] = {}
        self._traits: dict[str, Trait] = {}

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        return self._role_index.groups

    @property
    def role_names(self) -> tuple[str, ...]:
        return self._role_index.names

    @property
    def trait_groups(self) -> dict[str, tuple[str, ...]]:
        return self._trait_index.groups

    @property
    def trait_names(self) -> tuple[str, ...]:
        return self._trait_index.names

    def personas(self) -> Iterator[Role | Trait]:
        """Every role, then every trait. CatalogError if a file is broken."""
        yield from map(self.role, self.role_names)
        yield from map(self.trait, self.trait_names)

    def role(self, name: str) -> Role:
        """One role. UsageError with close matches if unknown, CatalogError if its file is broken."""
        if name not in self._roles:
            path, group = self._role_index.place(name)
            self._roles[name] = parse_role(str(path), read_toml(path), name, group)
        return self._roles[name]

    def trait(self, name: str) -> Trait:
        """One trait. UsageError with close matches if unknown, CatalogError if its file is broken."""
        if name not in self._traits:
            path, group = self._trait_index.place(name)
            self._traits[name] = parse_trait(str(path), read_toml(path), name, group)
        return self._traits[name]

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

    @cached_property
    def users(self) -> tuple[User, ...]:
        """Drift users by domain and name. CatalogError if a file is broken."""
        return read_users(self.folder)

    @cached_property
    def scripts(self) -> tuple[Script, ...]:
        """Drift scripts by domain and topic. CatalogError if a file is broken."""
        return read_scripts(self.folder, self.users)

    @cached_property
    def probes(self) -> tuple[Question, ...]:
        """Introspective questions in file order. CatalogError if the file is broken."""
        return read_probes(self.folder)

    @cached_property
    def harm_categories(self) -> tuple[HarmCategory, ...]:
        """Kinds of harm with refusal probes, in file order. CatalogError if the file is broken."""
        return read_harm_categories(self.folder)

    @cached_property
    def exemplars(self) -> tuple[Exemplars, ...]:
        """Example replies by set and class. CatalogError if a file is broken."""
        return read_exemplars(self.folder)

    def content_hash(self) -> str:
        """SHA-256 over every text as it is used: personas by name, everything else in its order.

        Layout of the files (comments, quoting, line ends, order of keys) and ``order.toml`` do not count.
        Reads every file, once: CatalogError if one is broken.
        """
        return self._content_hash

    @cached_property
    def _content_hash(self) -> str:
        content = {
            "roles": [astuple(self.role(name)) for name in sorted(self.role_names)],
            "traits": [astuple(self.trait(name)) for name in sorted(self.trait_names)],
            "questions": [astuple(question) for question in self.questions],
            "default_prompts": self.default_prompts,
            "users": [astuple(user) for user in self.users],
            "scripts": [astuple(script) for script in self.scripts],
            "probes": [astuple(probe) for probe in self.probes],
            "harm": [astuple(category) for category in self.harm_categories],
            "exemplars": [astuple(exemplars) for exemplars in self.exemplars],
        }
        # What is absent leaves no trace: a catalog of roles alone keeps its hash when new sets are introduced.
        present = {key: value for key, value in content.items() if value}
        return hashlib.sha256(json.dumps(present, sort_keys=True).encode()).hexdigest()

    def select_roles(self, spec: str | int | None = None) -> list[Role]:
        """The roles of a user's ``--roles``, in the order asked for.

        None: all. A number (or digits): that many, one from each group in turn in the order of
        ``order.toml``; a larger pick begins with every smaller one. Otherwise comma-separated names;
        ``@file`` or an existing ``.txt`` file: names, one per line, '#' begins a comment; ``.toml``,
        ``.json``, ``.jsonl`` (with or without '@'): the user's own roles (`load_roles_file`).

        UsageError for an unknown or repeated role, a number out of range, an empty or missing file;
        CatalogError for a broken role file.
        """
        if spec is not None and (path := _as_path(spec)) and path.suffix in _ROLE_FILES:
            return load_roles_file(path)
        return [self.role(name) for name in _selected(spec, self._role_index)]

    def select_traits(self, spec: str | int | None = None) -> list[Trait]:
        """Traits by the same rules as `select_roles`, without files of the user's own."""
        return [self.trait(name) for name in _selected(spec, self._trait_index)]

    def select_questions(self, spec: str | int | None = None) -> list[Question]:
        """The questions of a user's ``--questions``. None or "all": all. A number (or digits): the first that
        many, balanced over the categories because the file is. A ``.txt`` or ``.jsonl`` path: the user's own
        (`load_questions_file`).

        UsageError for a number out of range, an empty or missing file, or anything else; CatalogError for a
        broken file.
        """
        if spec is None or spec == "all":
            return list(self.questions)
        if (number := _as_number(spec)) is not None:
            check_range(number, len(self.questions), "questions")
            return list(self.questions[:number])
        path = _as_path(spec)
        if path.suffix in _QUESTION_FILES:
            return load_questions_file(path)
        raise UsageError(
            f"questions: {str(spec)!r} is neither a number (1 to {len(self.questions)}) nor a .txt or .jsonl file"
        )


def load_catalog(folder: Path | str | None = None) -> Catalog:
    """The catalog in `folder`, or the embedded one. UsageError if there is no such folder, CatalogError if
    its listing is broken; the files inside are checked when they are used."""
    if folder is None:
        return _embedded()
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"{path}: no such catalog folder")
    return Catalog(path)


@cache
def _embedded() -> Catalog:
    """Opened once in a process: its files are part of the package and do not change."""
    return Catalog(Path(__file__).parent / "data")


def _selected(spec: str | int | None, index: Index) -> list[str]:
    """The names that a number, a row of names or a file of names asks for."""
    if not index.names:
        raise UsageError(f"the catalog holds no {index.kind} ({index.kind}s/<group>/<name>.toml)")
    if spec is None:
        return list(index.names)
    if (number := _as_number(spec)) is not None:
        return index.pick(number)
    path = _as_path(spec)
    if str(spec).strip().startswith("@") or path.suffix == ".txt":
        lines = read_lines(require_file(path))
        names, source = [line.partition("#")[0].strip() for line in lines], f"{path}: "
    else:
        names, source = [name.strip() for name in str(spec).split(",") if name.strip()], ""
    if not names:
        raise UsageError(f"{source}no {index.kind} is named; {index.examples()}")
    if unknown := [name for name in names if name not in index]:
        raise UsageError(source + "; ".join(index.unknown(name) for name in unknown))
    if repeated := repeats(names):
        raise UsageError(f"{source}{index.kind} {repeated[0]!r} is named twice")
    return names


def _as_number(spec: str | int) -> int | None:
    if isinstance(spec, bool):
        raise UsageError(f"expected a number or names, found {spec}")
    if isinstance(spec, int):
        return spec
    digits = spec.strip()
    return int(digits) if digits.removeprefix("-").isdecimal() else None


def _as_path(spec: str | int) -> Path:
    return Path(str(spec).strip().removeprefix("@"))
