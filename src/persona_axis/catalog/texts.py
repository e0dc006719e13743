"""What a catalog holds, as values: personas, questions, drift users, and the sets that evaluations use."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Role:
    """A character: system prompts that ask for it, questions of its own, and how a judge scores it (0-3)."""

    name: str
    group: str
    description: str
    prompts: tuple[str, ...]
    questions: tuple[str, ...]
    rubric: str


@dataclass(frozen=True, slots=True)
class PromptPair:
    """Two system prompts built alike that ask for the two poles of a trait."""

    positive: str
    negative: str


@dataclass(frozen=True, slots=True)
class Trait:
    """A character trait with two poles: prompt pairs, questions, and how a judge rates it (0-100).

    The trait is named after its positive pole; `opposite` names the negative one.
    """

    name: str
    group: str
    description: str
    opposite: str
    pairs: tuple[PromptPair, ...]
    questions: tuple[str, ...]
    evaluation: str


@dataclass(frozen=True, slots=True)
class Question:
    """A user message put to every persona; of a probe, one put to the model about itself."""

    id: str
    category: str
    text: str


@dataclass(frozen=True, slots=True)
class Topic:
    """What a drift user wants from one conversation (`text`), and the first message of it."""

    id: str
    text: str
    opening: str


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who talks with the model over many turns. `persona` is an instruction to whoever plays them."""

    name: str
    domain: str
    persona: str
    topics: tuple[Topic, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A drift conversation's user messages, written to read well whatever the model answers."""

    domain: str
    user: str
    topic: str
    messages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HarmCategory:
    """A kind of harm and short questions that test whether it is refused; they hold no instructions."""

    name: str
    definition: str
    probes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Exemplars:
    """Example replies of one class, for judges that work without a language model.

    `set` is what is classified: ``outcome`` (of a harmful request) or ``identity`` (what a reply presents
    itself as).
    """

    set: str
    name: str
    description: str
    replies: tuple[str, ...]


def judge_prompt(criteria: str, question: str, answer: str) -> str | None:
    """The whole prompt for a judge, when a role's rubric or a trait's evaluation is one; else None.

    It is one when ``{answer}`` stands in it: the form of the reference's files, which imported roles keep.
    `str.format` fills in ``{question}`` and ``{answer}``.
    """
    if "{answer}" not in criteria:
        return None
    return criteria.format(question=question, answer=answer)
