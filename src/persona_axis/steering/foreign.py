"""Axes and persona vectors of the paper's reference implementation, read and written.

    axis.pt             tensor [n_layers, d_model], assistant - roles, unnormalised; or {axis, metadata}
    <role>.pt           tensor [n_layers, d_model]; or {vector, type, role}
    default_vector.pt   the same for the default persona; or default.pt

These files do not say their model, so the user does, and what is imported says it from then on. Row ``l`` is the
output of decoder block ``l``, as here, and higher is more like the Assistant, as here. (Capping files are not: see
:mod:`persona_axis.steering.capping_config`.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_axis.errors import NonFiniteError, StorageError, UsageError
from persona_axis.files.atomic import encode_json
from persona_axis.geometry.axis import Axis, assistant_axis
from persona_axis.model.identity import RECORDED, ModelIdentity
from persona_axis.steering.policy import layer_span
from persona_axis.steering.torch_file import (
    finite_tensor,
    keys_of,
    read_torch_file,
    source_of,
    write_torch_file,
)

DEFAULT_NAMES = ("default_vector.pt", "default.pt")
NOT_VECTORS = (*DEFAULT_NAMES, "axis.pt", "assistant_axis.pt", "capping_config.pt")
ROLE_VECTORS = "role_vectors"  # the Hub's folder of role vectors, beside default_vector.pt
EXPRESSED = "pos_3"  # mean of the replies that fully express the role: what the axis is made of


def import_axis(path: str | Path, model_id: str, revision: str = "", layer: int | None = None) -> Axis:
    """An axis from ``axis.pt``, one row per decoder block.

    Args:
        path: the file.
        model_id: which model it belongs to; the file does not say.
        revision: of that model, when known.
        layer: the analysed layer; the middle of the model by default.

    Raises:
        StorageError: damaged, or no axis.
        UsageError: the axis has no such layer.
    """
    file = Path(path)
    content = read_torch_file(file)
    theirs: Any = None
    if isinstance(content, Mapping):
        if "axis" not in content:
            raise StorageError(
                f"{file} is no axis: it holds {keys_of(content)}, and an axis is a tensor or has 'axis'."
            )
        content, theirs = content["axis"], content.get("metadata")
    vectors = finite_tensor(content, f"{file}: the axis", 2)
    said = {"format": "reference axis", **source_of(file), **_said(theirs)}
    return _axis(file, vectors, layer, model_id, revision, said)


def import_vectors(folder: str | Path, model_id: str, revision: str = "", layer: int | None = None) -> Axis:
    """An axis from role vectors and the default persona's vector: ``assistant - mean of the roles``.

    Args:
        folder: ``<role>.pt`` files with ``default_vector.pt`` or ``default.pt``; or the Hub's layout, a folder
            ``role_vectors`` beside ``default_vector.pt`` (either may be named).
        model_id, revision, layer: as for :func:`import_axis`.

    Raises:
        StorageError: damaged files, shapes that differ, no default persona, or vectors of another kind than the mean of
            the replies that express the role.
        UsageError: no such layer.
    """
    default_file, files = vector_files(Path(folder))
    assistant, _ = _persona_vector(default_file)
    total = torch.zeros_like(assistant, dtype=torch.float64)
    names: Counter[str] = Counter()
    for file in files:
        vector, said = _persona_vector(file)
        kind = said.get("type", EXPRESSED)
        if kind != EXPRESSED:
            raise StorageError(
                f"{file} is of type {kind!r}. An axis is made of {EXPRESSED!r}, the mean of the replies that fully "
                "express the role; leave this file out."
            )
        if vector.shape != assistant.shape:
            raise StorageError(
                f"{file} has shape {list(vector.shape)}, {default_file} {list(assistant.shape)}: vectors of two models."
            )
        names[str(said.get("role", file.stem))] += 1
        total += vector
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise StorageError(f"{folder}: more than one file is the vector of {', '.join(twice)}. Remove the copies.")
    axis = assistant_axis(assistant, (total / len(files)).float())
    said = {"format": "reference role vectors", "folder": Path(folder).name, "roles": len(files)}
    return _axis(Path(folder), axis, layer, model_id, revision, said)


def vector_files(folder: Path) -> tuple[Path, list[Path]]:
    """The default persona's vector and the role vectors in a folder of either layout, sorted by name.

    Raises StorageError when one of the two is not there, or the default persona's is there twice.
    """
    roles = folder / ROLE_VECTORS if (folder / ROLE_VECTORS).is_dir() else folder
    files = sorted(file for file in roles.glob("*.pt") if file.name not in NOT_VECTORS)
    places = dict.fromkeys([folder, roles, *([folder.parent] if folder.name == ROLE_VECTORS else [])])
    defaults = [place / name for place in places for name in DEFAULT_NAMES if (place / name).is_file()]
    if not files:
        raise StorageError(f"{roles} holds no role vectors (<role>.pt).")
    if len(defaults) != 1:
        found = " and ".join(map(str, defaults)) or "none"
        raise StorageError(
            f"{folder} needs one vector of the default persona, {' or '.join(DEFAULT_NAMES)}; found {found}."
        )
    return defaults[0], files


def export_axis(axis: Axis, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write ``axis.pt``: a raw tensor, one row per decoder block.

    Args:
        axis: with every layer of its model, because the file tells layers by position.
        path: the file.
        dtype: bfloat16 is what the reference itself writes; it keeps 8 bits of each number.

    Raises:
        UsageError: layers are missing.
    """
    identity = ModelIdentity.recorded(axis.metadata, axis.vectors.shape[1])
    n_layers = identity.n_layers if identity and identity.n_layers is not None else len(axis.layers)
    if axis.layers != tuple(range(n_layers)):
        raise UsageError(
            f"The reference tells layers by their position, so an axis needs all of them, 0 to {n_layers - 1}; this "
            f"one has {layer_span(axis.layers)}. Fit it with all --layers captured."
        )
    return write_torch_file(Path(path), axis.vectors.detach().cpu().to(dtype).clone())


def _persona_vector(file: Path) -> tuple[Tensor, dict[str, Any]]:
    """``[n_layers, d_model]`` float32, and what the file says besides."""
    content = read_torch_file(file)
    said: dict[str, Any] = {}
    if isinstance(content, Mapping):
        if "vector" not in content:
            raise StorageError(f"{file} is no persona vector: it holds {keys_of(content)}, and 'vector' is missing.")
        said = {key: content[key] for key in ("type", "role") if key in content}
        content = content["vector"]
    return finite_tensor(content, f"{file}: the vector", 2), said


def _axis(path: Path, vectors: Tensor, layer: int | None, model_id: str, revision: str, source: dict[str, Any]) -> Axis:
    n_layers, d_model = vectors.shape
    layer = n_layers // 2 if layer is None else layer
    if not 0 <= layer < n_layers:
        raise UsageError(f"This axis has layers 0 to {n_layers - 1}; layer {layer} was asked for.")
    zero = (vectors == 0).all(-1).nonzero()[:, 0].tolist()
    if zero:
        raise StorageError(f"{path}: the axis is zero at layer {zero[0]}, which is no direction.")
    identity = ModelIdentity.told(model_id, revision, n_layers=n_layers, d_model=d_model)
    said = {"model": model_id, "revision": revision, RECORDED: asdict(identity), "source": source}
    return Axis(vectors, tuple(range(n_layers)), layer, said)


def _said(theirs: Any) -> dict[str, Any]:
    """A foreign file's own metadata, as far as JSON holds it; the names of the rest."""
    if not isinstance(theirs, Mapping):
        return {} if theirs is None else {"metadata_left_out": [type(theirs).__name__]}
    kept, left_out = {}, []
    for key, value in theirs.items():
        try:
            encode_json({key: value}, "metadata")
            kept[str(key)] = value
        except (TypeError, NonFiniteError):
            left_out.append(str(key))
    return {"metadata": kept, **({"metadata_left_out": left_out} if left_out else {})}
