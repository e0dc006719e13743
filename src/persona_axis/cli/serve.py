"""Serving a model that is held: ``persona-axis vllm``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app


@app.command(
    "vllm",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def vllm(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model to serve: a Hub id, a folder, or 'embedded'.")],
    policies: Annotated[
        Path | None, typer.Option(help="Policy folder, or a folder of them; each is named after its folder.")
    ] = None,
    default: Annotated[
        str | None, typer.Option(help="Policy of requests that name none. By default such requests run without.")
    ] = None,
    max_policies: Annotated[int | None, typer.Option(help="Policies the bank has room for (8).")] = None,
    max_directions: Annotated[int | None, typer.Option(help="Directions of a policy at a layer (1).")] = None,
    max_captures: Annotated[int | None, typer.Option(help="Requests captured at one time (64).")] = None,
    allow_model: Annotated[
        str | None, typer.Option(help="Name of the served model, to hold it with policies made for another one.")
    ] = None,
) -> None:
    """Serve a model with vLLM's OpenAI-compatible server, held by policies.

    Every other option goes to `vllm serve` as it is. The port opens only when every worker has said that all layers of
    the model are held with these policies.
    """
    from persona_axis.model.loading import where_to_load
    from persona_axis.serve.vllm.launch import serve
    from persona_axis.serve.vllm.options import PREFIX, Options

    source, name = where_to_load(model)
    given = {
        "POLICIES": policies,
        "DEFAULT": default,
        "MAX_POLICIES": max_policies,
        "MAX_DIRECTIONS": max_directions,
        "MAX_CAPTURES": max_captures,
        "ALLOW_MODEL": allow_model,
        "MODEL_NAME": os.environ.get(f"{PREFIX}MODEL_NAME") or name,
    }
    os.environ.update({PREFIX + key: str(value) for key, value in given.items() if value is not None})
    Options.from_environment().policy_folders()  # a mistake is said before anything is loaded
    serve([source, *context.args])
