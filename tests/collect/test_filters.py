"""The filter, its fallback, and who is dropped, on counts made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_axis.collect.cells import UNJUDGED, Row, ShardCells, counts, verdict_class
from persona_axis.collect.filters import CLASSES, FILTERS, Applied, Kind, apply_filter, check_filter
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.verdicts import Verdict
from persona_axis.errors import FitError, UsageError

Classes = dict[str, list[int]]  # persona -> the class of each of its rollouts


def cells_of(classes: Classes, n_blocks: int = 4) -> list[ShardCells]:
    """A shard per persona, its rollouts dealt over the blocks."""
    return [
        ShardCells(i, False, [p] * len(c), [n % n_blocks for n in range(len(c))], c, [1] * len(c))
        for i, (p, c) in enumerate(classes.items())
    ]


def applied(classes: Classes, name: str = "auto", kind: Kind | None = "evidence", **options: object) -> Applied:
    given = {DEFAULT: [0] * 12, **classes}
    settings = {"min_count": 3, "paper": False, **options}
    return apply_filter(cells_of(given), list(given), 4, name, kind, **settings)  # type: ignore[arg-type]


def stays(result: Applied) -> list[str]:
    return [row.persona for row in result.table]


# ---- classes and counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "threshold", "expected"),
    [
        (Verdict("k", "ok", evidence=0.2), 0.1, 1),
        (Verdict("k", "ok", evidence=0.1), 0.1, 0),  # above, not at
        (Verdict("k", "ok", evidence=-1.0), 0.1, 0),
        (Verdict("k", "ok", score=0), None, 0),
        (Verdict("k", "ok", score=3), None, 3),
        (Verdict("k", "ok"), None, UNJUDGED),  # the default persona under an LLM judge
        (Verdict("k", "ok"), 0.1, UNJUDGED),
        (Verdict("k", "failed"), 0.1, UNJUDGED),
        (Verdict("k", "failed", evidence=9.0), 0.1, UNJUDGED),
    ],
)
def test_the_class_of_a_verdict(verdict: Verdict, threshold: float | None, expected: int) -> None:
    assert verdict_class(verdict, threshold) == expected


entries = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(-1, 3), st.integers(0, 5)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(entries, st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, (1,), (2, 3), (-1, 0)])), min_size=1))
def test_counts_add_up_what_a_row_takes(
    given_entries: list[tuple[str, int, int, int]], wanted: list[tuple[str, tuple[int, ...] | None]]
) -> None:
    half = len(given_entries) // 2
    shards = [
        ShardCells(i, True, *([list(column) for column in zip(*part, strict=True)] if part else [[], [], [], []]))
        for i, part in enumerate((given_entries[:half], given_entries[half:]))
    ]
    rows = [Row(p, None if classes is None else frozenset(classes)) for p, classes in wanted]
    table = counts(shards, rows, 4)
    assert table.shape == (len(rows), 4)
    for i, (persona, classes) in enumerate(wanted):
        for block in range(4):
            expected = sum(
                n for p, b, c, n in given_entries if p == persona and b == block and (classes is None or c in classes)
            )
            assert table[i, block] == expected


# ---- which filter ------------------------------------------------------------------------------------------------

GOOD, BAD = [1, 1, 1, 0], [1, 0, 0, 0]


def test_auto_takes_what_the_judge_gives() -> None:
    roles = {name: [1, 1, 1, 0] for name in "abc"}
    assert applied(roles).name == "expressed"
    assert applied({name: [3, 3, 3, 1] for name in "abc"}, kind="score").name == "score==3"
    unjudged = applied({name: [-1] * 4 for name in "abc"}, kind=None)
    assert (unjudged.name, unjudged.note, unjudged.dropped) == ("none", "", [])


def test_auto_falls_back_when_fewer_than_half_of_the_roles_stay() -> None:
    six = {"a": GOOD, "b": GOOD, "c": GOOD, "d": BAD, "e": BAD, "f": BAD}
    half = applied(six)
    assert (half.name, half.note) == ("expressed", "")
    assert stays(half) == [DEFAULT, "a", "b", "c"]
    fewer = applied({**six, "g": BAD})
    assert fewer.name == "none"
    assert fewer.note == ("expressed kept at least 3 rollouts for only 3 of 7 roles, so the filter fell back to none")
    assert len(stays(fewer)) == 8


def test_auto_falls_back_one_step_only() -> None:
    two_threes = {name: [2, 2, 3, 0] for name in "abcde"}
    result = applied(two_threes, kind="score")
    assert result.name == "score>=2"
    assert "score==3 kept" in result.note
    with pytest.raises(FitError, match="With filter 'score>=2' only 0 roles"):
        applied({name: [1, 1, 1, 0] for name in "abcde"}, kind="score")


def test_a_filter_that_was_asked_for_does_not_fall_back() -> None:
    with pytest.raises(FitError, match="With filter 'expressed' only 1 roles keep 3 rollouts"):
        applied({"a": GOOD, "b": BAD, "c": BAD, "d": BAD}, "expressed")
    assert applied({"a": GOOD, "b": BAD, "c": BAD, "d": BAD}, "none").name == "none"


def test_dropped_roles_are_named_with_their_reason() -> None:
    result = applied({"a": GOOD, "b": BAD, "c": GOOD, "d": GOOD, "e": [0, 0]}, "expressed")
    assert [(role.name, role.reason) for role in result.dropped] == [
        ("b", "1 of 4 rollouts pass 'expressed'; at least 3 are needed"),
        ("e", "0 of 2 rollouts pass 'expressed'; at least 3 are needed"),
    ]
    assert stays(result) == [DEFAULT, "a", "c", "d"]


def test_every_default_rollout_counts_whatever_its_verdict() -> None:
    result = apply_filter(
        cells_of({DEFAULT: [0, -1, 1], "a": GOOD, "b": GOOD, "c": GOOD}),
        [DEFAULT, "a", "b", "c"],
        4,
        "expressed",
        "evidence",
        3,
        False,
    )
    assert result.table[0] == Row(DEFAULT)
    with pytest.raises(FitError, match="The default persona has only 3 rollouts; at least 4 are needed"):
        apply_filter(cells_of({DEFAULT: [0, -1, 1]}), [DEFAULT], 4, "none", None, 4, False)


def test_too_few_roles_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(FitError, match=r"only 2 roles keep 3 rollouts; an axis needs at least 3\. Use a looser"):
        applied({"a": GOOD, "b": GOOD}, "expressed")


# ---- the paper's second vector -----------------------------------------------------------------------------------


def test_the_paper_adds_partial_vectors_to_the_space_only() -> None:
    roles = {"a": [3] * 4 + [2] * 3, "b": [3] * 4 + [2] * 2, "c": [3] * 4, "d": [2] * 9}
    result = applied(roles, "score==3", "score", paper=True)
    assert stays(result) == [DEFAULT, "a", "b", "c", "a"]
    partial = result.table[-1]
    assert (partial.classes, partial.in_axis, partial.in_space) == (frozenset({2}), False, True)
    assert all(row.in_axis and row.in_space for row in result.table[:-1])
    assert [role.name for role in result.dropped] == ["d"]  # a role without full vectors has no partial one


@pytest.mark.parametrize(("name", "kind"), [("score>=2", "score"), ("none", "score"), ("expressed", "evidence")])
def test_other_filters_have_no_partial_vectors(name: str, kind: Kind) -> None:
    roles = {role: [1] * 3 + [2] * 3 + [3] * 3 for role in "abc"}
    assert stays(applied(roles, name, kind, paper=True)) == [DEFAULT, "a", "b", "c"]


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("score>2", "score", "Unknown filter 'score>2'; choose from auto, none"),
        ("expressed", "score", "'expressed' needs --judge likelihood"),
        ("expressed", None, "'expressed' needs --judge likelihood"),
        ("score==3", "evidence", "'score==3' needs an LLM judge"),
        ("score>=2", None, "'score>=2' needs an LLM judge"),
    ],
)
def test_filters_without_their_verdicts_are_refused(name: str, kind: Kind | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_filter(name, kind)


def test_every_filter_is_allowed_somewhere() -> None:
    assert set(CLASSES) == set(FILTERS) - {"auto"}
    kinds: tuple[Kind | None, ...] = ("evidence", "score", None)
    for name in FILTERS:
        accepted = 0
        for kind in kinds:
            try:
                check_filter(name, kind)
            except UsageError:
                continue
            accepted += 1
        assert accepted == (3 if name in ("auto", "none") else 1)
