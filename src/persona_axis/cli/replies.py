"""What commands that make replies share: their options, the model read on the axis, and a reply's JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from persona_axis.cli.holding import Intervened
    from persona_axis.geometry.axis import Axis
    from persona_axis.model.streaming import ReplyStream, StreamedReply

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder or an axis file.")]
Questions = Annotated[list[str], typer.Argument(metavar="QUESTION...", help="Each is asked by itself.")]
System = Annotated[str, typer.Option(help="System prompt; none by default.")]
MaxTokens = Annotated[int, typer.Option(help="Reply length limit.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus mass; 1 is the whole distribution.")]
Seed = Annotated[int, typer.Option(help="Of the random draws; an intervention does not change them.")]
Model = Annotated[str | None, typer.Option(help="Hub id, folder, .gguf file or 'embedded'; the axis's own by default.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or spread.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per reply.")]
Strength = Annotated[float, typer.Option(help="Positive = toward the Assistant, negative = away, 0 = plain.")]
UnitOption = Annotated[str, typer.Option(help="raw: residual-stream units. norm: mean residual norms of the layer.")]
Layer = Annotated[int | None, typer.Option(help="Decoder block that is steered; the analysed one by default.")]
AllowModel = Annotated[str | None, typer.Option(help="Name of the loaded model, if the policy is another model's.")]


def opened(folder: Path, axis: Axis, model: str | None, dtype: str, device: str) -> ReplyStream:
    """The model of an axis, read on it; what is odd about the two is said."""
    from persona_axis.collect.origin import differences, load_origin
    from persona_axis.model.streaming import ReplyStream

    chat = load_origin(folder, axis, model, dtype, device)
    said = differences(axis, chat)
    if said:
        typer.echo(f"note: {said}", err=True)
    return ReplyStream(chat, axis)


def reply_facts(stream: ReplyStream, reply: StreamedReply, way: Intervened | None) -> dict[str, Any]:
    """What the JSON of a reply says, whichever command prints it; ``way`` is None for a plain one."""
    from persona_axis.geometry.pool import pool_percentile

    value = reply.projection
    return {
        "reply": reply.text,
        "finish_reason": reply.ended,
        "model": stream.chat.name,
        "layer": stream.layer,
        "projection": value,
        "percentile": None if value is None else pool_percentile(stream.axis, value, stream.layer),
        "n_counted": reply.n_counted,
        "intervention": None if way is None else {**way.facts, "at": [_at(way, reply, i) for i in way.hold.layers]},
    }


def _at(way: Intervened, reply: StreamedReply, layer: int) -> dict[str, Any]:
    """What happened at one held layer."""
    part = next((p for p in way.policy.interventions if p.layer == layer), None) if way.policy else None
    bounds = {} if part is None else {name: _finite(getattr(part, name).tolist()) for name in ("lo", "hi")}
    return {"layer": layer, **bounds, "share_corrected": reply.share_corrected(layer)}


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no infinity: no bound is null."""
    return [value if math.isfinite(value) else None for value in values]
