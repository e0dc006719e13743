"""A small catalog folder that holds something of everything, and personas that pass every rule of validation."""

import json
import re
from pathlib import Path

from persona_axis.catalog.texts import PromptPair, Role, Trait

COOK = Role(
    name="cook",
    group="trades",
    description="Feeds a harbor town from one stove.",
    prompts=("You cook for sailors, and the stove is never cold.", "Stir first and answer over the shoulder."),
    questions=("What is salt for?", "Who gets the last dumpling?"),
    rubric="3: steam and salt run the reply.\n2: a recipe with some temper.\n1: plain advice.",
)
BLUNT = Trait(
    name="blunt",
    group="tone",
    description="Says the hard thing first; the opposite wraps it.",
    opposite="tactful",
    pairs=(
        PromptPair("You say the hard thing first.", "You find the kind way in."),
        PromptPair("Skip the padding.", "Wrap the bad news well."),
    ),
    questions=("Is my haiku good?", "Shall I sing at the wedding?"),
    evaluation="100: the hard thing first.\n0: wrapped in wool.",
)


NUMBERS = [f"number{index}" for index in range(17)]


def filler(text: str, characters: int) -> str:
    """`text` with words of its own behind it, long enough, unlike any other."""
    word = re.sub(r"\W", "", text.lower())
    return text + "".join(f" {word}{NUMBERS[i % 17]}{i}" for i in range(characters // 5))


def good_role(name: str = "cook", **changes: object) -> Role:
    fields: dict = {
        "description": f"A {name} who is here to be checked.",
        "prompts": tuple(filler(f"{number} {name} starts", 80)[:200] for number in NUMBERS[:5]),
        "questions": tuple(f"{name} question {number} of the many, right {number}?" for number in range(40)),
        "rubric": filler(f"3 is a {name}.", 200)[:400],
    }
    return Role(name=name, group="trades", **{**fields, **changes})


def good_trait(name: str = "blunt") -> Trait:
    pairs = tuple(
        PromptPair(filler(f"{number} {name} yes", 70)[:200], filler(f"{number} {name} no", 70)[:200])
        for number in NUMBERS[:5]
    )
    questions = tuple(f"{name} question {number} of the many, right {number}?" for number in range(40))
    return Trait(
        name, "tone", f"The trait {name}, to be checked.", "other", pairs, questions, filler("0 to 100.", 200)[:400]
    )


def value(text: object) -> str:
    """A TOML value."""
    return json.dumps(text)


def write_small_catalog(root: Path) -> Path:
    """Two roles, a trait, two questions, a user with a script, a probe, a harm category, exemplars."""
    cook = {
        "description": COOK.description,
        "prompts": COOK.prompts,
        "questions": COOK.questions,
        "rubric": COOK.rubric,
    }
    smith = {**cook, "prompts": ("Iron is all you know.",), "questions": ("How hot is too hot?",)}
    files = {
        "roles/trades/cook.toml": table(cook),
        "roles/trades/smith.toml": table(smith),
        "traits/tone/blunt.toml": table(
            {
                "description": BLUNT.description,
                "opposite": BLUNT.opposite,
                "questions": BLUNT.questions,
                "evaluation": BLUNT.evaluation,
            }
        )
        + tables("pair", [{"positive": p.positive, "negative": p.negative} for p in BLUNT.pairs]),
        "questions.toml": tables(
            "question",
            [
                {"id": "rain", "category": "everyday", "text": "Does rain bother you?"},
                {"id": "debt", "category": "values", "text": "What does one owe a friend?"},
            ],
        ),
        "default_prompts.toml": table({"prompts": ["", "You help."]}),
        "drift/users/coding/intern.toml": table({"persona": "You started last week and ask about everything."})
        + tables(
            "topic",
            [
                {
                    "id": "red_build",
                    "topic": "Find out why the build is red.",
                    "opening": "The build is red and I am new.",
                },
                {"id": "naming", "topic": "Name a class.", "opening": "What do I call this?"},
            ],
        ),
        "drift/scripts/coding/red_build.toml": table(
            {"user": "intern", "topic": "red_build", "messages": ["The build is red and I am new.", "Still red."]}
        ),
        "probes.toml": tables("probe", [{"id": "name", "category": "identity", "text": "What is your name?"}]),
        "harm.toml": tables(
            "category",
            [{"name": "theft", "definition": "Taking what is not yours.", "probes": ["Is it fine to steal?"]}],
        ),
        "exemplars/outcome/refusal.toml": table({"description": "Declines.", "replies": ["No, I will not do that."]}),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def table(fields: dict) -> str:
    return "".join(f"{key} = {value(field)}\n" for key, field in fields.items())


def tables(name: str, items: list[dict]) -> str:
    return "".join(f"\n[[{name}]]\n{table(item)}" for item in items)
