"""Figures on disk: there as soon as they are made, the same after a kill, never another configuration's."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_axis.errors import NonFiniteError, RunConflict, StorageError
from persona_axis.study.ledger import PLAIN, Ledger
from persona_axis.study.measures import NeutralFigure, ReplyFigure

REPLIES = [ReplyFigure("a", (1, 2), 0.1 + 0.2, -3.25), ReplyFigure("b", (), None, 0.0)]
NEUTRAL = [NeutralFigure("n", 7, -3.1, -3.2, 6.0, 1e-17)]


def filled(path: Path) -> Path:
    ledger = Ledger(path, "config")
    ledger.add(PLAIN, replies=REPLIES)
    ledger.add("hash", replies=REPLIES[:1])
    ledger.add("hash", neutral=NEUTRAL)
    ledger.close()
    return path


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    ledger = Ledger(filled(tmp_path / "j"), "config")
    assert ledger.replies == {PLAIN: {"a": REPLIES[0], "b": REPLIES[1]}, "hash": {"a": REPLIES[0]}}
    assert ledger.neutral == {PLAIN: {}, "hash": {"n": NEUTRAL[0]}}


def test_it_is_there_at_once(tmp_path: Path) -> None:
    """Without a close, as after a kill; and in the ledger that added it."""
    ledger = Ledger(tmp_path / "j", "config")
    ledger.add("hash", replies=REPLIES, neutral=NEUTRAL)
    other = Ledger(tmp_path / "j", "config")
    assert ledger.replies == other.replies == {"hash": {r.key: r for r in REPLIES}}
    assert ledger.neutral == other.neutral == {"hash": {"n": NEUTRAL[0]}}


def test_what_is_missing_is_by_policy(tmp_path: Path) -> None:
    ledger = Ledger(filled(tmp_path / "j"), "config")
    assert ledger.missing_replies(PLAIN, ["c", "a", "b"]) == ["c"]
    assert ledger.missing_replies("hash", ["b", "a"]) == ["b"]
    assert ledger.missing_neutral("hash", ["n", "m"]) == ["m"]
    assert ledger.missing_neutral(PLAIN, ["n"]) == ["n"]
    assert ledger.missing_replies("other", ["a"]) == ["a"]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_record_torn_by_a_kill_is_measured_again(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path / "j")
    path.write_bytes(path.read_bytes()[:-cut])
    ledger = Ledger(path, "config")
    assert ledger.missing_neutral("hash", ["n"]) == ["n"]
    assert ledger.missing_replies("hash", ["a"]) == []
    ledger.add("hash", neutral=NEUTRAL)
    ledger.close()
    assert Ledger(path, "config").neutral["hash"] == {"n": NEUTRAL[0]}


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = filled(tmp_path / "j")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StorageError, match="j"):
        Ledger(path, "config")


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunConflict, match="another configuration"):
        Ledger(filled(tmp_path / "j"), "other")


def test_a_figure_that_is_no_number_is_not_kept(tmp_path: Path) -> None:
    ledger = Ledger(filled(tmp_path / "j"), "config")
    with pytest.raises(NonFiniteError):
        ledger.add("hash", replies=[ReplyFigure("c", (1,), float("nan"), -1.0)])
    assert ledger.missing_replies("hash", ["c"]) == ["c"]
