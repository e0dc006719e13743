"""Every text of a catalog in one row, with where it stands: what validation and statistics go through."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from persona_axis.catalog.catalog import Catalog
from persona_axis.catalog.texts import Role, Trait


@dataclass(frozen=True, slots=True)
class Text:
    """One text. `kind` says what it is for ("prompt", "question", "criteria", ...), `owner` whose it is
    ("role pirate"), `field` which one ("prompts[2]")."""

    kind: str
    owner: str
    field: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.owner}: {self.field}"


def walk(catalog: Catalog) -> list[Text]:
    """All texts. CatalogError if a file is broken."""
    return [
        *(text for persona in catalog.personas() for text in persona_texts(persona)),
        *_row("default_prompt", "default persona", "prompts", catalog.default_prompts),
        *(Text("shared_question", "shared questions", question.id, question.text) for question in catalog.questions),
        *(Text("probe", "probes", probe.id, probe.text) for probe in catalog.probes),
        *_drift_texts(catalog),
        *_evaluation_texts(catalog),
    ]


def persona_texts(persona: Role | Trait) -> Iterator[Text]:
    """The texts of one role or trait."""
    return _role_texts(persona) if isinstance(persona, Role) else _trait_texts(persona)


def _role_texts(role: Role) -> Iterator[Text]:
    owner = f"role {role.name}"
    yield Text("description", owner, "description", role.description)
    yield from _row("prompt", owner, "prompts", role.prompts)
    yield from _row("question", owner, "questions", role.questions)
    yield Text("criteria", owner, "rubric", role.rubric)


def _trait_texts(trait: Trait) -> Iterator[Text]:
    owner = f"trait {trait.name}"  # both poles' prompts are its prompts
    yield Text("description", owner, "description", trait.description)
    yield from _row("prompt", owner, "positive", (pair.positive for pair in trait.pairs))
    yield from _row("prompt", owner, "negative", (pair.negative for pair in trait.pairs))
    yield from _row("question", owner, "questions", trait.questions)
    yield Text("criteria", owner, "evaluation", trait.evaluation)


def _drift_texts(catalog: Catalog) -> Iterator[Text]:
    for user in catalog.users:
        owner = f"user {user.name}"
        yield Text("persona", owner, "persona", user.persona)
        for topic in user.topics:
            yield Text("topic", owner, f"topic {topic.id}", topic.text)
            yield Text("opening", owner, f"opening of {topic.id}", topic.opening)
    for script in catalog.scripts:
        owner = f"script {script.topic}"
        yield from _row("message", owner, "messages", script.messages)


def _evaluation_texts(catalog: Catalog) -> Iterator[Text]:
    for category in catalog.harm_categories:
        owner = f"harm category {category.name}"
        yield Text("definition", owner, "definition", category.definition)
        yield from _row("harm_probe", owner, "probes", category.probes)
    for exemplars in catalog.exemplars:
        owner = f"exemplars {exemplars.set}/{exemplars.name}"
        yield Text("description", owner, "description", exemplars.description)
        yield from _row("reply", owner, "replies", exemplars.replies)


def _row(kind: str, owner: str, field: str, texts: Iterable[str]) -> Iterator[Text]:
    for number, text in enumerate(texts):
        yield Text(kind, owner, f"{field}[{number}]", text)
