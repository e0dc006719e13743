"""``run`` and ``demo``: the whole job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from persona_axis.cli.app import app
from persona_axis.errors import PartialRun, UsageError

if TYPE_CHECKING:
    from persona_axis.pipeline import RunResult

Settings = TypeVar("Settings")
Ask, Answer, Judge, FitPanel, Where = "What is asked", "How it is answered", "Who judges", "What is fitted", "Where"


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Run folder; the same command resumes what is there.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or 'embedded'.")] = "embedded",
    roles: Annotated[
        str | None,
        typer.Option(
            help="Names (a,b,c), a number, @names.txt, or your own roles file; all by default.", rich_help_panel=Ask
        ),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="A number (60 by default), all, or your own .txt or .jsonl.", rich_help_panel=Ask)
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Which of each role's prompts, e.g. 0,2,4.", rich_help_panel=Ask)
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="At most this many rollouts: questions are cut, by category, never roles.", rich_help_panel=Ask
        ),
    ] = None,
    default_prompts: Annotated[
        Path | None,
        typer.Option(help="Your own production prompts for the default persona.", rich_help_panel=Ask),
    ] = None,
    own_questions: Annotated[
        bool, typer.Option("--own-questions", help="Also ask each role its own questions.", rich_help_panel=Ask)
    ] = False,
    design: Annotated[
        str,
        typer.Option(help="rotated: each question once per role. crossed: under every prompt.", rich_help_panel=Ask),
    ] = "rotated",
    catalog: Annotated[Path | None, typer.Option(help="Your own catalog folder.", rich_help_panel=Ask)] = None,
    max_tokens: Annotated[int, typer.Option(help="Reply length limit.", rich_help_panel=Answer)] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=Answer)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.", rich_help_panel=Answer)] = 0.9,
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=Answer)] = 0,
    judge: Annotated[
        str,
        typer.Option(
            help="'likelihood' (no API), 'none', or an Inspect model: openai/gpt-4.1-mini.", rich_help_panel=Judge
        ),
    ] = "likelihood",
    price: Annotated[
        str | None,
        typer.Option(help="IN,OUT per million tokens, to say what the judge will cost.", rich_help_panel=Judge),
    ] = None,
    judge_connections: Annotated[int, typer.Option(help="Judge calls at a time.", rich_help_panel=Judge)] = 16,
    judge_rpm: Annotated[
        float | None, typer.Option(help="Judge calls per minute, at most.", rich_help_panel=Judge)
    ] = None,
    filter: Annotated[
        str, typer.Option(help="auto, none, expressed, score>=2 or score==3.", rich_help_panel=FitPanel)
    ] = "auto",
    min_count: Annotated[int, typer.Option(help="Rollouts that a role must keep.", rich_help_panel=FitPanel)] = 10,
    estimator: Annotated[str, typer.Option(help="paired, or paper.", rich_help_panel=FitPanel)] = "paired",
    layers: Annotated[
        str | None,
        typer.Option(help="Captured blocks, e.g. 10-20 or 4,8,12; all by default.", rich_help_panel=FitPanel),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Analysed block; the middle by default.", rich_help_panel=FitPanel)
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Who generates: loop (our own), or vllm.", rich_help_panel=Where)
    ] = "loop",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=Where)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or spread.", rich_help_panel=Where)] = "auto",
    batch_tokens: Annotated[
        int | None,
        typer.Option(help="Key/value positions in flight; by free memory by default.", rich_help_panel=Where),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Activations kept: all, sample:N or none.", rich_help_panel=Where)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", rich_help_panel=Where)] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file to use instead of the model's.", rich_help_panel=Where)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=Where)
    ] = False,
) -> None:
    """From a chat model to its Assistant Axis, with error bars."""
    options = dict(locals())
    options["prompts"] = parse_integers("--prompts", prompts)
    options["layers"] = parse_integers("--layers", layers)
    options["judge_requests_per_minute"] = options.pop("judge_rpm")
    if price is not None:
        from persona_axis.collect.llm_judge import parse_price

        options["price"] = parse_price(price)
    from persona_axis.cli.progress import ConsoleReporter
    from persona_axis.pipeline import run as run_job
    from persona_axis.settings import RunSettings

    finish(run_job(checked(RunSettings, options), ConsoleReporter()))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
) -> None:
    """The whole job on the embedded model, then steering and capping, in a few minutes."""
    from persona_axis.cli.progress import ConsoleReporter
    from persona_axis.pipeline import demo as run_demo

    finish(run_demo(out, ConsoleReporter()))


def parse_integers(option: str, text: str | None) -> tuple[int, ...] | None:
    """``"4,8,10-12"`` -> (4, 8, 10, 11, 12)."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or int(high or low) < int(low):
            raise UsageError(f"{option} {text!r}: expected numbers and ranges, like 4,8 or 10-20.")
        numbers += range(int(low), int(high or low) + 1)
    return tuple(numbers)


def checked(kind: type[Settings], options: dict[str, Any]) -> Settings:
    """The settings that options make; a wrong one is a UsageError that names the option."""
    from pydantic import ValidationError

    try:
        return kind(**options)
    except ValidationError as e:
        said = [
            f"--{'.'.join(map(str, error['loc'])).replace('_', '-')}: {error['msg'].removeprefix('Value error, ')}"
            for error in e.errors()
        ]
        raise UsageError("; ".join(said)) from e


def finish(result: RunResult) -> None:
    """Print the summary; exit 3 when verdicts are missing."""
    from persona_axis.report.terminal import render_summary

    typer.echo(render_summary(result.summary, result.result.fit, result.report))
    if result.failed_verdicts:
        raise PartialRun(
            f"{result.failed_verdicts} rollouts have no verdict because the judge failed on them; they are left out "
            "of the fit. Run the same command to ask again."
        )
