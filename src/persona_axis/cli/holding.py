"""What ``steer``, ``cap`` and ``chat`` share: the interventions that their options name, and their sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from persona_axis.errors import UsageError

if TYPE_CHECKING:
    from persona_axis.geometry.axis import Axis
    from persona_axis.model.engine import Sampling
    from persona_axis.model.loading import ChatModel
    from persona_axis.model.streaming import Hold
    from persona_axis.steering.hooks import Unit
    from persona_axis.steering.policy import Policy

PERCENTILE = 75  # of floors, toward the Assistant, unless the user says another; 25 as the paper counts


@dataclass(frozen=True)
class Intervened:
    """An intervention that was found to fit the loaded model.

    Attributes:
        hold: for a stream.
        words: in a sentence: "held at layers 20-27".
        facts: for JSON and transcripts.
        policy: whose bounds they are; None when steered.
        note: what the user should know before anything is said; "" is nothing.
    """

    hold: Hold
    words: str
    facts: dict[str, Any]
    policy: Policy | None = None
    note: str = ""


def steered(chat: ChatModel, axis: Axis, layer: int | None, strength: float, unit: str) -> Intervened:
    """``--strength`` in ``--unit`` at ``--layer``."""
    from persona_axis.model.streaming import Hold
    from persona_axis.steering.hooks import steer

    if unit not in ("raw", "norm"):
        raise UsageError(f"--unit {unit!r}: choose raw (residual-stream units) or norm (the layer's mean norm).")
    if not math.isfinite(strength):
        raise UsageError(f"--strength {strength}: a finite number is needed.")
    layer = axis.layer if layer is None else layer
    axis.at(layer)
    if unit == "norm":
        axis.norm_at(layer)
    measure = " x the mean norm" if unit == "norm" else ""
    return Intervened(
        Hold((layer,), lambda: steer(chat, axis, layer, strength, cast("Unit", unit))),
        f"steered by {strength:+g}{measure} at layer {layer}",
        {"kind": "steer", "strength": strength, "unit": unit, "layers": [layer]},
    )


def capped(chat: ChatModel, policy: Policy, allow_model: str | None) -> Intervened:
    """A policy, refused at once when it does not fit the model."""
    from persona_axis.model.identity import ModelIdentity
    from persona_axis.model.streaming import Hold
    from persona_axis.steering.compatibility import check_fits
    from persona_axis.steering.hooks import cap

    fits = check_fits(policy, ModelIdentity.of(chat), allow_model)
    facts = {
        "kind": policy.provenance.get("kind"),
        "positions": policy.positions,
        "layers": list(policy.layers),
        "percentile_assistant": policy.provenance.get("percentile_assistant"),
        "percentile_paper": policy.provenance.get("percentile_paper"),
        "policy": policy.content_hash,
        "compatibility": fits.to_dict(),
    }
    return Intervened(
        Hold(policy.layers, lambda: cap(chat, policy, allow_model), policy.positions),
        f"held at layers {ranges(policy.layers)}",
        facts,
        policy,
        str(fits) if fits.allowed else "",
    )


def percentiles_in_words(policy: Policy) -> str:
    """Both conventions, or that the policy says none."""
    toward, paper = (policy.provenance.get(f"percentile_{way}") for way in ("assistant", "paper"))
    if toward is None or paper is None:
        return "the policy does not say of which percentile its bounds are"
    return f"percentile {toward:g} toward the Assistant, {paper:g} as the paper counts (on the negated axis)"


def sampling_of(max_tokens: int, temperature: float, top_p: float, seed: int) -> Sampling:
    from persona_axis.model.engine import Sampling

    try:
        return Sampling(max_tokens, temperature, top_p, seed)
    except ValueError as e:
        raise UsageError(f"--{str(e).replace('_', '-')}") from e


def ranges(numbers: tuple[int, ...]) -> str:
    """(4, 8, 9, 10) -> ``4,8-10``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def found_policy(folder: Path, axis: Axis, given: Path | None, layers: str | None, percentile: int | None) -> Policy:
    """``--policy``, or caps at ``--layers`` and ``--percentile``, or the policy calibrated in the run folder."""
    from persona_axis.cli.run import parse_integers
    from persona_axis.steering.artifact import holds_policy
    from persona_axis.steering.policy import Policy

    wanted = parse_integers("--layers", layers)
    if given is not None and (wanted is not None or percentile is not None):
        raise UsageError("--policy has its own layers and bounds; leave --layers and --percentile out.")
    if given is not None:
        return Policy.load(given)
    if wanted is not None:
        return Policy.at_percentile(axis, wanted, PERCENTILE if percentile is None else percentile)
    if percentile is not None:
        raise UsageError("--percentile says where the floors lie; --layers must say at which layers.")
    if folder.is_dir() and holds_policy(folder):
        return Policy.load(folder)
    late = axis.layers[2 * len(axis.layers) // 3 :][:8]
    raise UsageError(
        f"{folder} holds no calibrated policy. Name one (--policy), or say where to cap: --layers "
        f"{ranges(late)} --percentile 50."
    )
