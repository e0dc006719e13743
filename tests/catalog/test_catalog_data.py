"""The embedded texts: enough of them, varied, clean, and none that casts the Assistant."""

import re
import tomllib
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import persona_axis.catalog.catalog as catalog_module
from persona_axis.catalog.catalog import Role, load_catalog

CATALOG = load_catalog()
ROLES = CATALOG.select_roles()
PROMPTS = [(role.name, prompt) for role in ROLES for prompt in role.prompts]
PLACEHOLDER = re.compile(r"[{}\[\]<>]|TODO|FIXME|XXX|lorem ipsum", re.IGNORECASE)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def opening(text: str) -> str:
    return " ".join(words(text)[:3])


def five_grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}


def all_texts() -> list[str]:
    own = [text for role in ROLES for text in (role.description, *role.prompts, *role.questions, role.rubric)]
    return [*own, *(question.text for question in CATALOG.questions), *CATALOG.default_prompts]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_role_is_complete_and_within_length_bounds(role: Role):
    assert len(role.prompts) == 5
    assert len(role.questions) >= 5
    assert 20 <= len(role.description) <= 160
    assert all(60 <= len(prompt) <= 500 for prompt in role.prompts)
    assert all(10 <= len(question) <= 160 for question in role.questions)
    assert 150 <= len(role.rubric) <= 900
    assert all(re.search(rf"\b{score}\b", role.rubric) for score in (1, 2, 3))


def test_there_are_enough_roles_in_every_group():
    assert len(CATALOG.role_names) >= 60
    assert all(len(names) >= 8 for names in CATALOG.groups.values())


def test_questions_are_sixty_and_balanced_in_every_round():
    questions = CATALOG.questions
    categories = {question.category for question in questions}
    assert len(questions) == 60
    assert len(categories) == 10
    for start in range(0, 60, 10):
        assert {question.category for question in questions[start : start + 10]} == categories


def test_shared_questions_cast_no_role_and_end_as_a_sentence():
    for question in CATALOG.questions:
        assert not re.search(r"\bas an? |in your (work|job|trade|role) as|pretend|role-?play", question.text, re.I)
        assert question.text[-1] in "?."
        assert 15 <= len(question.text) <= 120


def test_default_prompts_begin_with_no_system_message():
    assert len(CATALOG.default_prompts) == 5
    assert CATALOG.default_prompts[0] == ""
    assert all(CATALOG.default_prompts[1:])


def test_system_prompts_ask_nothing():
    asking = [name for name, prompt in PROMPTS if "?" in prompt]
    assert asking == []
    assert not any("?" in prompt for prompt in CATALOG.default_prompts)


def test_texts_are_ascii_without_placeholders():
    assert [text for text in all_texts() if not text.isascii()] == []
    assert [text for text in all_texts() if PLACEHOLDER.search(text)] == []


def test_no_text_occurs_twice():
    questions = [question for role in ROLES for question in role.questions]
    questions += [question.text for question in CATALOG.questions]
    for texts in (questions, [prompt for _, prompt in PROMPTS], [role.rubric for role in ROLES]):
        normal = [" ".join(words(text)) for text in texts]
        assert [text for text, count in Counter(normal).items() if count > 1] == []


def test_openings_vary():
    for role in ROLES:
        openings = [opening(prompt) for prompt in role.prompts]
        assert len(set(openings)) == len(openings), role.name
    counts = [count for _, count in Counter(opening(prompt) for _, prompt in PROMPTS).most_common(10)]
    assert counts[0] <= 0.03 * len(PROMPTS)
    assert sum(counts) <= 0.15 * len(PROMPTS)


def test_no_two_prompts_are_near_duplicates():
    grams = [(name, prompt, five_grams(prompt)) for name, prompt in PROMPTS]
    for (name_a, prompt_a, a), (name_b, prompt_b, b) in combinations(grams, 2):
        limit = 0.6 if name_a == name_b else 0.8
        assert len(a & b) <= limit * len(a | b), (prompt_a, prompt_b)


def test_order_file_names_every_role_once():
    path = Path(catalog_module.__file__).parent / "data" / "order.toml"
    tables = tomllib.loads(path.read_text())["group"]
    assert {table["name"]: sorted(table["roles"]) for table in tables} == {
        group: list(names) for group, names in CATALOG.groups.items()
    }


def test_pick_of_36_holds_the_measured_personas_and_24_span_the_groups():
    wanted = {"pirate", "ghost", "bard", "demon", "oracle", "teacher", "analyst", "consultant", "reviewer"}
    assert wanted <= {role.name for role in CATALOG.select_roles(36)}
    assert set(Counter(role.group for role in CATALOG.select_roles(24)).values()) == {4}
