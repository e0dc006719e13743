"""A catalog's entries for reading: names by group, and all texts of one entry."""

import difflib
from collections.abc import Callable, Iterable, Iterator

from persona_axis.catalog.catalog import Catalog
from persona_axis.catalog.texts import Question, Role, Script, Trait, User
from persona_axis.errors import UsageError

Groups = dict[str, tuple[str, ...]]

_LISTINGS: dict[str, Callable[[Catalog], Groups]] = {
    "roles": lambda catalog: catalog.groups,
    "traits": lambda catalog: {
        group: tuple(f"{name}/{catalog.trait(name).opposite}" for name in names)
        for group, names in catalog.trait_groups.items()
    },
    "questions": lambda catalog: _grouped((q.category, q.id) for q in catalog.questions),
    "users": lambda catalog: _grouped((user.domain, user.name) for user in catalog.users),
    "scripts": lambda catalog: _grouped((script.domain, script.topic) for script in catalog.scripts),
    "probes": lambda catalog: _grouped((probe.category, probe.id) for probe in catalog.probes),
    "harm": lambda catalog: {"harm": tuple(category.name for category in catalog.harm_categories)},
    "exemplars": lambda catalog: _grouped((exemplars.set, exemplars.name) for exemplars in catalog.exemplars),
}


def listing(catalog: Catalog, what: str) -> Groups:
    """The names of one kind by group. UsageError for an unknown kind, CatalogError for a broken file."""
    if what not in _LISTINGS:
        raise UsageError(f"there is no listing of {what!r}; there are {', '.join(_LISTINGS)}")
    return _LISTINGS[what](catalog)


def entry(catalog: Catalog, name: str) -> str:
    """Every text of the entry with this name: a role, else a trait (by either pole), else any other kind.

    UsageError with close matches if there is none.
    """
    if found := next(_entries(catalog, name), None):
        return found
    names = {name for what in _LISTINGS for row in listing(catalog, what).values() for name in row}
    poles = {pole for name in names for pole in name.split("/")}
    close = difflib.get_close_matches(name.lower().replace(" ", "_"), sorted(poles), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"persona-axis catalog list ({', '.join(_LISTINGS)})"
    raise UsageError(f"the catalog has nothing called {name!r}; {hint}")


def _entries(catalog: Catalog, name: str) -> Iterator[str]:
    if name in catalog.role_names:
        yield _role(catalog.role(name))
    yield from (
        _trait(trait) for trait in map(catalog.trait, catalog.trait_names) if name in (trait.name, trait.opposite)
    )
    yield from (_user(user) for user in catalog.users if user.name == name)
    yield from (_script(script) for script in catalog.scripts if script.topic == name)
    yield from (_question("question", q) for q in catalog.questions if q.id == name)
    yield from (_question("probe", probe) for probe in catalog.probes if probe.id == name)
    for category in catalog.harm_categories:
        if category.name == name:
            yield _block(f"harm category {name}: {category.definition}", map(_dash, category.probes))
    for exemplars in catalog.exemplars:
        if name in (exemplars.name, f"{exemplars.set}/{exemplars.name}"):
            yield _block(
                f"exemplars {exemplars.set}/{exemplars.name}: {exemplars.description}", map(_dash, exemplars.replies)
            )


def _role(role: Role) -> str:
    prompts = "\n\n".join(f"prompt {number}: {prompt}" for number, prompt in enumerate(role.prompts))
    questions = "\n".join(map(_dash, role.questions))
    return f"{role.name} ({role.group}): {role.description}\n\n{prompts}\n\n{questions}\n\n{role.rubric}"


def _trait(trait: Trait) -> str:
    pairs = "\n\n".join(
        f"pair {number}, {trait.name}: {pair.positive}\npair {number}, {trait.opposite}: {pair.negative}"
        for number, pair in enumerate(trait.pairs)
    )
    questions = "\n".join(map(_dash, trait.questions))
    title = f"{trait.name}/{trait.opposite} ({trait.group}): {trait.description}"
    return f"{title}\n\n{pairs}\n\n{questions}\n\n{trait.evaluation}"


def _user(user: User) -> str:
    topics = (f"\n{topic.id}: {topic.text}\n  > {topic.opening}" for topic in user.topics)
    return _block(f"{user.name} ({user.domain}): {user.persona}", topics)


def _script(script: Script) -> str:
    messages = (f"{number}. {message}" for number, message in enumerate(script.messages, start=1))
    return _block(f"script {script.topic} ({script.domain}, user {script.user})", messages)


def _question(kind: str, question: Question) -> str:
    return f"{kind} {question.id} ({question.category}): {question.text}"


def _block(title: str, lines: Iterable[str]) -> str:
    return "\n".join((title, *lines))


def _dash(text: str) -> str:
    return f"- {text}"


def _grouped(pairs: Iterable[tuple[str, str]]) -> Groups:
    groups: Groups = {}
    for group, name in pairs:
        groups[group] = (*groups.get(group, ()), name)
    return groups
