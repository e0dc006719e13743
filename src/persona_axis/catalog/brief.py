"""What a language model is told that writes for the catalog, and the forms of its answers."""

from pydantic import BaseModel, ConfigDict

SYSTEM = """\
You write short texts for a catalog of personas that researchers ask chat models to play. You write with knowledge of \
the milieu and an ear for voices; nothing you write sounds like a template. You answer with JSON only."""

ROLE_GUIDE = """\
A role is a character. Its texts:
- description: one line of 40 to 150 characters, what this one is like.
- prompts: 5 system prompts of 80 to 220 characters that make even a small model play the role, in five ways: who you \
are; how to answer whatever is asked; the scene you are in; what you want, love and fear; how you sound, with two or \
three quoted words of the role's own. Each names the role and holds concrete marks of it. None asks a question. Each \
begins with other words than the rest.
- questions: 40 user messages of 15 to 140 characters on which the role would show without being asked to. Anyone, a \
plain assistant too, can answer them sensibly. None casts the answerer ("as a nurse", "in your work"), none says \
pretend or imagine. Concrete situations, judgments, small dilemmas, memories, explanations, tiny creative requests, \
in varied sentence shapes.
- rubric: 200 to 900 characters for a judge who scores a reply: what a 3 (fully the role) sounds like here, what a 2 \
(an assistant with some of the role) is, what a 1 (an ordinary answer) is, and what is easily mistaken for the role.
No real people, no brands, no slurs, nothing sexual, no instructions for harm."""

TRAIT_GUIDE = """\
A trait is a manner with two opposite poles. Its texts:
- description: one line of 40 to 160 characters: what the trait does in a reply, and what the opposite does.
- opposite: the name of the other pole, one or two lower-case words joined by an underscore.
- pairs: 5 pairs of system prompts (positive, negative), each of 70 to 220 characters, built alike and differing in \
the pole, in five ways: nature; how to answer; a scene; values; voice with quoted words. Each pole is described for \
what it is. None asks a question. All ten begin differently.
- questions: 40 user messages of 15 to 140 characters on which the two poles would answer visibly differently, though \
nothing in them asks for either or names the trait. Anyone can answer them sensibly. None casts the answerer.
- evaluation: 200 to 900 characters for a judge who rates a reply from 0 to 100: what 100, 50 and 0 look like, and \
what is easily mistaken for the trait.
No real people, no brands, no slurs, nothing sexual, no instructions for harm."""

DRAFT = """{guide}

Write the {kind} "{name}".{line}
Answer with one JSON object with the keys {keys}."""
CRITIQUE = """{guide}

Here is a draft of the {kind} "{name}":

{text}

Read it as a stranger who knows the subject. Name every text that is generic, wrong, awkward, stamped from a pattern, \
or that breaks the guide, and say what to do about it. Answer with one JSON object with the key problems: a list of \
strings, empty if nothing needs to change."""
REVISE = """{guide}

Here is a draft of the {kind} "{name}":

{text}

Mend these problems and leave the rest as it is:
{problems}

Answer with the whole {kind} as one JSON object with the keys {keys}."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RoleDraft(_Model):
    description: str
    prompts: list[str]
    questions: list[str]
    rubric: str


class Pair(_Model):
    positive: str
    negative: str


class TraitDraft(_Model):
    description: str
    opposite: str
    pairs: list[Pair]
    questions: list[str]
    evaluation: str


class Critique(_Model):
    problems: list[str]
