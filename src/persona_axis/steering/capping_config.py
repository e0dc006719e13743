"""Capping configurations of the paper's reference implementation, read and written.

    capping_config.pt   {vectors: {name: {vector [d_model], layer}},
                         experiments: [{id, interventions: [{vector: name, cap}]}]}

Contract:

1. **Signs.** Capping vectors are ``role - default``, the negated axis, and are clamped from above:
   ``h <- h - max(0, <h, v> - cap) v``. Here ``V = -v/|v|`` and the floor is ``-cap``. The id's ``p0.25`` is the 25th
   percentile along the negated axis, the 75th toward the Assistant; both are recorded.
2. The reference applies the interventions of one layer one after another. That is ours at once when their directions
   are orthogonal; others are refused.
3. The file does not say its model, so the user does, and the policy says it from then on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_axis.errors import StorageError, UsageError
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering.interventions import Intervention, orthonormal
from persona_axis.steering.policy import Policy, layer_span
from persona_axis.steering.torch_file import (
    finite_tensor,
    keys_of,
    read_torch_file,
    source_of,
    write_torch_file,
)

ORTHOGONAL = 5e-5  # cosines up to this; the bf16 rounding of orthogonal directions stays below

_EXPERIMENT = re.compile(r"layers_(\d+):(\d+)-p(0?\.\d+|[01]|[01]\.0+)")


def experiments(config: Any, path: Path) -> dict[str, Any]:
    """The experiments of a capping configuration's content, by id. Raises StorageError when it is none."""
    listed = config.get("experiments") if isinstance(config, Mapping) else None
    if not isinstance(listed, Sequence) or not isinstance(config.get("vectors"), Mapping):
        raise StorageError(f"{path} is no capping configuration: it needs 'vectors' and 'experiments'.")
    found: dict[str, Any] = {}
    for number, experiment in enumerate(listed):
        name = experiment.get("id") if isinstance(experiment, Mapping) else None
        if not isinstance(name, str):
            raise StorageError(f"{path}: experiment {number} has no id.")
        if name in found:
            raise StorageError(f"{path}: two experiments have the id {name}.")
        found[name] = experiment
    return found


def import_capping(path: str | Path, model_id: str, revision: str = "", experiment: str | None = None) -> Policy:
    """A policy from one experiment of ``capping_config.pt``.

    Args:
        path: the file.
        model_id, revision: which model it belongs to; the file does not say.
        experiment: its id; may be left out when there is one.

    Raises:
        UsageError: no such experiment; the message lists those there are.
        StorageError: damaged, an intervention without a cap, or directions of one layer that are not orthogonal.
    """
    file = Path(path)
    config = read_torch_file(file)
    known = experiments(config, file)
    if experiment is None and len(known) == 1:
        experiment = next(iter(known))
    if experiment not in known:
        asked = f"has no experiment {experiment!r}" if experiment else "holds several experiments; name one"
        raise UsageError(f"{file} {asked}. There are {len(known)}: {', '.join(known) or 'none'}.")
    where = f"{file}, experiment {experiment}"
    ceilings = _ceilings(config["vectors"], known[experiment], where)
    parts = []
    for layer, here in sorted(ceilings.items()):
        try:
            parts.append(_floors(layer, here))
        except UsageError as e:
            raise StorageError(f"{where}: {e}") from e
    widths = sorted({part.V.shape[1] for part in parts})
    if len(widths) != 1:
        raise StorageError(f"{where}: its vectors have different widths, {', '.join(map(str, widths))}.")
    said = {"format": "reference capping configuration", **source_of(file), "experiment": experiment}
    provenance = {"kind": "cap", "source": said, **_percentiles(experiment, list(ceilings))}
    return Policy(tuple(parts), provenance, model=ModelIdentity.told(model_id, revision, d_model=widths[0]))


def export_capping(policy: Policy, path: str | Path, experiment: str | None = None) -> Path:
    """Write ``capping_config.pt`` with one experiment.

    Args:
        policy: floors only, on all positions. Several directions at a layer become several interventions.
        path: the file.
        experiment: its id; made of layers and percentile by default (:func:`experiment_id`).

    Raises:
        UsageError: what the layout cannot say: upper bounds, shifts, some positions, bounds by sequence.
    """
    if policy.positions != "all":
        raise UsageError(
            f"This policy is for positions {policy.positions!r}; the reference caps every token and has no word for it."
        )
    vectors: dict[str, Any] = {}
    interventions = []
    for part in policy.interventions:
        _check_floors(part)
        for row, (direction, floor) in enumerate(zip(part.V.cpu(), part.lo.tolist(), strict=True)):
            if floor == -math.inf:
                continue  # no bound: nothing to say
            name = f"layer_{part.layer}/negated_axis" + (f"_{row}" if len(part.V) > 1 else "")
            vectors[name] = {"vector": -direction.float().clone(), "layer": part.layer}
            interventions.append({"vector": name, "cap": -floor})
    if not interventions:
        raise UsageError("This policy has no floor at all: there is nothing to write.")
    written = {"id": experiment or experiment_id(policy), "interventions": interventions}
    return write_torch_file(Path(path), {"vectors": vectors, "experiments": [written]})


def experiment_id(policy: Policy) -> str:
    """``layers_46:54-p0.25`` (end exclusive), as far as the policy knows."""
    layers = policy.layers
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        span = f"{layers[0]}:{layers[-1] + 1}"
    else:
        span = ",".join(map(str, layers))
    paper = policy.provenance.get("percentile_paper")
    return f"layers_{span}" + (f"-p{paper / 100:g}" if isinstance(paper, int | float) else "")


def _ceilings(vectors: Mapping[str, Any], experiment: Any, where: str) -> dict[int, list[tuple[Tensor, float]]]:
    """By layer, in the file's order: the reference's direction and its cap, an upper bound."""
    interventions = experiment.get("interventions")
    if not isinstance(interventions, Sequence) or not interventions:
        raise StorageError(f"{where} has no interventions.")
    ceilings: dict[int, list[tuple[Tensor, float]]] = {}
    for number, intervention in enumerate(interventions):
        here = f"{where}, intervention {number}"
        if not isinstance(intervention, Mapping) or "cap" not in intervention:
            raise StorageError(f"{here} has no cap, so it says no bound; the reference would skip it.")
        if set(intervention) != {"vector", "cap"}:
            raise StorageError(f"{here} holds {keys_of(intervention)}, where vector and cap were expected.")
        cap = _number(intervention["cap"], f"{here}: its cap")
        name = intervention["vector"]
        entry = vectors.get(name) if isinstance(name, str) else None
        if not isinstance(entry, Mapping) or not {"vector", "layer"} <= set(entry):
            raise StorageError(f"{here} names the vector {name!r}, which the file does not have with vector and layer.")
        layer = entry["layer"]
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise StorageError(f"{here}: its vector {name!r} has the layer {layer!r}; layers count from 0.")
        ceilings.setdefault(layer, []).append((finite_tensor(entry["vector"], f"{here}: its vector {name!r}", 1), cap))
    return ceilings


def _floors(layer: int, ceilings: list[tuple[Tensor, float]]) -> Intervention:
    """Directions clamped from above at one layer, as floors on the opposite directions."""
    widths = {len(vector) for vector, _ in ceilings}
    if len(widths) != 1:
        raise UsageError(f"Layer {layer}: its vectors have different widths, {', '.join(map(str, sorted(widths)))}.")
    V = -torch.cat([orthonormal(vector) for vector, _ in ceilings])  # [k, d_model]
    cosines = V @ V.T - torch.eye(len(V))
    if len(V) > 1 and float(cosines.triu(1).abs().max()) > ORTHOGONAL:
        raise UsageError(
            f"Layer {layer} has {len(V)} interventions whose directions are not orthogonal (cosine "
            f"{float(cosines.triu(1).abs().max()):.2g}). The reference applies them one after another, which differs "
            "from holding them at once; import experiments with one of them each."
        )
    floors = torch.tensor([-cap for _, cap in ceilings], dtype=torch.float32)
    return Intervention(layer, V, floors, torch.full_like(floors, math.inf), torch.zeros_like(floors))


def _percentiles(experiment: str, layers: list[int]) -> dict[str, Any]:
    """What an id such as ``layers_46:54-p0.25`` says (the end is exclusive), in both conventions."""
    match = _EXPERIMENT.fullmatch(experiment)
    if match is None:
        return {}
    paper = round(100 * float(match[3]), 6)
    both: dict[str, Any] = {"percentile_paper": paper, "percentile_assistant": round(100 - paper, 6)}
    both = {key: int(value) if value.is_integer() else value for key, value in both.items()}
    promised = list(range(int(match[1]), int(match[2])))
    if sorted(layers) != promised:
        both["note"] = (
            f"the id promises the layers {layer_span(promised)} (its end is exclusive); "
            f"the file has {layer_span(layers)}"
        )
    return both


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise StorageError(f"{what} is {value!r}, where a number was expected.")
    return float(value)


def _check_floors(part: Intervention) -> None:
    why = None
    if part.batch is not None:
        why = "bounds for each sequence of a batch"
    elif bool((part.shift != 0).any()):
        why = "a shift (it adds a direction)"
    elif bool((part.hi < math.inf).any()):
        why = "an upper bound (a band, an ablation or a ceiling)"
    if why:
        raise UsageError(
            f"Layer {part.layer} has {why}. The reference's layout holds floors toward the Assistant only, one "
            "clamp per direction. Save the policy in this package's own format."
        )
