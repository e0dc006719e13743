"""``judge-check``: how far a judge agrees with labelled replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_axis.cli.app import app


@app.command("judge-check")
def judge_check(
    labels: Annotated[Path, typer.Argument(help="JSONL: role, system_prompt, question, response, score 0-3.")],
    judge: Annotated[str, typer.Option(help="'likelihood' or an Inspect model.")] = "likelihood",
    model: Annotated[str, typer.Option(help="The model that the likelihood judge reads with.")] = "embedded",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of the null's replies.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Compare a judge with labelled replies: AUC, kappa and confusion, with intervals."""
    from persona_axis.collect.labelled import check_likelihood, check_llm

    if judge == "likelihood":
        check = check_likelihood(labels, model, dtype, device, seed)
    else:
        check = check_llm(labels, judge, seed)
    typer.echo(json.dumps(check.to_dict(), indent=2) if as_json else check.render())
