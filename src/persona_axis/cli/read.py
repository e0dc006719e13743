"""``read``: where each turn of a conversation lies on an axis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app
from persona_axis.errors import UsageError


@app.command()
def read(
    conversation: Annotated[Path, typer.Argument(help="JSON: a list of {role, content}, or {conversation: [...]}.")],
    axis: Annotated[Path, typer.Option(help="A run folder or an axis file.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'embedded'.")] = "embedded",
    layer: Annotated[int | None, typer.Option(help="Decoder block; the axis's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per turn.")] = False,
) -> None:
    """Project every message of a conversation on an axis (higher = more like the Assistant)."""
    from persona_axis.geometry.axis import Axis
    from persona_axis.model.loading import load_model
    from persona_axis.model.reading import read_conversation

    found = Axis.load(axis)
    found.at(layer)
    messages = _messages(conversation)
    wanted = found.layer if layer is None else layer
    for turn in read_conversation(load_model(model, dtype=dtype, device=device), messages, [wanted]):
        value = float(found.project(turn.activation[0], wanted))
        if as_json:
            row = {"message": turn.message, "role": turn.role, "part": turn.part, "tokens": turn.n_tokens}
            typer.echo(json.dumps({**row, "projection": value}))
        else:
            typer.echo(f"{turn.message:>4} {turn.role:<10} {turn.part:<9} {turn.n_tokens:>5} tokens {value:>+10.2f}")


def _messages(path: Path) -> list[dict[str, str]]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as e:  # ValueError: no JSON, or no UTF-8
        raise UsageError(f"Cannot read a conversation from {path}: {e}") from e
    messages = data.get("conversation") if isinstance(data, dict) else data
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise UsageError(f"{path} holds no list of messages {{role, content}}.")
    return messages
