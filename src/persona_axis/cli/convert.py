"""``convert``: axes and policies from and to other people's formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app


@app.command("convert")
def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="axis.pt, capping_config.pt, a folder of persona vectors, a control vector .gguf, an axis file or run "
            "folder, or a policy folder."
        ),
    ],
    to: Annotated[str, typer.Option(help="persona-axis, reference (.pt) or gguf (llama.cpp control vector).")],
    out: Annotated[Path, typer.Option(help="A new file; for a policy of ours a new folder.")],
    experiment: Annotated[
        str | None, typer.Option(help="Of a capping configuration: the one to read, or the id to write.")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="The model that a foreign file belongs to; it does not say so itself.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of that model, when known.")] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="An imported axis's analysed layer; or where an axis is added as a control vector (10-20)."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Of an axis as a control vector: residual-stream units, + toward the Assistant."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of an exported axis.pt: float32 (default), or bfloat16 as the reference's.")
    ] = None,
    model_hint: Annotated[
        str | None, typer.Option(help="Of a control vector: llama.cpp's name of the architecture, e.g. qwen3.")
    ] = None,
) -> None:
    """Read an axis or a policy of one format and write it in another."""
    from persona_axis.cli.run import parse_integers
    from persona_axis.steering.convert import Request, convert

    layers = parse_integers("--layer", layer)
    request = Request(experiment, model_id, revision, layers, strength, dtype, model_hint)
    typer.echo(convert(source, to, out, request).render())
