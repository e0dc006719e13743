"""``read``: where each turn of a conversation lies on an axis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app


@app.command()
def read(
    conversation: Annotated[
        Path, typer.Argument(help=".json or .jsonl: messages {role, content}, or transcripts; or a folder of them.")
    ],
    axis: Annotated[Path, typer.Option(help="A run folder or an axis file.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'embedded'.")] = "embedded",
    layer: Annotated[int | None, typer.Option(help="Decoder block; the axis's own by default.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per turn.")] = False,
) -> None:
    """Project every message of conversations on an axis (higher = more like the Assistant)."""
    from persona_axis.catalog.transcripts import read_transcripts
    from persona_axis.geometry.axis import Axis
    from persona_axis.model.loading import load_model
    from persona_axis.model.reading import read_conversation

    found = Axis.load(axis)
    found.at(layer)
    transcripts = read_transcripts(conversation)
    wanted = found.layer if layer is None else layer
    chat = load_model(model, dtype=dtype, device=device)
    for number, transcript in enumerate(transcripts):
        if len(transcripts) > 1 and not as_json:
            typer.echo(f"conversation {number}" + (f": {transcript.topic}" if transcript.topic else ""))
        for turn in read_conversation(chat, transcript.messages, [wanted]):
            value = float(found.project(turn.activation[0], wanted))
            if as_json:
                row = {"message": turn.message, "role": turn.role, "part": turn.part, "tokens": turn.n_tokens}
                typer.echo(json.dumps({"conversation": number, **row, "projection": value}))
            else:
                typer.echo(
                    f"{turn.message:>4} {turn.role:<10} {turn.part:<9} {turn.n_tokens:>5} tokens {value:>+10.2f}"
                )
