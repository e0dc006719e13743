"""Conversations in either layout: read, written, read again; what is wrong is named."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_axis.catalog.transcripts import (
    Transcript,
    read_transcript,
    read_transcripts,
    to_json,
    write_transcripts,
)
from persona_axis.errors import CatalogError, UsageError

MESSAGES = ({"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hail."})
FULL = Transcript(
    messages=MESSAGES,
    model="m",
    auditor_model="a",
    id="coding_p1_t2_3",
    domain="coding",
    user=1,
    persona="You are new here.",
    topic_id=2,
    topic="Ask about the build.",
    steering={"experiment_id": "x", "layers": [1, 2]},
    turns=1,
    extra={"note": ["kept", 3]},
)
TEXT = st.text(st.characters(exclude_categories=("Cs",)))
TRANSCRIPTS = st.builds(
    Transcript,
    messages=st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), min_size=1).map(tuple),
    model=st.none() | TEXT,
    id=st.none() | TEXT,
    user=st.none() | TEXT | st.integers(),
    topic_id=st.none() | TEXT | st.integers(),
    steering=st.none() | st.dictionaries(TEXT, TEXT),
    turns=st.none() | st.integers(),
    extra=st.dictionaries(TEXT.map(lambda key: f"x_{key}"), st.integers() | TEXT),
)


def test_the_keys_of_both_layouts():
    ours, reference = to_json(FULL), to_json(FULL, "reference")
    assert list(ours)[:4] == ["messages", "model", "auditor_model", "id"]
    assert (ours["user"], ours["steering"]["layers"], ours["note"]) == (1, [1, 2], ["kept", 3])
    assert set(reference) == {
        *("conversation", "model", "auditor_model", "conversation_id", "domain", "persona_id", "persona"),
        *("topic_id", "topic", "steering_config", "turns", "note"),
    }
    assert to_json(Transcript(MESSAGES)) == {"messages": list(MESSAGES)}


@pytest.mark.parametrize("layout", ["ours", "reference"])
@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
@given(st.lists(TRANSCRIPTS, min_size=1, max_size=3))
def test_what_is_written_comes_back(tmp_path_factory, name: str, layout, transcripts: list[Transcript]):
    path = tmp_path_factory.mktemp("t") / name
    write_transcripts(path, transcripts, layout)
    assert read_transcripts(path) == transcripts


@pytest.mark.parametrize(
    "value",
    [list(MESSAGES), {"messages": list(MESSAGES)}, {"conversation": list(MESSAGES)}, [{"messages": list(MESSAGES)}]],
)
def test_every_shape_is_read(tmp_path: Path, value: object):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(value))
    assert read_transcript(path).messages == MESSAGES
    lines = tmp_path / "t.jsonl"
    lines.write_text(json.dumps(value if isinstance(value, dict) else list(MESSAGES)) + "\n\n")
    assert read_transcript(lines).messages == MESSAGES


def test_a_folder_is_its_files_by_name(tmp_path: Path):
    write_transcripts(tmp_path / "b.json", [FULL])
    write_transcripts(tmp_path / "a.jsonl", [Transcript(MESSAGES, id="1"), Transcript(MESSAGES, id="2")])
    (tmp_path / "readme.txt").write_text("no conversation")
    assert [transcript.id for transcript in read_transcripts(tmp_path)] == ["1", "2", FULL.id]
    with pytest.raises(UsageError, match="holds 3 conversations where one is wanted"):
        read_transcript(tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, "expected a conversation or a list of messages, found a number"),
        ({}, "exactly one of 'messages' and 'conversation'"),
        ({"messages": [], "conversation": []}, "exactly one of"),
        ({"messages": []}, "expected a list of messages {role, content}, at least one"),
        ({"messages": [{"role": "user", "content": "a", "name": "x"}]}, "message 0: expected exactly the keys"),
        (
            {"messages": [*MESSAGES, {"role": "user", "content": None}]},
            "message 2: 'content' must be a text, found null",
        ),
        ({"messages": list(MESSAGES), "turns": "two"}, "'turns' cannot be a text"),
        ({"conversation": list(MESSAGES), "persona_id": True}, "'persona_id' cannot be a boolean"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, value: object, words: str):
    path = tmp_path / "t.jsonl"
    path.write_text("\n" + json.dumps(value))
    with pytest.raises(CatalogError, match=re.escape(f"{path}, line 2") + ".*" + re.escape(words)):
        read_transcripts(path)


def test_places_that_hold_none(tmp_path: Path):
    (tmp_path / "t.csv").write_text("")
    (tmp_path / "t.jsonl").write_text("\n")
    for name, words in (
        ("nowhere.json", "no such file or folder"),
        ("t.csv", "not from '.csv'"),
        ("t.jsonl", "holds no conversation"),
        (".", "holds no conversation"),
    ):
        with pytest.raises(UsageError, match=words):
            read_transcripts(tmp_path / name)
    with pytest.raises(UsageError, match=r"not to '\.csv'"):
        write_transcripts(tmp_path / "t.csv", [FULL])
