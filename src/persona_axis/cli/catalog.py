"""``catalog``: what the personas and questions are, whether they are good, and other people's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_axis.cli.app import app
from persona_axis.errors import PartialRun, UsageError

if TYPE_CHECKING:
    from persona_axis.catalog.catalog import Catalog

catalog_app = typer.Typer(no_args_is_help=True, help="Roles, traits, questions, drift users, probes and exemplars.")
app.add_typer(catalog_app, name="catalog")

Folder = Annotated[Path | None, typer.Option(help="A catalog folder; the embedded one by default.")]


@catalog_app.command("list")
def list_texts(
    what: Annotated[
        str, typer.Argument(help="roles, traits, questions, users, scripts, probes, harm or exemplars.")
    ] = "roles",
    catalog: Folder = None,
) -> None:
    """Names by group."""
    from persona_axis.catalog.show import listing

    for group, names in listing(_load(catalog), what).items():
        typer.echo(f"{group} ({len(names)}): {', '.join(names)}")


@catalog_app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="Of a role, a trait, a drift user, a topic's script, a question, a harm category, ...")
    ],
    catalog: Folder = None,
) -> None:
    """Every text of one entry."""
    from persona_axis.catalog.show import entry

    typer.echo(entry(_load(catalog), name))


@catalog_app.command()
def validate(
    catalog: Folder = None,
    skip: Annotated[list[str] | None, typer.Option(help="A rule not to check; repeat for more.")] = None,
) -> None:
    """Check every text: counts, lengths, leaks, placeholders, openings, near-duplicates. Exit code 1 if any fails."""
    from persona_axis.catalog.validate import validate as find

    findings = find(_load(catalog), promised=catalog is None, skip=skip or ())
    for finding in findings:
        typer.echo(str(finding))
    if findings:
        by_rule = Counter(finding.rule for finding in findings)
        counts = ", ".join(f"{rule} {count}" for rule, count in by_rule.most_common())
        typer.echo(f"{len(findings)} complaints: {counts}", err=True)
        raise typer.Exit(1)
    typer.echo("no complaints", err=True)


@catalog_app.command()
def stats(
    catalog: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="The counts as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a page with bars by group to this .html file.")] = None,
) -> None:
    """How many texts there are, by group and category."""
    from persona_axis.catalog.stats import catalog_stats

    found = catalog_stats(_load(catalog))
    if plot is not None:
        from persona_axis.report.catalog_stats import write_catalog_page

        write_catalog_page(plot, found)
        typer.echo(f"{plot}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        from persona_axis.report.catalog_stats import render_catalog_stats

        typer.echo(render_catalog_stats(found))


@catalog_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="The data folder of the reference's layout: roles/, traits/, ...")],
    out: Annotated[Path, typer.Argument(help="A new catalog folder.")],
    model_name: Annotated[
        str | None, typer.Option(help="Stands for {model_name} in the default persona's prompts.")
    ] = None,
) -> None:
    """A catalog folder from files in the layout of the paper's reference implementation."""
    from persona_axis.catalog.reference import import_reference

    typer.echo(f"{out}: {import_reference(source, out, model_name=model_name)}")


@catalog_app.command()
def export(
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    catalog: Folder = None,
) -> None:
    """A catalog in the layout of the paper's reference implementation."""
    from persona_axis.catalog.reference import export_reference

    typer.echo(f"{out}: {export_reference(_load(catalog), out)}")


@catalog_app.command()
def generate(
    kind: Annotated[str, typer.Argument(help="role or trait.")],
    ideas: Annotated[list[str], typer.Argument(help="NAME, 'NAME: a line about it', or @FILE with one per line.")],
    model: Annotated[str, typer.Option(help="An Inspect model that writes: openai/gpt-4.1, vllm/<model>, ...")],
    out: Annotated[Path, typer.Option(help="A catalog folder of yours, new or with earlier results.")],
    group: Annotated[str, typer.Option(help="The folder of the new personas.")] = "own",
    catalog: Folder = None,
    connections: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    rpm: Annotated[float | None, typer.Option(help="Requests per minute, at most.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of one answer, reasoning included.")] = 16384,
) -> None:
    """New personas by a language model: draft, critique, revise, validate. The same command resumes."""
    from persona_axis.catalog.generate import generate as write
    from persona_axis.catalog.generate import read_ideas
    from persona_axis.llm.client import LLMClient

    if kind not in ("role", "trait"):
        raise UsageError(f"there is no kind {kind!r}; write role or trait")
    wanted, beside = read_ideas(ideas), _load(catalog)
    missing = 0
    with LLMClient(
        model, max_connections=connections, requests_per_minute=rpm, temperature=None, max_tokens=max_tokens
    ) as client:
        for outcome in write(kind, wanted, out, beside, client.ask, group):  # type: ignore[arg-type]
            typer.echo(f"{outcome.name}: {outcome.state}: {outcome.detail}")
            missing += outcome.state != "accepted"
    if missing:
        raise PartialRun(
            f"{missing} of {len(wanted)} are not written. Unfinished ones go on when the same command runs again; "
            f"a rejected one starts anew when its line changes, or its file under {out / '.generate'} is removed."
        )


def _load(folder: Path | None) -> Catalog:
    from persona_axis.catalog.catalog import load_catalog

    return load_catalog(folder)
