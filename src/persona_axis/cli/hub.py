"""``push`` and ``pull``: an axis and its policy on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app

Repo = Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face Hub.", show_default=False)]


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A run folder, or the folder of a policy.", show_default=False)],
    repo: Repo,
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch that exists; the main one by default.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the card; send nothing.")] = False,
) -> None:
    """Share an axis and its policy, with a card; never rollouts or texts. Needs HF_TOKEN or `hf auth login`."""
    if dry_run:
        from persona_axis.hub.push import plan_push

        plan = plan_push(folder, repo)
        for name, size in plan.sizes.items():
            typer.echo(f"{size:>13,} bytes  {name}")
        typer.echo(f"\n{plan.card}", nl=False)
        return
    from persona_axis.hub.push import push as share

    done = share(folder, repo, private=private, revision=revision, message=message)
    for name, size in done.sizes.items():
        typer.echo(f"{size:>13,} bytes  {name}", err=True)
    if not done.changed:
        typer.echo(f"{repo} held all of it already; no commit was made.", err=True)
    typer.echo(done.url)


@app.command()
def pull(
    repo: Repo,
    out: Annotated[Path, typer.Option(help="A new folder; it then stands wherever a run folder does.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch by default.")] = None,
) -> None:
    """Get a shared axis and its policy, checked. A private repository needs HF_TOKEN or `hf auth login`."""
    from persona_axis.hub.pull import pull as fetch
    from persona_axis.hub.pull import read_source

    typer.echo(fetch(repo, out, revision=revision))
    source = read_source(out)
    typer.echo(f"{repo} at commit {source.commit}: {', '.join(source.files)}", err=True)
