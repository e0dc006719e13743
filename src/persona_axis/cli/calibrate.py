"""``calibrate``: from a run to a policy, with the price of every candidate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app
from persona_axis.cli.run import checked, parse_integers
from persona_axis.errors import PartialRun, UsageError

Tried, On, Chosen, Where = "What is tried", "What it is tried on", "What is chosen", "Where"


@app.command()
def calibrate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished run.")],
    layers: Annotated[
        str | None,
        typer.Option(
            help="That windows may cover, e.g. 10-29; from a third of the model's depth on by default.",
            rich_help_panel=Tried,
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            help="Layers of a window, e.g. 4,8; an eighth and a quarter of the model by default.",
            rich_help_panel=Tried,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="From one window to the next; half of its width by default.", rich_help_panel=Tried),
    ] = None,
    percentiles: Annotated[
        str,
        typer.Option(
            help="Of the pool, toward the Assistant; the paper counts the other way (its p0.25 is 75).",
            rich_help_panel=Tried,
        ),
    ] = "50,75",
    positions: Annotated[
        str, typer.Option(help="Tokens that are held: all, reply or decode.", rich_help_panel=Tried)
    ] = "all",
    prompts: Annotated[int, typer.Option(help="Role prompts in each half, at most.", rich_help_panel=On)] = 288,
    neutral_replies: Annotated[
        int, typer.Option(help="Neutral replies in each half, at most.", rich_help_panel=On)
    ] = 96,
    neutral: Annotated[
        Path | None,
        typer.Option(
            help="Your own conversations (as for read) instead of the run's neutral replies.", rich_help_panel=On
        ),
    ] = None,
    max_perplexity: Annotated[
        float, typer.Option(help="The dearest perplexity ratio on neutral replies.", rich_help_panel=Chosen)
    ] = 1.015,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks that the chosen policy is put to, e.g. ifeval,gsm8k.", rich_help_panel=Chosen),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="Documents of each task, at most.", rich_help_panel=Chosen)
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="A folder of your own lm-eval task files.", rich_help_panel=Chosen)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or spread.", rich_help_panel=Where)] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Key/value positions in flight; by free memory by default.", rich_help_panel=Where),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print calibration.json.")] = False,
) -> None:
    """Choose which layers to cap at which floors, on one half of a run; judge the choice on the other."""
    options = dict(locals())
    del options["folder"], options["as_json"]
    options["layers"] = parse_integers("--layers", layers)
    options["widths"] = parse_integers("--widths", widths)
    options["percentiles"] = parse_numbers("--percentiles", percentiles)
    options["tasks"] = tuple(tasks.split(",")) if tasks else ()
    from persona_axis.cli.progress import ConsoleReporter
    from persona_axis.pipeline import calibrate as calibrate_job
    from persona_axis.report.calibration import render_calibration, write_calibration_page
    from persona_axis.settings import CalibrationSettings

    found = calibrate_job(folder, checked(CalibrationSettings, options), ConsoleReporter())
    page = write_calibration_page(found.path / "calibration.html", found.record)
    typer.echo(json.dumps(found.record, indent=2) if as_json else render_calibration(found.record, page))
    if found.chosen is None:
        raise PartialRun(
            "No candidate of the last round writes fluent replies under role prompts, so there is no policy. Try fewer "
            "layers (--widths) or lower --percentiles."
        )


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """``"50,62.5"`` -> (50.0, 62.5)."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as e:
        raise UsageError(f"{option} {text!r}: expected numbers, like 50,75.") from e
