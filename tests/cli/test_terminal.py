"""Words wrapped as they come."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_axis.cli.terminal import Wrapped

SENTENCES = st.lists(st.text(alphabet="ab ", max_size=12), max_size=20)


def written(capsys: pytest.CaptureFixture[str], pieces: list[str], columns: int | None) -> str:
    capsys.readouterr()
    wrapped = Wrapped(columns)
    for piece in pieces:
        wrapped.write(piece)
    wrapped.finish()
    return capsys.readouterr().out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SENTENCES, st.integers(12, 30))
def test_no_line_is_too_long_and_no_word_is_lost(
    capsys: pytest.CaptureFixture[str], pieces: list[str], columns: int
) -> None:
    pieces = [piece[:11] + " " for piece in pieces]
    out = written(capsys, pieces, columns)
    assert out.split() == "".join(pieces).split()
    assert all(len(line) <= columns for line in out.splitlines())


def test_lines_and_long_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert written(capsys, ["\n a", "b c", "\n\n", "  d e f"], 6) == "ab c\n\n  d e\nf\n"
    assert written(capsys, ["ab ", "x" * 7, "xx", " y z"], 4) == "ab\nxxxxxxxxx y\nz\n"
    assert written(capsys, ["한국 한국"], 8) == "한국\n한국\n"
    assert written(capsys, ["\n one long line\n", "of text"], None) == "one long line\nof text\n"
    assert written(capsys, ["", " \n"], 9) == ""
