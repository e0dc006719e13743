"""Each rule finds what it is for and nothing else; near-duplicates against a plain pairwise count."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_axis.catalog.catalog import load_catalog
from persona_axis.catalog.similarity import five_grams, near_duplicates
from persona_axis.catalog.stats import catalog_stats
from persona_axis.catalog.validate import (
    ACROSS,
    LENGTHS,
    WITHIN,
    Finding,
    start_shares,
    validate,
    validate_persona,
)
from persona_axis.catalog.walk import Text, walk
from persona_axis.catalog.write import write_persona
from persona_axis.errors import UsageError
from tests.catalog.small import filler, good_role, good_trait, write_small_catalog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "catalog"
    root.mkdir()
    (root / "questions.toml").write_text('[[question]]\nid = "rain"\ncategory = "a"\ntext = "Does rain bother you?"\n')
    (root / "default_prompts.toml").write_text('prompts = ["", "You help."]\n')
    write_persona(root, good_role())
    write_persona(root, good_role("smith"))
    write_persona(root, good_trait())
    return root


def rules(findings: list[Finding]) -> list[str]:
    return [finding.rule for finding in findings]


def test_a_good_catalog_has_no_findings(folder: Path):
    assert [str(finding) for finding in validate(load_catalog(folder))] == []


def test_a_catalog_of_scraps_has_many(tmp_path: Path):
    found = set(rules(validate(load_catalog(write_small_catalog(tmp_path)), promised=True)))
    assert {"counts", "shape", "lengths", "duplicates"} <= found


@pytest.mark.parametrize(
    ("changes", "rule", "words"),
    [
        ({"description": "Short."}, "lengths", "description: 6 characters, 20 to 200"),
        ({"prompts": good_role().prompts[:4]}, "shape", "4 of kind prompt, wanted 5"),
        ({"questions": good_role().questions[:39]}, "shape", "39 of kind question, wanted 40"),
        ({"description": "A cook\u200b who is here to be checked."}, "characters", "U+200B"),
        ({"description": "A cook \ufffd who is here to be checked."}, "characters", "U+FFFD"),
        ({"description": "A cook who is \x07 here to be checked."}, "characters", "U+0007"),
        ({"description": "A cook called {name}, to be checked."}, "placeholders", "'{name}'"),
        ({"description": "A cook called <name>, to be checked."}, "placeholders", "'<name>'"),
        ({"description": "A cook, TODO: say which one it is."}, "placeholders", "'TODO'"),
        ({"rubric": good_role().rubric + " {question}"}, "placeholders", "{question}"),
    ],
)
def test_one_change_one_finding(folder: Path, changes: dict, rule: str, words: str):
    write_persona(folder, good_role(**changes))
    [finding] = validate(load_catalog(folder))
    assert finding.rule == rule
    assert words in str(finding)
    assert str(finding).startswith("role cook")


@pytest.mark.parametrize(
    "question",
    [
        "As a cook, what do you think of rain?",
        "What does one learn as a smith?",
        "In your work as anything, what is hard?",
        "Pretend that you are rich. What then?",
        "Suppose you were a king. What then?",
        "If you were an owl, where would you sleep?",
        "Speaking as somebody old, what is lost?",
    ],
)
def test_casting_questions_are_found(folder: Path, question: str):
    write_persona(folder, good_role(questions=(*good_role().questions[:39], question)))
    [finding] = validate(load_catalog(folder))
    assert (finding.rule, "casts the answerer" in finding.message) == ("leakage", True)


@pytest.mark.parametrize(
    "question",
    ["Did you cook as a child would?", "Is a cook's hat of any use?", "As a rule, who pays?", "If you were late, why?"],
)
def test_harmless_questions_are_not(folder: Path, question: str):
    write_persona(folder, good_role(questions=(*good_role().questions[:39], question)))
    assert validate(load_catalog(folder)) == []


def test_a_prompt_that_asks_is_found(folder: Path):
    prompts = (*good_role().prompts[:4], filler("Who else but a cook? You answer", 60)[:200])
    write_persona(folder, good_role(prompts=prompts))
    [finding] = validate(load_catalog(folder))
    assert (finding.rule, finding.where) == ("leakage", "role cook: prompts[4]")


def test_prompts_of_one_persona_that_begin_alike_are_found(folder: Path):
    prompts = (*good_role().prompts[:4], filler("Number0, cook starts again", 80)[:200])
    write_persona(folder, good_role(prompts=prompts))
    [finding] = validate(load_catalog(folder))
    assert (finding.rule, finding.message) == ("openings", "begins like prompts[0]: 'number0 cook starts'")


def test_a_common_opening_is_found_over_all_prompts(folder: Path):
    for number in range(7):
        role = good_role(f"role{number}")
        same = filler(f"You are the same, number {number}x", 80)[:200]
        write_persona(folder, good_role(f"role{number}", prompts=(*role.prompts[:4], same)))
    found = [finding for finding in validate(load_catalog(folder)) if finding.where == "system prompts"]
    assert any("begin with 'you are the', at most 3%" in finding.message for finding in found)


def test_near_duplicates_within_and_across_are_told_apart(folder: Path):
    """Eleven words share 7 five-grams with twelve of which the last is new: 7 / 8 = 0.875, above both limits."""
    words = [f"w{number}" for number in range(12)]
    eleven, other = " ".join(words[:11]) + "?", " ".join([*words[:11], "new"]) + "?"
    nine = " ".join(words[:9]) + " x y?"  # shares 5 of 9 five-grams with `eleven`: 0.56
    write_persona(folder, good_role(questions=(*good_role().questions[:38], eleven, nine)))
    assert validate(load_catalog(folder)) == []
    write_persona(folder, good_role("smith", questions=(*good_role("smith").questions[:39], other)))
    [finding] = validate(load_catalog(folder))
    assert (finding.rule, finding.where) == ("duplicates", "role smith: questions[39]")
    assert "is like role cook: questions[38] (0.88)" in finding.message
    close = " ".join(words[:10]) + " x?"  # shares 6 of 8 with `eleven`: 0.75, too near for one persona only
    write_persona(folder, good_role("smith", questions=(*good_role("smith").questions[:39], close)))
    assert validate(load_catalog(folder)) == []
    write_persona(folder, good_role(questions=(*good_role().questions[:38], eleven, close)))
    write_persona(folder, good_role("smith"))
    [finding] = validate(load_catalog(folder))
    assert finding.where == "role cook: questions[39]"


def test_short_texts_are_duplicates_only_when_all_their_words_are_the_same(folder: Path):
    for question, found in (("Why does it rain?", 0), ("Does rain bother you.", 1), ("Does rain bother us?", 0)):
        write_persona(folder, good_role(questions=(*good_role().questions[:39], question)))
        assert len(validate(load_catalog(folder))) == found, question


WORDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9).map(" ".join)


@given(st.lists(WORDS, min_size=2, max_size=12, unique=True))
def test_the_index_finds_what_comparing_every_pair_finds(texts: list[str]):
    """Every text that is too like an earlier one is found once, and no other."""
    rows = [
        Text("question", f"role {'same' if i % 2 else 'other'}", f"questions[{i}]", text)
        for i, text in enumerate(texts)
    ]
    expected = set()
    for first, second in combinations(rows, 2):
        a, b = five_grams(first.text), five_grams(second.text)
        if len(a & b) / len(a | b) > (WITHIN if first.owner == second.owner else ACROSS):
            expected.add(second.where)
    found = [text.where for text, _, _ in near_duplicates(rows, WITHIN, ACROSS)]
    assert sorted(found) == sorted(expected)


def test_rules_can_be_skipped_and_must_exist(folder: Path):
    write_persona(folder, good_role(description="Short."))
    assert validate(load_catalog(folder), skip=["lengths"]) == []
    with pytest.raises(UsageError, match="no rule 'length'; the rules are counts"):
        validate(load_catalog(folder), skip=["length"])


def test_promises_are_checked_only_where_they_were_made(folder: Path):
    found = validate(load_catalog(folder), promised=True)
    assert [finding.message for finding in found if "roles" in finding.message] == ["2 roles, promised are 275"]
    assert set(rules(found)) == {"counts"}


def test_a_persona_is_checked_beside_a_catalog_it_is_not_in(folder: Path):
    catalog = load_catalog(folder)
    assert validate_persona(good_role("baker"), catalog) == []
    assert validate_persona(good_role(), catalog) == []  # replaces itself
    copy = good_role("baker", questions=(*good_role("baker").questions[:39], good_role("smith").questions[0]))
    [finding] = validate_persona(copy, catalog)
    assert (finding.rule, "role smith: questions[0]" in finding.message) == ("duplicates", True)
    beside = good_role("waiter", questions=(*good_role("waiter").questions[:39], "Is this one to be had twice?"))
    again = good_role("baker", questions=(*good_role("baker").questions[:39], "Is this one to be had twice?"))
    assert rules(validate_persona(again, catalog, beside=[beside])) == ["duplicates"]


def test_start_shares():
    prompts = ["You are the one", "you are the other", "Here I am now", "Here we go then"]
    assert start_shares(prompts) == (0.5, 1.0)
    assert start_shares([]) == (0.0, 0.0)


def test_stats_count_what_is_there(tmp_path: Path):
    stats = catalog_stats(load_catalog(write_small_catalog(tmp_path)))
    assert (stats.roles, stats.role_prompts, stats.role_questions, stats.rubrics) == (2, 3, 3, 2)
    assert (stats.traits, stats.trait_prompt_pairs, stats.trait_questions) == (1, 2, 2)
    assert (stats.questions, stats.default_prompts, stats.user_personas) == (2, 2, 1)
    assert (stats.topics, stats.openings, stats.scripts, stats.probes) == (2, 2, 1, 1)
    assert (stats.harm_categories, stats.harm_probes, stats.exemplars) == (1, 1, 1)
    assert stats.by_group["questions"] == {"everyday": 1, "values": 1}
    assert json.loads(json.dumps(stats.to_dict()))["same_start_share"] == pytest.approx(1 / 7)


def test_walk_passes_every_text_once(tmp_path: Path):
    texts = walk(load_catalog(write_small_catalog(tmp_path)))
    assert len({text.where for text in texts}) == len(texts)
    assert {text.kind for text in texts} == set(LENGTHS)
