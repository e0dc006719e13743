"""New roles and traits written by a language model: draft, critique, revise, and validation before acceptance.

Contract:

1. An idea (a name, maybe a line about it) is drafted, criticised against the guide, revised, and then validated
   beside the catalog (`validate_persona`). What validation finds goes back for another revision, at most
   `REVISIONS` in all; what still fails is rejected, with the findings, and no file of it is written.
2. Every answer is on the disk before the next step: ``<folder>/.generate/<kind>/<name>.json``. The same command
   goes on after a kill, a dead judge or Ctrl-C, and asks nothing twice. An idea whose line changed starts anew.
3. Accepted personas are files of a catalog in ``<folder>``, which also gets the questions and default prompts of
   the catalog it was validated beside, so that ``--catalog <folder>`` works.
4. A failed request leaves its idea unfinished; it never becomes a text. An answer that is not what was asked for
   counts as a revision and is told what was wrong.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from persona_axis.catalog.brief import (
    CRITIQUE,
    DRAFT,
    REVISE,
    ROLE_GUIDE,
    SYSTEM,
    TRAIT_GUIDE,
    Critique,
    RoleDraft,
    TraitDraft,
)
from persona_axis.catalog.catalog import Catalog
from persona_axis.catalog.fields import check_name, read_lines, read_toml, require_file
from persona_axis.catalog.index import Index
from persona_axis.catalog.parse import OWN_GROUP, parse_role, parse_trait
from persona_axis.catalog.texts import Role, Trait
from persona_axis.catalog.validate import validate_persona
from persona_axis.catalog.write import write_default_prompts, write_persona, write_questions
from persona_axis.errors import CatalogError, UsageError
from persona_axis.files.atomic import read_json, write_json
from persona_axis.llm.client import Answer, Failure, Prompt

Kind = Literal["role", "trait"]
Ask = Callable[[Sequence[Prompt]], Iterable[Answer | Failure]]

REVISIONS = 3
SHOWN_FINDINGS = 20  # in one prompt


@dataclass(frozen=True, slots=True)
class Idea:
    """What is to be written: a name, and perhaps a line about it."""

    name: str
    line: str = ""


@dataclass
class Work:
    """How far an idea has come; the content of its file.

    `text` is the latest whole draft, `problems` what is to be mended in it, `criticised` whether the critic has
    seen one, `revisions` how often it was revised or had to be asked for again.
    """

    idea: str  # a digest: another line makes another idea
    text: str = ""
    problems: list[str] = field(default_factory=list)
    criticised: bool = False
    revisions: int = 0

    @property
    def rejected(self) -> bool:
        return bool(self.problems) and self.revisions >= REVISIONS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an idea: accepted (its file), rejected (why), or unfinished (why)."""

    name: str
    state: Literal["accepted", "rejected", "unfinished"]
    detail: str


def read_ideas(specs: Sequence[str]) -> list[Idea]:
    """Ideas from ``name`` or ``name: a line about it``; ``@file`` holds one per line.

    UsageError for a missing file, no idea, or a name used twice; CatalogError for a name that breaks the rules.
    """
    lines = [line for spec in specs for line in (read_lines(require_file(spec[1:])) if spec[:1] == "@" else [spec])]
    ideas = []
    for line in lines:
        name, _, about = line.partition(":")
        ideas.append(Idea(check_name(line, "name", re.sub(r"[\s-]+", "_", name.strip().lower())), about.strip()))
    if not ideas:
        raise UsageError("no idea is given; write NAME, 'NAME: a line about it', or @FILE with one per line")
    if len({idea.name for idea in ideas}) < len(ideas):
        raise UsageError("an idea is named twice")
    return ideas


def generate(
    kind: Kind, ideas: Sequence[Idea], folder: Path, catalog: Catalog, ask: Ask, group: str = OWN_GROUP
) -> Iterator[Outcome]:
    """Write personas into the catalog folder `folder`; one outcome per idea, as they are decided.

    Args:
        kind: "role" or "trait".
        ideas: what to write. One whose file exists in `folder` is accepted without a request.
        folder: a catalog folder of the user's, new or with earlier results.
        catalog: near-duplicates of its texts are found; its questions and default prompts are copied.
        ask: puts prompts to a language model (`LLMClient.ask`); answers may come in any order.
        group: the folder of accepted personas.

    UsageError if an idea is in `catalog` already, StorageError if the disk refuses, JudgeError from `ask`.
    """
    known = catalog.role_names if kind == "role" else catalog.trait_names
    if taken := [idea.name for idea in ideas if idea.name in known]:
        raise UsageError(f"the catalog has a {kind} {taken[0]!r} already; choose another name")
    _prepare(folder, catalog)
    desk = _Desk(kind, folder, catalog, check_name("--group", "group", group))
    open_ideas: list[Idea] = []
    for idea in ideas:
        outcome = desk.decided(idea)
        if outcome is None:
            open_ideas.append(idea)
        else:
            yield outcome
    while open_ideas:
        by_name = {idea.name: idea for idea in open_ideas}
        open_ideas = []
        for answer in ask([desk.prompt(idea) for idea in by_name.values()]):
            idea = by_name[answer.key]
            if isinstance(answer, Failure):
                yield Outcome(idea.name, "unfinished", answer.reason)
                continue
            desk.take(idea, answer)
            if (outcome := desk.decided(idea)) is not None:
                yield outcome
            else:
                open_ideas.append(idea)


class _Desk:
    """Where each idea's work lies, and what its next step is."""

    def __init__(self, kind: Kind, folder: Path, catalog: Catalog, group: str) -> None:
        self.kind, self.folder, self.catalog, self.group = kind, folder, catalog, group
        self.draft: type[BaseModel] = RoleDraft if kind == "role" else TraitDraft
        self.guide = ROLE_GUIDE if kind == "role" else TRAIT_GUIDE

    def decided(self, idea: Idea) -> Outcome | None:
        """The outcome of an idea that needs no more requests."""
        for file in (self.folder / f"{self.kind}s").glob(f"*/{idea.name}.toml"):  # in whatever group
            return Outcome(idea.name, "accepted", str(file))
        work = self._load(idea)
        if work.rejected:
            return Outcome(idea.name, "rejected", "; ".join(work.problems[:3]))
        return None

    def prompt(self, idea: Idea) -> Prompt:
        """The next request: a draft, its critique, or a revision."""
        work = self._load(idea)
        words = {"guide": self.guide, "kind": self.kind, "name": idea.name.replace("_", " "), "text": work.text}
        keys = ", ".join(self.draft.model_fields)
        if not work.text:
            line = f" About it: {idea.line}" if idea.line else ""
            again = "".join(f"\nYour last answer could not be used: {problem}" for problem in work.problems)
            return self._prompt(idea, DRAFT.format(**words, line=line + again, keys=keys), self.draft)
        if not work.criticised:
            return self._prompt(idea, CRITIQUE.format(**words), Critique)
        problems = "\n".join(f"- {problem}" for problem in work.problems[:SHOWN_FINDINGS])
        return self._prompt(idea, REVISE.format(**words, problems=problems, keys=keys), self.draft)

    def take(self, idea: Idea, answer: Answer) -> None:
        """Move on by one answer, and store how far it has come."""
        work = self._load(idea)
        critique = bool(work.text) and not work.criticised
        try:
            parsed = _parse(Critique if critique else self.draft, answer)
        except ValueError as error:
            work.problems = [*(work.problems if work.criticised else []), str(error)]
            work.revisions += 1
        else:
            if isinstance(parsed, Critique):
                work.criticised, work.problems = True, parsed.problems
            else:
                work.text, work.problems = parsed.model_dump_json(indent=1), []
                work.revisions += work.criticised
            if work.criticised and not work.problems:
                self._judge(idea, work)
        self._store(idea, work)

    def _judge(self, idea: Idea, work: Work) -> None:
        """Accept a criticised and mended text, or send it back with what validation finds."""
        try:
            persona = self._persona(idea, work)
        except CatalogError as error:
            work.problems = [str(error)]
            return
        findings = validate_persona(persona, self.catalog, beside=self._accepted())
        work.problems = [str(finding) for finding in findings]
        if not findings:
            write_persona(self.folder, persona)

    def _persona(self, idea: Idea, work: Work) -> Role | Trait:
        table = json.loads(work.text)
        if self.kind == "role":
            return parse_role(idea.name, table, idea.name, self.group)
        table["pair"] = table.pop("pairs")
        return parse_trait(idea.name, table, idea.name, self.group)

    def _accepted(self) -> list[Role | Trait]:
        """What the folder holds by now, from this command or an earlier one."""
        index = Index(self.folder, self.kind)
        parse = parse_role if self.kind == "role" else parse_trait
        places = [(name, *index.place(name)) for name in index.names]
        return [parse(str(path), read_toml(path), name, group) for name, path, group in places]

    def _prompt(self, idea: Idea, text: str, answer: type[BaseModel]) -> Prompt:
        return Prompt(idea.name, text, system=SYSTEM, answer=answer)

    def _file(self, idea: Idea) -> Path:
        return self.folder / ".generate" / self.kind / f"{idea.name}.json"

    def _load(self, idea: Idea) -> Work:
        digest = hashlib.sha256(f"{idea.name}\0{idea.line}".encode()).hexdigest()
        file = self._file(idea)
        work = Work(**read_json(file)) if file.exists() else Work(digest)
        return work if work.idea == digest else Work(digest)

    def _store(self, idea: Idea, work: Work) -> None:
        write_json(self._file(idea), asdict(work))


def _prepare(folder: Path, catalog: Catalog) -> None:
    """The questions and default prompts a catalog folder needs; those that are there stay."""
    if not (folder / "questions.toml").exists():
        write_questions(folder, catalog.questions)
    if not (folder / "default_prompts.toml").exists():
        write_default_prompts(folder, catalog.default_prompts)


def _parse(form: type[BaseModel], answer: Answer) -> BaseModel:
    """A model's answer as what was asked for. ValueError with what to tell it."""
    if answer.cut:
        raise ValueError("it was cut by the token limit; write shorter texts")
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", answer.text, re.DOTALL)
    try:
        return form.model_validate_json(fenced[1] if fenced else answer.text)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'answer'}: {e['msg']}" for e in error.errors()[:5])
        raise ValueError(f"not the JSON that was asked for ({wrong})") from error
