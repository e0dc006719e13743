"""``catalog``: what the roles and questions are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app

catalog_app = typer.Typer(no_args_is_help=True, help="The roles and questions.")
app.add_typer(catalog_app, name="catalog")

Folder = Annotated[Path | None, typer.Option(help="A catalog folder; the embedded one by default.")]


@catalog_app.command("list")
def list_roles(catalog: Folder = None) -> None:
    """Roles by group."""
    from persona_axis.catalog.catalog import load_catalog

    for group, names in load_catalog(catalog).groups.items():
        typer.echo(f"{group} ({len(names)}): {', '.join(names)}")


@catalog_app.command()
def show(role: str, catalog: Folder = None) -> None:
    """One role: prompts, own questions, rubric."""
    from persona_axis.catalog.catalog import load_catalog

    r = load_catalog(catalog).role(role)
    typer.echo(f"{r.name} ({r.group}): {r.description}\n")
    for i, prompt in enumerate(r.prompts):
        typer.echo(f"prompt {i}: {prompt}\n")
    for question in r.questions:
        typer.echo(f"- {question}")
    typer.echo(f"\n{r.rubric}")
