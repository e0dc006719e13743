"""Traits, drift users and scripts, probes, harm categories and exemplars of a catalog folder."""

import re
from pathlib import Path

import pytest

from persona_axis.catalog.catalog import load_catalog
from persona_axis.catalog.texts import Exemplars, HarmCategory, Question, Script, Topic
from persona_axis.errors import CatalogError, UsageError
from tests.catalog.small import BLUNT, COOK, write_small_catalog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_catalog(tmp_path / "catalog")


def test_every_set_is_read(folder: Path):
    catalog = load_catalog(folder)
    assert (catalog.role("cook"), catalog.trait("blunt")) == (COOK, BLUNT)
    assert catalog.trait_groups == {"tone": ("blunt",)}
    [user] = catalog.users
    assert (user.name, user.domain) == ("intern", "coding")
    assert user.topics[1] == Topic("naming", "Name a class.", "What do I call this?")
    messages = ("The build is red and I am new.", "Still red.")
    assert catalog.scripts == (Script("coding", "intern", "red_build", messages),)
    assert catalog.probes == (Question("name", "identity", "What is your name?"),)
    assert catalog.harm_categories == (HarmCategory("theft", "Taking what is not yours.", ("Is it fine to steal?",)),)
    assert catalog.exemplars == (Exemplars("outcome", "refusal", "Declines.", ("No, I will not do that.",)),)


def test_sets_that_are_missing_are_empty(folder: Path):
    for name in ("probes.toml", "harm.toml"):
        (folder / name).unlink()
    for name in ("drift", "exemplars", "traits"):
        (folder / name).rename(folder / f"no_{name}")
    catalog = load_catalog(folder)
    found = (catalog.users, catalog.scripts, catalog.probes, catalog.harm_categories, catalog.exemplars)
    assert (*found, catalog.trait_names) == ((),) * 6
    with pytest.raises(UsageError, match="holds no trait"):
        catalog.select_traits()


def test_traits_are_selected_like_roles(folder: Path):
    catalog = load_catalog(folder)
    assert catalog.select_traits() == catalog.select_traits(1) == catalog.select_traits("blunt") == [BLUNT]
    for spec, words in (
        ("bluntt", "no trait 'bluntt'; did you mean blunt"),
        ("2", "2 traits asked for"),
        (",", "no trait"),
    ):
        with pytest.raises(UsageError, match=words):
            catalog.select_traits(spec)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            "traits/tone/blunt.toml",
            '\n[[pair]]\npositive = "Skip',
            '\n[[pair]]\nposotive = "Skip',
            "pair 2: missing key",
        ),
        ("traits/tone/blunt.toml", "Skip the padding.", "You say the hard thing first.", "'positive' .* is used twice"),
        ("traits/tone/blunt.toml", '"tactful"', '"Tactful"', "'opposite' is 'Tactful'"),
        (
            "traits/tone/blunt.toml",
            "100: the",
            "100: {answer} {mood}",
            "'evaluation' is a whole judge prompt .*'mood'",
        ),
        ("roles/trades/cook.toml", "3: steam", "{answer} {", "'rubric' is a whole judge prompt"),
        ("drift/users/coding/intern.toml", '"naming"', '"red_build"', "'id' 'red_build' is used twice"),
        ("drift/users/coding/intern.toml", '"Name a class."', '""', "topic 2: 'topic' is empty"),
        ("drift/scripts/coding/red_build.toml", '"intern"', '"boss"', "users/coding/boss.toml must have a topic"),
        ("drift/scripts/coding/red_build.toml", "and I am new", "again", "first message is not the opening"),
        ("probes.toml", "[[probe]]", "[[prob]]", "missing key.*probe"),
        ("harm.toml", '"theft"', '"Theft"', "'name' is 'Theft'"),
        ("exemplars/outcome/refusal.toml", "replies", "reply", "missing key.*replies"),
    ],
)
def test_broken_files_are_named(folder: Path, file: str, old: str, new: str, words: str):
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    place = re.escape(str(path.parent if "used twice" in words and "users" in file else path))
    with pytest.raises(CatalogError, match=f"{place}.*{words}"):
        load_catalog(folder).content_hash()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("traits/tone/blunt.toml", "Skip the padding.", "Skip it."),
        ("traits/tone/blunt.toml", "tactful", "gentle"),
        ("drift/users/coding/intern.toml", "Name a class.", "Name a table."),
        ("drift/scripts/coding/red_build.toml", "Still red.", "Red still."),
        ("probes.toml", "What is your name?", "Who are you?"),
        ("harm.toml", "Is it fine to steal?", "May one steal?"),
        ("exemplars/outcome/refusal.toml", "I will not", "I won't"),
    ],
)
def test_content_hash_sees_every_set(folder: Path, file: str, old: str, new: str):
    before = load_catalog(folder).content_hash()
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    assert load_catalog(folder).content_hash() != before
