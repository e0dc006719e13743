"""Catalog files from values: the format that ``catalog.parse`` reads, one text per line.

Used for imported, exported and generated catalogs. Reading what was written gives the same values.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from persona_axis.catalog.texts import Question, Role, Trait
from persona_axis.files.atomic import write_atomic


def write_persona(folder: Path, persona: Role | Trait) -> Path:
    """Write ``roles/<group>/<name>.toml`` or ``traits/<group>/<name>.toml`` in a catalog folder.

    StorageError if the disk refuses.
    """
    kind, text = ("roles", role_toml(persona)) if isinstance(persona, Role) else ("traits", trait_toml(persona))
    path = folder / kind / persona.group / f"{persona.name}.toml"
    write_atomic(path, text.encode())
    return path


def write_questions(folder: Path, questions: Iterable[Question]) -> None:
    """Write ``questions.toml``. StorageError if the disk refuses."""
    tables = [
        f"[[question]]\nid = {_text(q.id)}\ncategory = {_text(q.category)}\ntext = {_text(q.text)}\n" for q in questions
    ]
    write_atomic(folder / "questions.toml", "\n".join(tables).encode())


def write_default_prompts(folder: Path, prompts: Sequence[str]) -> None:
    """Write ``default_prompts.toml``. StorageError if the disk refuses."""
    write_atomic(folder / "default_prompts.toml", _row("prompts", prompts).encode())


def role_toml(role: Role) -> str:
    """The text of a role's file."""
    return "".join(
        (
            f"description = {_text(role.description)}\n",
            _row("prompts", role.prompts),
            _row("questions", role.questions),
            f"rubric = {_paragraphs(role.rubric)}\n",
        )
    )


def trait_toml(trait: Trait) -> str:
    """The text of a trait's file."""
    pairs = [
        f"\n[[pair]]\npositive = {_text(pair.positive)}\nnegative = {_text(pair.negative)}\n" for pair in trait.pairs
    ]
    return "".join(
        (
            f"description = {_text(trait.description)}\n",
            f"opposite = {_text(trait.opposite)}\n",
            _row("questions", trait.questions),
            f"evaluation = {_paragraphs(trait.evaluation)}\n",
            *pairs,
        )
    )


def _row(key: str, texts: Iterable[str]) -> str:
    lines = "".join(f"  {_text(text)},\n" for text in texts)
    return f"{key} = [\n{lines}]\n"


def _text(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped and JSON does not.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _paragraphs(text: str) -> str:
    """A multi-line string where it is safe: nothing in it that would need an escape."""
    plain = all(c == "\n" or c.isprintable() for c in text)
    return f'"""\n{text}\n"""' if plain and '"""' not in text and "\\" not in text and text[-1:] != '"' else _text(text)
