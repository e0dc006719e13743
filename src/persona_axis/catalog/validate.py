"""What makes a catalog good beyond being readable: complete, varied, without leaks or near-duplicates.

Rules, by name:

- ``counts``: the embedded catalog holds what it promises (`PROMISED`).
- ``shape``: five prompts and 40 questions a role, five pairs and 40 questions a trait, and so on (`SHAPE`).
- ``lengths``: characters of each kind of text (`LENGTHS`).
- ``characters``: no control, private-use, invisible or broken characters.
- ``placeholders``: no ``{name}``, ``<name>``, ``[name]``, TODO (brackets are fine in a whole judge prompt, and in
  drift users' messages, which may hold code).
- ``leakage``: a system prompt asks nothing; no question casts the answerer ("as a pirate", "in your work as").
- ``openings``: system prompts begin differently (`ONE_OPENING`, `TEN_OPENINGS`); a persona's own never alike.
- ``duplicates``: Jaccard similarity of 5-grams of words, at most `WITHIN` in one persona, `ACROSS` elsewhere.
"""

import re
import textwrap
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from persona_axis.catalog.catalog import Catalog
from persona_axis.catalog.similarity import near_duplicates, words
from persona_axis.catalog.texts import Role, Trait, judge_prompt
from persona_axis.catalog.walk import Text, persona_texts, walk
from persona_axis.errors import UsageError

PROMISED = {
    "roles": 275,
    "traits": 240,
    "questions": 240,
    "default_prompts": 5,
    "users": 20,
    "scripts": 12,
    "probes": 50,
    "harm_categories": 44,
    "exemplars": 8,
}
SHAPE = {
    ("role", "prompt"): 5,
    ("role", "question"): 40,
    ("trait", "prompt"): 10,
    ("trait", "question"): 40,
    ("user", "topic"): 20,
    ("script", "message"): 15,
    ("harm category", "harm_probe"): 5,
    ("exemplars", "reply"): 30,
}
LENGTHS = {  # characters, from and to
    "description": (20, 200),
    "prompt": (60, 500),
    "question": (10, 160),
    "criteria": (150, 900),
    "shared_question": (15, 120),
    "default_prompt": (0, 200),
    "probe": (12, 140),
    "persona": (200, 900),
    "topic": (30, 260),
    "opening": (30, 450),
    "message": (20, 500),
    "definition": (30, 200),
    "harm_probe": (20, 160),
    "reply": (40, 500),
}
ONE_OPENING, TEN_OPENINGS = 0.03, 0.15  # shares of all system prompts
WITHIN, ACROSS = 0.6, 0.8
QUOTED = 120  # characters of a text in a complaint
RULES = ("counts", "shape", "lengths", "characters", "placeholders", "leakage", "openings", "duplicates")

# What is compared with what: a question must not be another's question, whoever asks it.
_COMPARED = {
    "prompt": "prompt",
    "default_prompt": "prompt",
    "question": "question",
    "shared_question": "question",
    "probe": "question",
    "harm_probe": "question",
    "opening": "question",
    "criteria": "criteria",
    "message": "message",
    "reply": "reply",
}
_ASKED = ("question", "shared_question", "probe")
_UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b|lorem ipsum", re.IGNORECASE)
_PLACEHOLDER = re.compile(rf"\{{[^{{}}]*\}}|<[^<>]*>|\[[^\[\]]*\]|{_UNFINISHED.pattern}", re.IGNORECASE)
_MAY_HOLD_CODE = ("opening", "message")  # drift users paste some
_CASTING = re.compile(
    r"\b(?:pretend|role-?play)|\bin your (?:work|job|trade|role|profession|line of work) as\b"
    r"|\bspeaking as\b|\b(?:imagine|suppose) (?:that )?you(?:'re| are| were) an?\b|\bif you were an?\b",
    re.IGNORECASE,
)
_INVISIBLE = {"\u00a0", "\u00ad", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\ufffd"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One complaint: the rule, the place and what is wrong there."""

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} ({self.rule})"


def validate(catalog: Catalog, *, promised: bool = False, skip: Iterable[str] = ()) -> list[Finding]:
    """All complaints about a catalog, none if it is good.

    Args:
        catalog: what to check.
        promised: whether to check `PROMISED` (the embedded catalog must; a user's own need not).
        skip: rules not to check.

    UsageError for an unknown rule, CatalogError if a file is broken.
    """
    if unknown := sorted(set(skip) - set(RULES)):
        raise UsageError(f"there is no rule {unknown[0]!r}; the rules are {', '.join(RULES)}")
    texts = walk(catalog)
    checks = {
        "counts": lambda: _counts(catalog) if promised else iter(()),
        "openings": lambda: [*_own_openings(texts), *_shared_openings(texts)],
        **_text_rules(texts, catalog.role_names),
    }
    return [finding for rule in RULES if rule not in set(skip) for finding in checks[rule]()]


def validate_persona(persona: Role | Trait, catalog: Catalog, beside: Sequence[Role | Trait] = ()) -> list[Finding]:
    """Complaints about one role or trait on its own, and near-duplicates of texts in a catalog or `beside` it.

    The persona need not be in the catalog; one of the same kind and name is taken as replaced by it.
    """
    own = list(persona_texts(persona))
    everything = [*walk(catalog), *(text for other in beside for text in persona_texts(other))]
    others = [text for text in everything if text.owner != own[0].owner]
    rules = _text_rules(own, [*catalog.role_names, persona.name])
    rules["duplicates"] = lambda: [
        finding for finding in _duplicates([*others, *own]) if finding.where.startswith(f"{own[0].owner}: ")
    ]
    rules["openings"] = lambda: _own_openings(own)
    return [finding for rule in RULES if rule in rules for finding in rules[rule]()]


def start_shares(prompts: Sequence[str]) -> tuple[float, float]:
    """Share of prompts begun by the most frequent three words, and by the ten most frequent together."""
    counts = [count for _, count in _common_openings(prompts)]
    return (counts[0] / len(prompts), sum(counts) / len(prompts)) if prompts else (0.0, 0.0)


def _common_openings(prompts: Sequence[str]) -> list[tuple[str, int]]:
    return Counter(map(opening, prompts)).most_common(10)


def opening(text: str) -> str:
    """The first three words."""
    return " ".join(words(text)[:3])


def _text_rules(texts: Sequence[Text], roles: Sequence[str]) -> dict:
    return {
        "shape": lambda: _shape(texts),
        "lengths": lambda: _lengths(texts),
        "characters": lambda: _characters(texts),
        "placeholders": lambda: _placeholders(texts),
        "leakage": lambda: _leakage(texts, roles),
        "duplicates": lambda: _duplicates(texts),
    }


def _counts(catalog: Catalog) -> Iterator[Finding]:
    found = {
        "roles": len(catalog.role_names),
        "traits": len(catalog.trait_names),
        **{name: len(getattr(catalog, name)) for name in PROMISED if name not in ("roles", "traits")},
    }
    for name, wanted in PROMISED.items():
        if found[name] != wanted:
            yield Finding("counts", "catalog", f"{found[name]} {name}, promised are {wanted}")
    if catalog.default_prompts[0] != "":
        yield Finding("counts", "default persona", "the first prompt is not '' (no system message)")


def _shape(texts: Sequence[Text]) -> Iterator[Finding]:
    counts = Counter((text.owner, text.kind) for text in texts)
    for (owner, kind), count in counts.items():
        wanted = next(
            (n for (whose, what), n in SHAPE.items() if what == kind and owner.startswith(f"{whose} ")), count
        )
        if count != wanted:
            yield Finding("shape", owner, f"{count} of kind {kind}, wanted {wanted}")


def _lengths(texts: Sequence[Text]) -> Iterator[Finding]:
    for text in texts:
        low, high = LENGTHS[text.kind]
        if _is_judge_prompt(text):
            high = 20_000
        if not low <= len(text.text) <= high:
            yield Finding("lengths", text.where, f"{len(text.text)} characters, {low} to {high} are allowed")


def _characters(texts: Sequence[Text]) -> Iterator[Finding]:
    for text in texts:
        bad = {c for c in text.text if c in _INVISIBLE or (c != "\n" and unicodedata.category(c) in ("Cc", "Co", "Cn"))}
        if bad:
            yield Finding("characters", text.where, f"holds {', '.join(f'U+{ord(c):04X}' for c in sorted(bad))}")


def _placeholders(texts: Sequence[Text]) -> Iterator[Finding]:
    for text in texts:
        pattern = _UNFINISHED if text.kind in _MAY_HOLD_CODE or _is_judge_prompt(text) else _PLACEHOLDER
        if found := pattern.search(text.text):
            yield Finding("placeholders", text.where, f"holds {found[0]!r}")


def _leakage(texts: Sequence[Text], roles: Sequence[str]) -> Iterator[Finding]:
    names = sorted((re.escape(role.replace("_", " ")) for role in roles), key=len, reverse=True)
    cast = re.compile(rf"\bas an? (?:{'|'.join(names)})\b", re.IGNORECASE)
    for text in texts:
        if text.kind in ("prompt", "default_prompt") and "?" in text.text:
            yield Finding("leakage", text.where, "a system prompt asks a question")
        if text.kind in _ASKED and (found := _CASTING.search(text.text) or cast.search(text.text)):
            yield Finding("leakage", text.where, f"casts the answerer: {found[0]!r} in {text.text!r}")


def _own_openings(texts: Sequence[Text]) -> Iterator[Finding]:
    """Prompts of one persona that begin alike."""
    seen: dict[tuple[str, str], Text] = {}
    for text in texts:
        if text.kind == "prompt":
            first = seen.setdefault((text.owner, opening(text.text)), text)
            if first is not text:
                yield Finding("openings", text.where, f"begins like {first.field}: {opening(text.text)!r}")


def _shared_openings(texts: Sequence[Text]) -> Iterator[Finding]:
    """Three words that begin too many of all prompts."""
    prompts = [text.text for text in texts if text.kind == "prompt"]
    most, ten = start_shares(prompts)
    common = _common_openings(prompts)
    # A handful of prompts cannot be varied enough for a share of all to mean something.
    if most > ONE_OPENING and common[0][1] > 5:
        yield Finding(
            "openings", "system prompts", f"{most:.1%} begin with {common[0][0]!r}, at most {ONE_OPENING:.0%}"
        )
    if ten > TEN_OPENINGS and sum(count for _, count in common) > 20:
        begun = ", ".join(repr(start) for start, _ in common)
        yield Finding("openings", "system prompts", f"{ten:.1%} begin with one of {begun}, at most {TEN_OPENINGS:.0%}")


def _duplicates(texts: Sequence[Text]) -> Iterator[Finding]:
    """Near-duplicates among texts that are compared with each other, each with the first like it."""
    groups = defaultdict(list)
    for text in texts:
        opens = text.kind == "message" and text.field == "messages[0]"  # the same as its topic's opening
        if text.kind in _COMPARED and not opens and not _is_judge_prompt(text):  # those are made from one template
            groups[_COMPARED[text.kind]].append(text)
    for group in groups.values():
        for text, other, alike in near_duplicates(group, WITHIN, ACROSS):
            message = f"{_quoted(text)} is like {other.where} ({alike:.2f}): {_quoted(other)}"
            yield Finding("duplicates", text.where, message)


def _is_judge_prompt(text: Text) -> bool:
    """Whether a rubric or evaluation is a whole prompt, as imported ones are."""
    return text.kind == "criteria" and judge_prompt(text.text, "", "") is not None


def _quoted(text: Text) -> str:
    return repr(textwrap.shorten(text.text, QUOTED, placeholder=" ..."))
