"""Conversations in files: the one reader and writer, for our layout and the reference's.

What is read:

- ``.json``: a list of messages ``{role, content}``; one transcript; or a list of transcripts.
- ``.jsonl``: one transcript (or list of messages) per line.
- a folder: every ``.json`` and ``.jsonl`` file in it, by name.

A transcript is an object. Ours holds ``messages`` and, optionally, the fields of `Transcript`. The reference's holds
``conversation`` and calls some fields otherwise (`_REFERENCE_KEYS`). Keys that neither knows are kept and written
back. Writing what was read gives the same values, in either layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from persona_axis.catalog.fields import kind_of, read_json, read_jsonl
from persona_axis.errors import CatalogError, UsageError
from persona_axis.files.atomic import write_json, write_json_lines

Message = dict[str, str]  # {"role": ..., "content": ...}
Layout = Literal["ours", "reference"]

_REFERENCE_KEYS = {
    "messages": "conversation",
    "id": "conversation_id",
    "user": "persona_id",
    "steering": "steering_config",
}


@dataclass(frozen=True, slots=True)
class Transcript:
    """One conversation and where it came from.

    Attributes:
        messages: ``{"role", "content"}`` in order, roles as the chat template names them.
        model: who answered; `auditor_model`: who played the user.
        id: of the conversation.
        domain, user, persona, topic_id, topic: the drift set-up: the user's name (a number in the reference's
            files) and persona text, and what they wanted.
        steering: how the model was held or steered, as its writer put it.
        turns: as its writer counted them: the reference's files count messages or exchanges.
        extra: every other key.
    """

    messages: tuple[Message, ...]
    model: str | None = None
    auditor_model: str | None = None
    id: str | None = None
    domain: str | None = None
    user: str | int | None = None
    persona: str | None = None
    topic_id: str | int | None = None
    topic: str | None = None
    steering: Mapping[str, Any] | None = None
    turns: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "auditor_model", "id", "domain", "persona", "topic"), (str,)),
    **dict.fromkeys(("user", "topic_id"), (str, int)),
    "steering": (dict,),
    "turns": (int,),
}


def read_transcripts(path: Path | str) -> list[Transcript]:
    """Every transcript of a file or folder, in order.

    UsageError if there is none, or the suffix is unknown; CatalogError naming file, line and field if the content
    breaks the format.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        found = [transcript for file in files for transcript in read_transcripts(file)]
    elif not path.is_file():
        raise UsageError(f"{path}: no such file or folder")
    elif path.suffix == ".jsonl":
        found = [_transcript(where, value) for where, value in read_jsonl(path)]
    elif path.suffix == ".json":
        found = _from_json(path)
    else:
        raise UsageError(f"{path}: conversations are read from .json, .jsonl or a folder, not from '{path.suffix}'")
    if not found:
        raise UsageError(f"{path}: holds no conversation")
    return found


def read_transcript(path: Path | str) -> Transcript:
    """The only transcript of a file. UsageError if there are several; else as `read_transcripts`."""
    found = read_transcripts(path)
    if len(found) > 1:
        raise UsageError(f"{path}: holds {len(found)} conversations where one is wanted")
    return found[0]


def write_transcripts(path: Path | str, transcripts: Sequence[Transcript], layout: Layout = "ours") -> None:
    """Write ``.jsonl`` (one per line), or ``.json`` (an object for one transcript, a list for several).

    UsageError for another suffix, StorageError if the disk refuses. Fields that are None are left out.
    """
    path = Path(path)
    tables = [to_json(transcript, layout) for transcript in transcripts]
    if path.suffix == ".jsonl":
        write_json_lines(path, tables)
    elif path.suffix == ".json":
        write_json(path, tables[0] if len(tables) == 1 else tables)
    else:
        raise UsageError(f"{path}: conversations are written to .json or .jsonl, not to '{path.suffix}'")


def to_json(transcript: Transcript, layout: Layout = "ours") -> dict[str, Any]:
    """The object that stands for a transcript in a file."""
    table: dict[str, Any] = {}
    for name in (f.name for f in fields(Transcript) if f.name != "extra"):
        value = getattr(transcript, name)
        if value is not None:
            key = _REFERENCE_KEYS.get(name, name) if layout == "reference" else name
            table[key] = list(value) if name == "messages" else value
    return table | dict(transcript.extra)


def _from_json(path: Path) -> list[Transcript]:
    value = read_json(path)
    if isinstance(value, list) and value and not _is_message(value[0]):
        return [_transcript(f"{path}, item {number}", item) for number, item in enumerate(value, start=1)]
    return [_transcript(str(path), value)]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value


def _transcript(where: str, value: Any) -> Transcript:
    if isinstance(value, list):
        return Transcript(_messages(where, value))
    if not isinstance(value, dict):
        raise CatalogError(f"{where}: expected a conversation or a list of messages, found {kind_of(value)}")
    table = dict(value)
    reference = "conversation" in table
    if reference == ("messages" in table):
        raise CatalogError(f"{where}: needs exactly one of 'messages' and 'conversation'")
    keys = _REFERENCE_KEYS if reference else {}
    messages = _messages(where, table.pop(keys.get("messages", "messages")))
    known = {name: table.pop(keys.get(name, name), None) for name in _TYPES}
    for name, found in known.items():
        if found is not None and (not isinstance(found, _TYPES[name]) or isinstance(found, bool)):
            raise CatalogError(f"{where}: '{keys.get(name, name)}' cannot be {kind_of(found)}")
    return Transcript(messages, **known, extra=table)


def _messages(where: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise CatalogError(f"{where}: expected a list of messages {{role, content}}, at least one")
    for number, item in enumerate(value):
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise CatalogError(f"{where}, message {number}: expected exactly the keys role and content")
        for key in ("role", "content"):
            if not isinstance(item[key], str):
                raise CatalogError(f"{where}, message {number}: '{key}' must be a text, found {kind_of(item[key])}")
    return tuple(dict(item) for item in value)
