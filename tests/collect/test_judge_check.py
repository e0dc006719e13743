"""The comparison with labels against counting by hand, and the label file."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_axis.collect import judge_check
from persona_axis.collect.judge_check import JudgeCheck, LabelledReply, check_judge, read_labels
from persona_axis.collect.verdicts import Verdict
from persona_axis.errors import UsageError

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared/reference/judged_rollouts.jsonl"

ROW = {"role": "bard", "system_prompt": "Be a bard.", "question": "Why?", "response": "La!", "score": 2}


def labels_of(scores: Sequence[int]) -> list[LabelledReply]:
    return [LabelledReply(f"k{index}", "bard", "", "Why?", "La!", score) for index, score in enumerate(scores)]


def evidence_of(values: Sequence[float | None]) -> list[Verdict]:
    return [
        Verdict(f"k{index}", "failed") if value is None else Verdict(f"k{index}", "ok", evidence=value)
        for index, value in enumerate(values)
    ]


def check(scores: Sequence[int], values: Sequence[float | None], cut: float = 0.5) -> JudgeCheck:
    return check_judge(
        labels_of(scores),
        evidence_of(values),
        passed=lambda verdict: (verdict.evidence or 0) > cut,
        seed=1,
    )


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_check, "DRAWS", 20)


def pairwise_auc(scores: Sequence[int], values: Sequence[float], cut: int) -> float:
    """The share of pairs (one label at or above the cut, one below) ranked rightly; ties count half."""
    pairs = [
        (high, low)
        for (label, high), (other, low) in itertools.product(zip(scores, values, strict=True), repeat=2)
        if label >= cut > other
    ]
    return sum(1.0 if high > low else 0.5 if high == low else 0.0 for high, low in pairs) / len(pairs)


@pytest.mark.usefixtures("few_draws")
def test_auc_is_the_share_of_pairs_ranked_rightly() -> None:
    random = np.random.default_rng(3)
    for _ in range(5):
        scores = [*random.integers(0, 4, size=25).tolist(), 1, 3]
        values = random.integers(0, 6, size=27).tolist()  # with ties
        found = check(scores, values)
        assert found.auc_fully is not None
        assert found.auc_some is not None
        assert found.auc_fully.value == pytest.approx(pairwise_auc(scores, values, 3))
        assert found.auc_some.value == pytest.approx(pairwise_auc(scores, values, 2))


@pytest.mark.usefixtures("few_draws")
def test_kappa_by_hand() -> None:
    # label >= 2: 5 of 10. passed: 4 of them and 2 of the others. Agreement 0.7, by chance 0.5: kappa 0.4.
    found = check([3, 3, 2, 2, 2, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0, 0, 0])
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(0.4)
    assert found.columns == ("dropped", "passed")
    assert found.confusion == ((2, 0), (1, 2), (1, 2), (0, 2))


def test_intervals_hold_the_value_and_repeat_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_check, "DRAWS", 150)
    scores = [0, 1, 1, 1, 2, 2, 3, 3] * 4
    values = [0.1, 0.3, 0.2, 0.6, 0.5, 0.4, 0.9, 0.7] * 4
    found = check(scores, values)
    assert found == check(scores, values)
    for interval in (found.auc_fully, found.auc_some, found.kappa):
        assert interval is not None
        assert interval.low <= interval.value <= interval.high
    assert found.auc_some is not None
    assert 0.02 < found.auc_some.high - found.auc_some.low < 0.5


@pytest.mark.usefixtures("few_draws")
def test_a_perfect_judge_and_a_reversed_one() -> None:
    scores = [0, 1, 2, 3]
    perfect, reversed_ = check(scores, [0.0, 0.1, 0.8, 0.9]), check(scores, [0.9, 0.8, 0.1, 0.0])
    assert perfect.auc_some is not None
    assert reversed_.auc_some is not None
    assert (perfect.auc_some.value, perfect.auc_some.low, perfect.auc_some.high) == (1.0, 1.0, 1.0)
    assert reversed_.auc_some.value == 0.0
    assert perfect.kappa is not None
    assert perfect.kappa.value == 1.0


@pytest.mark.usefixtures("few_draws")
@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-1, 1), st.booleans()), min_size=1, max_size=12))
def test_failed_verdicts_change_nothing_but_the_count(rows: list[tuple[int, float, bool]]) -> None:
    scores = [score for score, _, _ in rows]
    found = check(scores, [None if failed else value for _, value, failed in rows])
    kept = [(score, value) for score, value, failed in rows if not failed]
    alone = check([score for score, _ in kept], [value for _, value in kept])
    assert found.n == len(rows)
    assert found.failed == len(rows) - len(kept)
    assert (found.auc_fully, found.auc_some, found.kappa) == (alone.auc_fully, alone.auc_some, alone.kappa)
    assert found.confusion == alone.confusion
    assert sum(map(sum, found.confusion)) == len(kept)


def test_passed_is_not_asked_about_failed_verdicts() -> None:
    def passed(verdict: Verdict) -> bool:
        assert verdict.status == "ok"
        return True

    check_judge(labels_of([1, 1]), evidence_of([0.1, None]), passed=passed, seed=0)


@pytest.mark.usefixtures("few_draws")
def test_scores_are_compared_score_by_score() -> None:
    verdicts = [Verdict(f"k{index}", "ok", score=score) for index, score in enumerate([0, 1, 3, 3])]
    found = check_judge(labels_of([0, 1, 2, 3]), verdicts, passed=lambda verdict: verdict.score == 3, seed=0)
    assert found.columns == ("0", "1", "2", "3")
    assert found.confusion == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1), (0, 0, 0, 1))
    assert found.auc_fully is not None
    assert found.auc_fully.value == pytest.approx(5 / 6)  # of three pairs two are right and one is tied


@pytest.mark.usefixtures("few_draws")
def test_one_sided_labels_are_undefined_not_a_number() -> None:
    found = check([1, 2, 2], [0.1, 0.2, 0.3])
    assert found.auc_fully is None
    assert found.auc_some is not None
    nothing = check([1, 2], [None, None])
    assert (nothing.auc_some, nothing.kappa, nothing.failed) == (None, None, 2)
    assert "undefined" in nothing.render()


@pytest.mark.usefixtures("few_draws")
def test_render_and_to_dict() -> None:
    found = check([0, 1, 2, 3, 3], [0.1, 0.2, 0.8, 0.9, None])
    assert json.loads(json.dumps(found.to_dict()))["auc_some"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    lines = found.render().splitlines()
    assert lines[0] == "5 labelled replies, 1 without a verdict (left out)"
    assert "1.00  [1.00, 1.00]" in lines[2]
    assert [line.split() for line in lines[-5:]] == [
        ["label", "dropped", "passed"],
        ["0", "1", "0"],
        ["1", "1", "0"],
        ["2", "0", "1"],
        ["3", "0", "1"],
    ]


def test_verdicts_of_other_replies_are_refused() -> None:
    labels = labels_of([1, 2])
    ok = Verdict("k0", "ok", evidence=0.1)
    for verdicts, words in [
        ([ok], "differ in 1 keys, such as 'k1'"),
        ([ok, Verdict("k1", "ok", evidence=0.1), Verdict("other", "failed")], "'other'"),
        ([ok, ok], "twice"),
        ([ok, Verdict("k1", "ok", score=2)], "different judges"),
        ([ok, Verdict("k1", "ok", detail="default persona")], "neither evidence nor a score"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_judge(labels, verdicts, passed=lambda _: True, seed=0)


# --- the label file ---


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "labels.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_labels_are_read_with_their_lines_as_keys(tmp_path: Path) -> None:
    path = write(tmp_path, ROW, "", {**ROW, "score": 0, "why": "no\u2028song", "annotator": "x", "response": ""})
    first, second = read_labels(path)
    assert first == LabelledReply("label-1", "bard", "Be a bard.", "Why?", "La!", 2, "")
    assert (second.key, second.score, second.why) == ("label-3", 0, "no\u2028song")
    exchange = first.exchange("3: sings")
    assert (exchange.key, exchange.persona, exchange.rubric, exchange.reply) == (
        "label-1",
        "bard",
        "3: sings",
        "La!",
    )
    assert exchange.system_prompt == "Be a bard."


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ({**ROW, "score": 4}, "line 2: score must be 0, 1, 2 or 3, not 4"),
        ({**ROW, "score": 2.0}, "line 2: score"),
        ({**ROW, "score": True}, "line 2: score"),
        ({**ROW, "score": "2"}, "line 2: score"),
        ({**ROW, "role": " "}, "line 2: role is empty"),
        ({**ROW, "response": None}, "line 2: response must be text, not None"),
        ({**ROW, "why": 3}, "line 2: why must be text"),
        ({name: value for name, value in ROW.items() if name != "question"}, "line 2: question .* missing"),
        ({name: value for name, value in ROW.items() if name != "score"}, "line 2: score"),
    ],
)
def test_a_bad_row_names_line_and_field(tmp_path: Path, bad: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_labels(write(tmp_path, ROW, bad))


def test_files_that_are_no_label_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no labelled replies"):
        read_labels(write(tmp_path, "", ""))
    with pytest.raises(UsageError, match="cannot be read"):
        read_labels(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_labels(tmp_path / "binary")


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference labels are not part of the project")
def test_the_reference_labels_are_read() -> None:
    labels = read_labels(REFERENCE)
    assert len(labels) == len(REFERENCE.read_text(encoding="utf-8").splitlines()) > 100
    assert {label.score for label in labels} <= {0, 1, 2, 3}
    assert all(label.why for label in labels)
