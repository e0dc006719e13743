"""What is written is read back the same, whatever the text."""

import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from persona_axis.catalog.catalog import load_catalog
from persona_axis.catalog.parse import parse_role, parse_trait
from persona_axis.catalog.texts import PromptPair, Question, Role, Trait
from persona_axis.catalog.write import (
    role_toml,
    trait_toml,
    write_default_prompts,
    write_persona,
    write_questions,
)
from tests.catalog.small import BLUNT, COOK

# Texts as catalogs keep them: without white space around, not a judge prompt in the reference's form.
TEXT = (
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and "{" not in text and "\r" not in text)
)
TEXTS = st.lists(TEXT, min_size=1, unique=True).map(tuple)
PAIRS = st.lists(st.builds(PromptPair, TEXT, TEXT), min_size=1, unique_by=(lambda p: p.positive, lambda p: p.negative))


@given(st.builds(Role, st.just("cook"), st.just("trades"), TEXT, TEXTS, TEXTS, TEXT))
def test_a_role_comes_back(role: Role):
    assert parse_role("f", tomllib.loads(role_toml(role)), role.name, role.group) == role


@given(st.builds(Trait, st.just("blunt"), st.just("tone"), TEXT, st.just("tactful"), PAIRS.map(tuple), TEXTS, TEXT))
def test_a_trait_comes_back(trait: Trait):
    assert parse_trait("f", tomllib.loads(trait_toml(trait)), trait.name, trait.group) == trait


@given(st.builds(Role, st.just("cook"), st.just("trades"), TEXT, TEXTS, TEXTS, TEXT.map(lambda t: f'"""\\{t}"')))
def test_quotes_and_backslashes_do_not_end_a_rubric(role: Role):
    assert parse_role("f", tomllib.loads(role_toml(role)), role.name, role.group) == role


def test_a_written_folder_is_a_catalog(tmp_path: Path):
    questions = [Question("rain", "everyday", 'Does "rain" bother you?'), Question("debt", "values", "What is owed?")]
    write_persona(tmp_path, COOK)
    write_persona(tmp_path, BLUNT)
    write_questions(tmp_path, questions)
    write_default_prompts(tmp_path, ["", "You help."])
    catalog = load_catalog(tmp_path)
    assert (catalog.role("cook"), catalog.trait("blunt")) == (COOK, BLUNT)
    assert catalog.questions == tuple(questions)
    assert catalog.default_prompts == ("", "You help.")


def test_a_role_file_is_laid_out_for_reading():
    lines = role_toml(COOK).splitlines()
    assert lines[:3] == [
        'description = "Feeds a harbor town from one stove."',
        "prompts = [",
        f'  "{COOK.prompts[0]}",',
    ]
    assert lines[-5:] == ['rubric = """', *COOK.rubric.split("\n"), '"""']
