"""What personas a catalog folder lists, told from the names of folders and files alone."""

import difflib
from itertools import zip_longest
from pathlib import Path

from persona_axis.catalog.fields import check_keys, check_name, check_texts, grouped_files, read_tables
from persona_axis.errors import CatalogError, UsageError


class Index:
    """The files ``<folder>/<kind>s/<group>/<name>.toml`` of one kind ("role" or "trait").

    `groups` maps each group to its names in alphabetical order; `names` are the same in one row. Groups come in
    the order of the order file, those it does not list follow alphabetically.
    """

    kind: str
    groups: dict[str, tuple[str, ...]]
    names: tuple[str, ...]

    def __init__(self, folder: Path, kind: str, order_file: Path | None = None) -> None:
        """List. CatalogError if a name breaks the rules or is used twice, or the order file is broken or names
        what does not exist. A folder that is missing lists nothing."""
        self.kind = kind
        self._folder = folder / f"{kind}s"
        listed = _list(self._folder, kind)
        self._pick_order = _order(order_file, kind, listed)
        self.groups = {group: listed[group] for group in self._pick_order}
        self._group_of = {name: group for group, names in self.groups.items() for name in names}
        self.names = tuple(self._group_of)

    def __contains__(self, name: str) -> bool:
        return name in self._group_of

    def place(self, name: str) -> tuple[Path, str]:
        """The file and the group of a name. UsageError with close matches if it is unknown."""
        if name not in self._group_of:
            raise UsageError(self.unknown(name))
        group = self._group_of[name]
        return self._folder / group / f"{name}.toml", group

    def pick(self, number: int) -> list[str]:
        """That many names, one from each group in turn; a larger pick begins with every smaller one.

        UsageError if there are not that many."""
        check_range(number, len(self.names), f"{self.kind}s")
        rounds = zip_longest(*self._pick_order.values())
        return [name for turn in rounds for name in turn if name is not None][:number]

    def unknown(self, name: str) -> str:
        """What to tell a user who asked for a name that is not there."""
        wanted = name.lower().replace(" ", "_").replace("-", "_")
        close = difflib.get_close_matches(wanted, self.names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else self.examples()
        return f"there is no {self.kind} {name!r}; {hint}"

    def examples(self) -> str:
        """How many there are, and a few."""
        first = [names[0] for names in self._pick_order.values()]
        return f"the catalog has {len(self.names)}" + (f", such as {', '.join(first)}" if first else "")


def check_range(number: int, largest: int, what: str) -> None:
    """UsageError unless 1 <= number <= largest."""
    if not 1 <= number <= largest:
        raise UsageError(f"{number} {what} asked for; the catalog has 1 to {largest}")


def _list(folder: Path, kind: str) -> dict[str, tuple[str, ...]]:
    """Names by group, both in alphabetical order."""
    if stray := [path for path in sorted(folder.glob("*.toml")) if not path.name.startswith(".")]:
        raise CatalogError(f"{stray[0]}: a {kind} belongs in the folder of its group, {kind}s/<group>/<name>.toml")
    listed: dict[str, list[str]] = {}
    seen: dict[str, Path] = {}
    for path, group, name in grouped_files(folder):
        if name in seen:
            raise CatalogError(f"{path}: {kind} {name!r} is also in {seen[name]}; names are unique")
        seen[name] = path
        listed.setdefault(group, []).append(name)
    return {group: tuple(names) for group, names in listed.items()}


def _order(path: Path | None, kind: str, listed: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The listed names as the order file orders them; what it leaves out follows in the listed order."""
    order: dict[str, tuple[str, ...]] = {}
    if path is not None and path.exists():
        for where, item in read_tables(path, "group"):
            table = check_keys(where, item, ("name", f"{kind}s"))
            group = check_name(where, "name", table["name"])
            names = check_texts(where, f"{kind}s", table[f"{kind}s"])
            if group in order:
                raise CatalogError(f"{where}: 'name' {group!r} is used twice")
            if strangers := sorted(set(names) - set(listed.get(group, ()))):
                raise CatalogError(f"{where}: '{kind}s' names {strangers[0]!r}, which is not in {kind}s/{group}")
            order[group] = names
    for group, names in listed.items():
        ordered = order.get(group, ())
        order[group] = ordered + tuple(name for name in names if name not in set(ordered))
    return order
