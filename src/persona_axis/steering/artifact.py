"""A policy as a folder: ``policy.safetensors`` holds the tensors, ``policy.json`` all that is said about them.

Contract:

1. What is loaded is what was saved, bit for bit, infinite bounds included (they lie in the tensors; JSON has none).
2. Each file is written whole or not at all, the tensors first. The JSON holds the hash over layers, tensors and
   positions; loading computes it again, so a damaged file, or files of two policies, are an error and never a policy.
3. What loads is valid: the checks of :class:`Intervention` apply, and the file is named.
4. ``provenance`` comes back as JSON keeps it (a tuple is a list).
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from persona_axis.errors import StorageError, UsageError
from persona_axis.files.arrays import ArrayReader, open_array_file, write_arrays
from persona_axis.files.atomic import encode_json, read_json, write_json
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.policy import Policy, Positions, content_hash

TOOL_VERSION = importlib.metadata.version("persona-axis")
FORMAT = "persona-axis/policy/"
VERSION = 1
JSON_NAME, TENSORS_NAME = "policy.json", "policy.safetensors"
PLACES = ("", "policy", "calibration/policy")  # below the folder that a user names
TENSORS = {"V": 2, "lo": 1, "hi": 1, "shift": 1}  # dimensions, per layer


class _Header(BaseModel):
    """What ``policy.json`` holds. Keys that say where the bounds came from stand beside the rest of the provenance."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: str
    persona_axis: str  # version of this package
    layers: list[NonNegativeInt] = Field(min_length=1)
    positions: Positions
    model: dict[str, Any] | None
    content_hash: str
    kind: str | None = None
    pool: Any = None
    percentile_paper: int | float | None = None
    percentile_assistant: int | float | None = None
    axis_hash: str | None = None
    provenance: dict[str, Any]


_SAID_APART = ("kind", "pool", "percentile_paper", "percentile_assistant", "axis_hash")


def save_policy(policy: Policy, folder: str | Path) -> Path:
    """Write a policy folder; a policy that is there is replaced.

    Raises:
        UsageError: bounds that differ by sequence, a negative layer, or provenance that JSON cannot hold.
        StorageError: the disk refuses.
    """
    for part in policy.interventions:
        if part.batch is not None:
            raise UsageError(
                f"Layer {part.layer} has bounds for each of the {part.batch} sequences of a batch. A policy on disk is "
                "for any batch: save one policy per bound."
            )
        if part.layer < 0:
            raise UsageError(f"Layer {part.layer}: a policy on disk counts layers from 0.")
    arrays = {_name(part.layer, key): getattr(part, key) for part in policy.interventions for key in TENSORS}
    header = {
        "format": f"{FORMAT}{VERSION}",
        "persona_axis": TOOL_VERSION,
        "layers": list(policy.layers),
        "positions": policy.positions,
        "model": asdict(policy.model) if policy.model else None,
        "content_hash": policy.content_hash,
        **{key: policy.provenance[key] for key in _SAID_APART if policy.provenance.get(key) is not None},
        "provenance": {key: value for key, value in policy.provenance.items() if key not in _SAID_APART},
    }
    target = Path(folder)
    _check_json(header, str(target / JSON_NAME))
    if target.is_file():
        raise UsageError(f"{target} is a file; a policy is a folder.")
    write_arrays(target / TENSORS_NAME, {name: t.detach().cpu().float().numpy() for name, t in arrays.items()})
    write_json(target / JSON_NAME, header)
    return target


def load_policy(path: str | Path) -> Policy:
    """Read what :func:`save_policy` wrote.

    Args:
        path: a policy folder, its ``policy.json``, or a run or calibration folder with a policy in it.

    Raises:
        StorageError: missing, damaged, written by a newer version, or files of two policies; says which file.
    """
    folder = policy_folder(Path(path))
    header_file, tensors_file = folder / JSON_NAME, folder / TENSORS_NAME
    header = _read_header(header_file)
    parts = _read_tensors(tensors_file, header.layers)
    if content_hash(header.positions, parts) != header.content_hash:
        raise StorageError(
            f"{tensors_file} does not hold the tensors that {header_file} describes: one of the two is damaged, or "
            f"belongs to another policy. {_REMEDY}"
        )
    with _named(tensors_file):
        interventions = tuple(Intervention(*part) for part in parts)
    apart = {key: value for key in _SAID_APART if (value := getattr(header, key)) is not None}
    with _named(header_file):
        model = ModelIdentity.from_dict(header.model) if header.model is not None else None
        return Policy(interventions, {**header.provenance, **apart}, header.positions, model)


_REMEDY = "Restore both from the same place, or make the policy again."


def holds_policy(path: Path) -> bool:
    """Whether a folder, or a run or calibration folder, has a policy in it (whole or not)."""
    return any((path / place / name).is_file() for place in PLACES for name in (JSON_NAME, TENSORS_NAME))


def policy_folder(path: Path) -> Path:
    """The policy folder that a path stands for. Raises StorageError when there is none."""
    if path.name in (JSON_NAME, TENSORS_NAME) and path.is_file():
        return path.parent
    for place in PLACES:
        folder = path / place
        there = [name for name in (JSON_NAME, TENSORS_NAME) if (folder / name).is_file()]
        if len(there) == 2:
            return folder
        if there:
            missing = JSON_NAME if there == [TENSORS_NAME] else TENSORS_NAME
            raise StorageError(f"{folder} holds {there[0]} but no {missing}. {_REMEDY}")
    raise StorageError(
        f"No policy in {path}: expected {JSON_NAME} and {TENSORS_NAME} there, or in its {' or '.join(PLACES[1:])}."
    )


def _name(layer: int, key: str) -> str:
    return f"layer_{layer}.{key}"


def _check_json(header: dict[str, Any], where: str) -> None:
    """Before anything is written."""
    try:
        encode_json(header, where)
        _Header.model_validate(header)
    except TypeError as e:
        raise UsageError(f"{where}: the policy's provenance cannot be written as JSON: {e}.") from e
    except ValidationError as e:
        raise UsageError(f"{where}: the policy's provenance cannot be written: {_first(e)}.") from e


def _read_header(file: Path) -> _Header:
    content = read_json(_present(file))
    written = content.get("format") if isinstance(content, dict) else None
    if not isinstance(written, str) or not written.startswith(FORMAT):
        raise StorageError(f"{file} is not a policy written by this package (expected format {FORMAT}{VERSION}).")
    version = written.removeprefix(FORMAT)
    if version.isdecimal() and int(version) > VERSION:
        newer = content.get("persona_axis", "of a newer version")
        raise StorageError(
            f"{file} has format {written}, written by persona-axis {newer}; "
            f"this is {TOOL_VERSION}, which reads up to {FORMAT}{VERSION}. Upgrade persona-axis."
        )
    if version != str(VERSION):
        raise StorageError(f"{file} has the unknown format {written}. {_REMEDY}")
    try:
        return _Header.model_validate(content)
    except ValidationError as e:
        raise StorageError(f"{file} is damaged: {_first(e)}. {_REMEDY}") from e


def _first(e: ValidationError) -> str:
    error = e.errors()[0]
    return f"{'.'.join(map(str, error['loc']))}: {error['msg']}"


def _read_tensors(file: Path, layers: list[int]) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    with open_array_file(_present(file)) as reader:
        expected = sorted(_name(layer, key) for layer in layers for key in TENSORS)
        if reader.names != expected:
            raise StorageError(
                f"{file} holds {', '.join(reader.names) or 'nothing'}, but {JSON_NAME} names the layers "
                f"{', '.join(map(str, layers))}. {_REMEDY}"
            )
        parts = []
        for layer in layers:
            V, lo, hi, shift = (_tensor(reader, file, _name(layer, key), ndim) for key, ndim in TENSORS.items())
            parts.append((layer, V, lo, hi, shift))
        return parts


def _tensor(reader: ArrayReader, file: Path, name: str, ndim: int) -> Tensor:
    shape = reader.shape(name)
    if len(shape) != ndim or not math.prod(shape):
        raise StorageError(f"{file}: {name} has shape {shape}, where {ndim} dimensions were expected. {_REMEDY}")
    try:
        array = reader.read(name)
    except TypeError as e:  # a type that NumPy lacks
        raise StorageError(f"{file}: {name} is not float32 ({e}). {_REMEDY}") from e
    if array.dtype != np.float32:
        raise StorageError(f"{file}: {name} holds {array.dtype}, where float32 was expected. {_REMEDY}")
    return torch.from_numpy(array)


def _present(file: Path) -> Path:
    if not file.is_file():
        raise StorageError(f"{file} is missing. {_REMEDY}")
    return file


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of content with the file that holds it."""
    try:
        yield
    except UsageError as e:
        raise StorageError(f"{file}: {e} Make the policy again.") from e
