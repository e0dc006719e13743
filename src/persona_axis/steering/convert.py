"""Axes and policies from one format to another: ours, the reference's, and llama.cpp's control vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from persona_axis.errors import StorageError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering import interventions
from persona_axis.steering.artifact import JSON_NAME, TENSORS_NAME, holds_policy, load_policy, save_policy
from persona_axis.steering.capping_config import export_capping, import_capping
from persona_axis.steering.control_vector import export_control_vector, import_control_vector
from persona_axis.steering.foreign import export_axis, import_axis, import_vectors
from persona_axis.steering.policy import Policy, layer_span
from persona_axis.steering.torch_file import keys_of, read_torch_file

Format = Literal["persona-axis", "reference", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
Kind = Literal[
    "axis", "policy", "reference axis", "reference vectors", "reference capping configuration", "control vector"
]
OURS: tuple[Kind, ...] = ("axis", "policy")
ROWS = 16  # layers that the message shows one by one


@dataclass(frozen=True)
class Request:
    """What a conversion is asked to do; what does not apply to the source or the format is refused.

    Attributes:
        experiment: to read from a capping configuration, or the id to write into one.
        model_id, revision: of a foreign source, which does not say its model.
        layers: the analysed layer of an imported axis; the layers of an axis that a control vector adds.
        strength: of the control vector made of an axis, in residual-stream units.
        dtype: of an exported axis.
        model_hint: of a control vector, llama.cpp's name of the architecture.
    """

    experiment: str | None = None
    model_id: str | None = None
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    strength: float | None = None
    dtype: str | None = None
    model_hint: str | None = None


@dataclass(frozen=True, eq=False)
class Converted:
    """What was read and where it was written."""

    source: Path
    kind: Kind
    path: Path
    format: Format
    value: Axis | Policy

    def render(self) -> str:
        """One screen: model, layers, percentiles in both conventions, floors."""
        lines = [
            f"read    {self.source} ({self.kind})",
            f"wrote   {self.path} ({_format_words(self.format, self.value)})",
        ]
        lines += axis_lines(self.value) if isinstance(self.value, Axis) else policy_lines(self.value)
        return "\n".join(lines)


def convert(source: Path, to: str, out: Path, request: Request) -> Converted:
    """Read an axis or a policy of any known format and write it in another.

    Args:
        source: ``axis.pt``, ``capping_config.pt``, a folder of persona vectors, a control vector ``.gguf``, an axis
            file or run folder, or a policy folder.
        to: ``persona-axis``, ``reference`` or ``gguf``.
        out: a new file (an axis of ours: ``.safetensors``; ``.pt``; ``.gguf``) or, for a policy of ours, a new folder.
        request: the rest.

    Raises:
        UsageError: an option that does not apply, something the format cannot say, or ``out`` exists.
        StorageError: the source is missing, damaged, or of no known kind.
    """
    if to not in FORMATS:
        raise UsageError(f"Unknown format {to!r}; choose from {', '.join(FORMATS)}.")
    kind = kind_of(source)
    format: Format = to
    _check_options(kind, format, request)
    _check_out(kind, format, out, request)
    value = _read(source, kind, format, request)
    if format == "gguf":
        policy = _adding(value, request) if isinstance(value, Axis) else value
        path = export_control_vector(policy, out, request.model_hint)
        return Converted(source, kind, path, format, policy)
    if isinstance(value, Axis):
        path = value.save(out) if format == "persona-axis" else export_axis(value, out, _dtype(request))
    elif format == "persona-axis":
        path = save_policy(value, out)
    else:
        path = export_capping(value, out, request.experiment)
    return Converted(source, kind, path, format, value)


def kind_of(source: Path) -> Kind:
    """What a file or folder holds. Raises StorageError when it is missing or nothing known."""
    if source.is_dir():
        if (source / "fit" / "axis.safetensors").is_file():
            return "axis"
        if holds_policy(source):
            return "policy"
        if any(source.glob("*.pt")) or (source / "role_vectors").is_dir():
            return "reference vectors"
        raise StorageError(f"{source} is no run folder, policy folder or folder of persona vectors (.pt).")
    if not source.is_file():
        raise StorageError(f"{source} does not exist.")
    if source.name in (JSON_NAME, TENSORS_NAME):
        return "policy"
    by_ending: dict[str, Kind] = {".safetensors": "axis", ".gguf": "control vector"}
    ending = source.suffix.lower()
    return by_ending[ending] if ending in by_ending else _torch_kind(source)


def _torch_kind(source: Path) -> Kind:
    content = read_torch_file(source)
    if isinstance(content, torch.Tensor) or (isinstance(content, Mapping) and "axis" in content):
        return "reference axis"
    if isinstance(content, Mapping) and "experiments" in content:
        return "reference capping configuration"
    if isinstance(content, Mapping) and "vector" in content:
        raise StorageError(f"{source} is one persona's vector; name its folder, which makes an axis with all of them.")
    held = keys_of(content) if isinstance(content, Mapping) else type(content).__name__
    raise StorageError(f"{source} holds {held}: no axis and no capping configuration.")


def _is_policy(kind: Kind) -> bool:
    return kind in ("policy", "reference capping configuration", "control vector")


def _check_options(kind: Kind, format: Format, request: Request) -> None:
    """No option is ignored in silence."""
    makes_vector = not _is_policy(kind) and format == "gguf"
    writes_capping = _is_policy(kind) and format == "reference"
    imports_axis = kind in ("reference axis", "reference vectors")
    applies = {
        "experiment": kind == "reference capping configuration" or writes_capping,
        "model_id": kind not in OURS,
        "revision": kind not in OURS,
        "layers": imports_axis or makes_vector,
        "strength": makes_vector,
        "dtype": not _is_policy(kind) and format == "reference",
        "model_hint": format == "gguf",
    }
    options = {"layers": "layer"}
    for name, does in applies.items():
        if getattr(request, name) is not None and not does:
            raise UsageError(
                f"--{options.get(name, name).replace('_', '-')} does not apply to {kind} written as {format}."
            )
    if kind not in OURS and not (request.model_id or "").strip():
        raise UsageError(
            f"This {kind} does not say which model it belongs to. Name it with --model-id, so that what is written "
            "says it."
        )
    if imports_axis and not makes_vector and len(request.layers or (0,)) != 1:
        raise UsageError("--layer: an axis has one analysed layer.")
    if makes_vector and (request.layers is None or request.strength is None):
        raise UsageError(
            "A control vector adds something: say where and how much, with --layer and --strength (residual-stream "
            "units, positive toward the Assistant)."
        )


def _check_out(kind: Kind, format: Format, out: Path, request: Request) -> None:
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out} exists. Name another --out, or remove it.")
    folder = format == "persona-axis" and _is_policy(kind)
    ending = {"gguf": ".gguf", "reference": ".pt", "persona-axis": "" if folder else ".safetensors"}[format]
    if folder and out.suffix in (".pt", ".gguf", ".safetensors", ".json"):
        raise UsageError(f"--out {out}: a policy is a folder; leave the ending {out.suffix} away.")
    if ending and (out.suffix != ending or out.is_dir()):
        raise UsageError(f"--out {out}: what is written is a file ending in {ending}.")


def _read(source: Path, kind: Kind, format: Format, request: Request) -> Axis | Policy:
    model_id, revision = request.model_id or "", request.revision or ""
    if kind == "axis":
        return Axis.load(source)
    if kind == "policy":
        return load_policy(source)
    if kind == "control vector":
        return import_control_vector(source, model_id, revision)
    if kind == "reference capping configuration":
        return import_capping(source, model_id, revision, request.experiment)
    layer = request.layers[0] if request.layers else None
    return (import_axis if kind == "reference axis" else import_vectors)(source, model_id, revision, layer)


def _adding(axis: Axis, request: Request) -> Policy:
    """A policy that adds the normalised axis."""
    layers, strength = sorted(set(request.layers or ())), request.strength or 0.0
    parts = [interventions.add(layer, axis.at(layer), strength) for layer in layers]
    said = {"kind": "add", "axis": axis.metadata, "axis_hash": axis.content_hash, "strength": strength}
    return Policy(tuple(parts), said, model=ModelIdentity.recorded(axis.metadata, axis.vectors.shape[1]))


def _dtype(request: Request) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    wanted = request.dtype or "float32"
    if wanted not in known:
        raise UsageError(f"--dtype {wanted}: choose from {', '.join(known)}.")
    return known[wanted]


# ---- what was written, in words ---------------------------------------------------------------------------------


def _format_words(format: Format, value: Axis | Policy) -> str:
    if isinstance(value, Axis):
        return {"persona-axis": "axis", "reference": "the reference's axis: a raw tensor"}.get(format, format)
    return {
        "persona-axis": "policy",
        "reference": "the reference's capping configuration, one experiment",
        "gguf": "control vector; the strength is in it: llama-cli --control-vector FILE",
    }[format]


def axis_lines(axis: Axis) -> list[str]:
    """Model, layers and hash of an axis."""
    model = ModelIdentity.recorded(axis.metadata, axis.vectors.shape[1])
    return [
        f"model   {model or 'not known'}",
        f"layers  {layer_span(axis.layers)}; analysed: {axis.layer}",
        f"norm    {float(axis.at().norm()):.4g} at layer {axis.layer}; higher projection = more like the Assistant",
        f"hash    {axis.content_hash[:16]}",
    ]


def policy_lines(policy: Policy) -> list[str]:
    """Model, layers, percentiles in both conventions, and the numbers of each layer."""
    said = policy.provenance
    lines = [
        f"model   {policy.model or 'not said: fits any model of this shape'}",
        f"layers  {layer_span(policy.layers)} ({len(policy.layers)}); positions: {policy.positions}",
    ]
    if "percentile_assistant" in said and "percentile_paper" in said:
        paper, assistant = said["percentile_paper"], said["percentile_assistant"]
        lines.append(
            f"floors  percentile {assistant:g} toward the Assistant; the reference's p{paper / 100:g} "
            f"(percentile {paper:g} along the negated axis)"
        )
    if isinstance(said.get("note"), str):
        lines.append(f"note    {said['note']}")
    lines.append(f"hash    {policy.content_hash[:16]}")
    return [*lines, *_table(policy)]


def _table(policy: Policy) -> list[str]:
    """The numbers that are not "none", a row per layer and direction."""
    adds = any(bool((part.shift != 0).any()) for part in policy.interventions)
    rows = [
        (part.layer, lo, hi, shift)
        for part in policy.interventions
        for lo, hi, shift in zip(part.lo.tolist(), part.hi.tolist(), part.shift.tolist(), strict=True)
    ]
    floors_only = not adds and all(hi == torch.inf for _, _, hi, _ in rows)
    head = "  layer       floor   (reference's cap)" if floors_only else "  layer       floor     ceiling       added"
    shown = rows if len(rows) <= ROWS else [*rows[: ROWS // 2], *rows[-ROWS // 2 :]]
    lines = [
        f"  {layer:>5} {_bound(lo)}   {_bound(-lo)}"
        if floors_only
        else f"  {layer:>5} {_bound(lo)} {_bound(hi)} {_bound(shift)}"
        for layer, lo, hi, shift in shown
    ]
    if len(shown) < len(rows):
        lines.insert(ROWS // 2, f"    ... {len(rows) - len(shown)} more")
    return [head, *lines]


def _bound(value: float) -> str:
    return f"{value:>+11.4f}" if abs(value) != torch.inf else f"{'none':>11}"
