"""``steer`` and ``cap``: questions answered by the plain model and by the intervened one, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona_axis.cli.app import app
from persona_axis.cli.replies import (
    AllowModel,
    AsJson,
    Device,
    Dtype,
    Folder,
    Layer,
    MaxTokens,
    Model,
    Questions,
    Seed,
    Strength,
    System,
    Temperature,
    TopP,
    UnitOption,
    opened,
    reply_facts,
)

if TYPE_CHECKING:
    from persona_axis.cli.holding import Intervened
    from persona_axis.model.engine import Sampling
    from persona_axis.model.streaming import ReplyStream, StreamedReply
    from persona_axis.steering.interventions import Intervention


@app.command()
def steer(
    folder: Folder,
    questions: Questions,
    strength: Strength,
    unit: UnitOption = "raw",
    layer: Layer = None,
    system: System = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer questions plain and steered along the axis, each reply with its projection.

    Projections are read at the analysed layer before steering acts there: what the push leads to, not the push.
    """
    from persona_axis.cli import holding
    from persona_axis.geometry.axis import Axis

    axis = Axis.load(folder)
    sampling = holding.sampling_of(max_tokens, temperature, top_p, seed)
    axis.at(layer)
    stream = opened(folder, axis, model, dtype, device)
    way = holding.steered(stream.chat, axis, layer, strength, unit)
    _answer(stream, way, "steered", questions, system, sampling, as_json)


@app.command()
def cap(
    folder: Folder,
    questions: Questions,
    policy: Annotated[
        Path | None, typer.Option(help="Policy folder, or a run folder with one; DIR's own by default.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Capped blocks, e.g. 20-27, instead of a policy.")] = None,
    percentile: Annotated[
        int | None,
        typer.Option(help="Floors: percentile of the run's replies toward the Assistant; 75 (the paper's 25)."),
    ] = None,
    system: System = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    allow_model: AllowModel = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer questions plain and capped, with the share of tokens that each capped layer corrected.

    Projections are read at the analysed layer, before an intervention acts there.
    """
    from persona_axis.cli import holding
    from persona_axis.geometry.axis import Axis

    axis = Axis.load(folder)
    sampling = holding.sampling_of(max_tokens, temperature, top_p, seed)
    wanted = holding.found_policy(folder, axis, policy, layers, percentile)
    stream = opened(folder, axis, model, dtype, device)
    way = holding.capped(stream.chat, wanted, allow_model)
    _answer(stream, way, "capped", questions, system, sampling, as_json)


def _answer(
    stream: ReplyStream,
    way: Intervened,
    word: str,
    questions: list[str],
    system: str,
    sampling: Sampling,
    as_json: bool,
) -> None:
    template = stream.chat.template
    if way.note:
        typer.echo(f"note: {way.note}", err=True)
    if not as_json:
        typer.echo(f"{word}: {way.words}" + (f"; policy {way.facts['policy'][:12]}" if way.policy else ""), err=True)
    for number, question in enumerate(questions):
        prompt_ids = template.prompt_ids(template.messages(system, question))
        if not as_json:
            typer.echo(("\n" if number else "") + f"> {question}")
        for name, hold in (("plain", None), (word, way.hold)):
            reply = stream.reply(prompt_ids, sampling, f"question {number}", hold=hold)
            if as_json:
                held = None if hold is None else way
                typer.echo(json.dumps({"question": question, "way": name, **reply_facts(stream, reply, held)}))
                continue
            for line in _lines(stream, name, reply, None if hold is None else way):
                typer.echo(line)


def _lines(stream: ReplyStream, name: str, reply: StreamedReply, way: Intervened | None) -> Iterator[str]:
    from persona_axis.cli.holding import percentiles_in_words
    from persona_axis.report.streamed import figures
    from persona_axis.report.words import MISSING, percent

    policy = way.policy if way is not None else None
    yield ""
    yield f"{name}, layer {stream.layer}: {figures(stream.axis, stream.layer, reply, policy is not None)}"
    yield reply.text.strip() or "(nothing)"
    if policy is None:
        return
    yield ""
    yield f"floors: {percentiles_in_words(policy)}"
    for part in policy.interventions:
        share = reply.share_corrected(part.layer)
        corrected = MISSING if share is None else percent(share)
        yield f"  layer {part.layer:>3}  {_bounds(part):>12}  {corrected:>5} of tokens corrected"


def _bounds(part: Intervention) -> str:
    """The floor, or what else bounds the first direction (a cap has one)."""
    shown = []
    for low, high in zip(part.lo.tolist(), part.hi.tolist(), strict=True):
        ends = [f"{low:+.2f}" if math.isfinite(low) else "", f"{high:+.2f}" if math.isfinite(high) else ""]
        shown.append(ends[0] if not ends[1] else f"{ends[0]} .. {ends[1]}")
    return " | ".join(shown)
