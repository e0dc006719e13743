"""The embedded texts: as many as promised, varied, clean, and the picks by number that figures rest on."""

import re
from collections import Counter
from pathlib import Path

import pytest

from persona_axis.catalog.catalog import load_catalog
from persona_axis.catalog.stats import CatalogStats, catalog_stats
from persona_axis.catalog.texts import Role, Trait
from persona_axis.catalog.validate import Finding, validate
from persona_axis.catalog.walk import walk

CATALOG = load_catalog()


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return validate(CATALOG, promised=True)


@pytest.fixture(scope="module")
def stats() -> CatalogStats:
    return catalog_stats(CATALOG)


def test_validation_finds_nothing(findings: list[Finding]):
    assert [str(finding) for finding in findings] == []


def test_counts(stats: CatalogStats):
    counts = {name: value for name, value in stats.to_dict().items() if isinstance(value, int)}
    assert counts == {
        "roles": 275,
        "role_prompts": 275 * 5,
        "role_questions": 275 * 40,
        "rubrics": 275,
        "traits": 240,
        "trait_prompt_pairs": 240 * 5,
        "trait_questions": 240 * 40,
        "questions": 240,
        "default_prompts": 5,
        "user_personas": 20,
        "topics": 400,
        "openings": 400,
        "scripts": 12,
        "probes": 50,
        "harm_categories": 44,
        "harm_probes": 220,
        "exemplars": 240,
    }


def test_system_prompts_begin_differently(stats: CatalogStats):
    assert stats.same_start_share <= 0.03
    assert stats.ten_starts_share <= 0.15


def test_groups_and_categories_are_filled(stats: CatalogStats):
    assert min(stats.by_group["roles"].values()) >= 30
    assert set(stats.by_group["traits"].values()) == {30}
    assert set(stats.by_group["questions"].values()) == {24}
    assert stats.by_group["topics"] == dict.fromkeys(("coding", "philosophy", "therapy", "writing"), 100)
    assert set(stats.by_group["probes"].values()) == {5}
    assert set(stats.by_group["exemplars"].values()) == {30}
    assert Counter(script.domain for script in CATALOG.scripts) == dict.fromkeys(stats.by_group["topics"], 3)


def test_questions_are_balanced_in_every_round():
    categories = {question.category for question in CATALOG.questions}
    assert len(categories) == 10
    for start in range(0, len(CATALOG.questions), 10):
        assert {question.category for question in CATALOG.questions[start : start + 10]} == categories


def test_a_persona_fits_a_screen():
    lines = {path: len(path.read_text().splitlines()) for path in CATALOG.folder.glob("*/*/*.toml")}
    assert [path.name for path, n in lines.items() if path.parts[-3] == "roles" and n > 60] == []
    assert [path.name for path, n in lines.items() if path.parts[-3] == "traits" and n > 70] == []


@pytest.mark.parametrize("persona", list(CATALOG.personas()), ids=lambda persona: persona.name)
def test_judges_are_told_the_ends_of_the_scale(persona: Role | Trait):
    if isinstance(persona, Role):
        criteria, scores = persona.rubric, ("1", "2", "3")
    else:
        criteria, scores = persona.evaluation, ("0", "100")
    assert [score for score in scores if not re.search(rf"\b{score}\b", criteria)] == []


def test_texts_are_ascii():
    assert [text.where for text in walk(CATALOG) if not text.text.isascii()] == []


def test_poles_and_personas_have_names_of_their_own():
    names = [*CATALOG.role_names, *CATALOG.trait_names, *(trait.opposite for trait in CATALOG.select_traits())]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_default_prompts_begin_with_no_system_message():
    assert CATALOG.default_prompts[0] == ""
    assert all(CATALOG.default_prompts[1:])


def test_picks_that_published_figures_rest_on_do_not_change():
    picked = " ".join(role.name for role in CATALOG.select_roles(36))
    assert picked == (
        "teacher pirate wolf nurse hermit grandmother analyst ghost void detective jester teenager consultant "
        "bard ocean farmer rebel sports_fan reviewer demon swarm lawyer prophet retiree librarian oracle "
        "ancient_tree chef cynic gossip researcher wizard time historian romantic new_parent"
    )
    assert [question.id for question in CATALOG.select_questions(4)] == [
        "never_trade",
        "putting_off",
        "why_tides",
        "human_beings",
    ]
    assert set(Counter(role.group for role in CATALOG.select_roles(24)).values()) == {4}


def test_every_data_file_is_read_by_something():
    known = {"default_prompts.toml", "order.toml", "questions.toml", "probes.toml", "harm.toml"}
    folders = {"roles", "traits", "drift", "exemplars"}
    found = {path.name for path in Path(CATALOG.folder).iterdir()}
    assert found == known | folders
