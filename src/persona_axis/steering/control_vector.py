"""llama.cpp control vectors (GGUF), the form in which it can steer: added, never bounded.

What its loader reads: tensors ``direction.<layer>``, float32 and one-dimensional, all of one width; it looks at no
metadata. ``direction.<layer>`` is added to the output of decoder block ``layer``, counted from zero, so the numbers are
ours; zero itself is rejected there. Other readers (repeng) want ``controlvector.model_hint`` and count on
``controlvector.layer_count``, the number of directions. Strength is part of the vector: ``shift V``.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from persona_axis.errors import StorageError, UsageError
from persona_axis.files.atomic import replace_atomic, storage_errors
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering import interventions
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.policy import Policy

ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(\d+)")


def export_control_vector(policy: Policy, path: str | Path, hint: str | None = None) -> Path:
    """Write a policy that adds directions as a control vector.

    Args:
        policy: shifts only, on all positions, not at layer 0.
        path: the ``.gguf`` file.
        hint: llama.cpp's name of the architecture ("qwen3"), for readers that compare it; the model's name by default.

    Raises:
        UsageError: what a control vector cannot do: bounds, layer 0, some positions.
    """
    from gguf import GGUFWriter

    if policy.positions != "all":
        raise UsageError(
            f"This policy is for positions {policy.positions!r}; llama.cpp adds a control vector at every token."
        )
    vectors = {part.layer: _added(part) for part in policy.interventions}
    name = policy.model.name if policy.model else ""
    with replace_atomic(Path(path)) as temp:
        writer = GGUFWriter(temp, ARCHITECTURE)
        try:
            writer.add_string(f"{ARCHITECTURE}.model_hint", name if hint is None else hint)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
            if name:
                writer.add_name(name)
            for layer, vector in vectors.items():
                writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector.numpy(), np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(path)


def _added(part: Intervention) -> Tensor:
    """``[d_model]``: what the intervention adds to every residual."""
    where = f"Layer {part.layer}"
    if part.batch is not None:
        raise UsageError(f"{where} has bounds for each sequence of a batch; a control vector is one for all.")
    if bool((part.lo > -torch.inf).any() or (part.hi < torch.inf).any()):
        raise UsageError(
            f"{where} has bounds (a cap, band or ablation). A control vector is the same for every token, and a bound "
            "changes some and leaves others: llama.cpp cannot hold a model. Export a policy that adds a direction."
        )
    if part.layer == 0:
        raise UsageError("Layer 0: llama.cpp rejects a control vector at its first block. Add at a later layer.")
    if part.changes_nothing:
        raise UsageError(f"{where} adds nothing; leave it out.")
    return (part.shift.float() @ part.V.float()).cpu()


def import_control_vector(path: str | Path, model_id: str, revision: str = "") -> Policy:
    """A policy that adds what a control vector does, at strength 1.

    Args:
        path: a ``.gguf`` file of llama.cpp, repeng or this package.
        model_id, revision: which model it belongs to.

    Raises:
        StorageError: damaged, or another kind of GGUF file.
    """
    file = Path(path)
    vectors, hint = _read(file)
    parts = []
    for layer, vector in sorted(vectors.items()):
        try:
            parts.append(interventions.add(layer, vector, float(vector.norm())))
        except UsageError as e:
            raise StorageError(f"{file}: direction.{layer}: {e}") from e
    widths = sorted({part.V.shape[1] for part in parts})
    if len(widths) != 1:
        raise StorageError(f"{file} holds directions of the widths {', '.join(map(str, widths)) or '(none)'}.")
    source = {"format": "llama.cpp control vector", "file": file.name, "model_hint": hint}
    return Policy(
        tuple(parts),
        {"kind": "add", "source": source},
        model=ModelIdentity.told(model_id, revision, d_model=widths[0]),
    )


def _read(file: Path) -> tuple[dict[int, Tensor], str]:
    """Directions by layer, and the hint."""
    from gguf import GGMLQuantizationType, GGUFReader

    if not file.is_file():
        raise StorageError(f"{file} is missing.")
    with storage_errors(file):
        try:
            reader = GGUFReader(file)
            kind, hint = _text(reader, "general.architecture"), _text(reader, f"{ARCHITECTURE}.model_hint")
            tensors = [(t.name, t.tensor_type, np.array(t.data)) for t in reader.tensors]
        except OSError:
            raise
        except Exception as e:  # the reader checks no lengths: a cut file fails wherever it ends
            raise StorageError(f"{file} is damaged or no GGUF file ({type(e).__name__}: {e}). Get it again.") from e
    if kind != ARCHITECTURE:
        raise StorageError(f"{file} is a GGUF file of architecture {kind!r}, not a control vector.")
    vectors = {}
    for name, dtype, data in tensors:
        match = _DIRECTION.fullmatch(name)
        if match is None or int(match[1]) == 0 or dtype != GGMLQuantizationType.F32 or data.ndim != 1:
            raise StorageError(
                f"{file}: the tensor {name} ({dtype.name}, {data.ndim} dimensions) is none that llama.cpp would load; "
                "expected direction.<layer> from 1, F32, of one dimension."
            )
        vectors[int(match[1])] = torch.from_numpy(data.astype(np.float32))
    return vectors, hint


def _text(reader: object, key: str) -> str:
    field = reader.get_field(key)  # type: ignore[attr-defined]
    return str(bytes(field.parts[-1]), "utf-8") if field is not None else ""
