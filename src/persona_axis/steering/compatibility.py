"""Whether a policy fits the model it is about to hold, and what was let pass.

Contract:

1. Layers that the model lacks, another number of layers or another width are refused whatever is allowed: the numbers
   would mean something else.
2. Another name, revision or quantisation than the policy was made for is refused, unless the user names the model that
   is loaded; each difference is a sentence of the record, which every output of a command carries.
3. What one side does not say is no difference. The record lists it as not compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from persona_axis.errors import UsageError
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering.policy import Policy

_COMPARED = {"name": "model", "revision": "revision", "quantisation": "quantisation"}


@dataclass(frozen=True)
class Compatibility:
    """A policy and a model that fit, and what was let pass for that.

    Attributes:
        policy_hash: content hash of the policy.
        made_for: the model that the policy was made for; None when it claims nothing.
        model: the model that is held.
        differences: sentences; not empty only when the user allowed this model by name.
        not_compared: what one of the two does not say.
    """

    policy_hash: str
    made_for: ModelIdentity | None
    model: ModelIdentity
    differences: tuple[str, ...] = ()
    not_compared: tuple[str, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether this is another model than the policy was made for, allowed by the user."""
        return bool(self.differences)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with ``allowed`` said outright."""
        known = asdict(self)
        return {
            "allowed_other_model": self.allowed,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in known.items()},
        }

    def __str__(self) -> str:
        if not self.allowed:
            return f"Held with policy {self.policy_hash[:12]}."
        return f"Held with a policy of another model, as allowed: {' '.join(self.differences)}"


def check_fits(policy: Policy, model: ModelIdentity, allow_model: str | None = None) -> Compatibility:
    """Refuse a policy that does not fit a model.

    Args:
        policy: about to hold the model.
        model: of what is loaded (:meth:`ModelIdentity.of`).
        allow_model: name of the loaded model, to hold it with a policy made for another one of the same shape.

    Raises:
        UsageError: it does not fit, or ``allow_model`` names a model that is not the one loaded.
    """
    _check_shapes(policy, model)
    if allow_model is not None and allow_model != model.name:
        raise UsageError(f"The model allowed is {allow_model!r}, but {model.name or 'one without a name'!r} is loaded.")
    made_for = policy.model
    if made_for is None:
        return Compatibility(policy.content_hash, None, model)
    differences, unknown = [], []
    for field, word in _COMPARED.items():
        theirs, ours = getattr(made_for, field), getattr(model, field)
        if _unknown(field, theirs) or _unknown(field, ours):
            unknown.append(word)
        elif theirs != ours:
            differences.append(f"Its {word} is {theirs or 'none'}, the loaded model's {ours or 'none'}.")
    if differences and allow_model is None:
        raise UsageError(
            f"This policy was made for another model. {' '.join(differences)} Directions and bounds of one model mean "
            f"little in another. Load that model, or allow this one by name: --allow-model {model.name!r} "
            f"(allow_model in Python)."
        )
    return Compatibility(policy.content_hash, made_for, model, tuple(differences), tuple(unknown))


def _unknown(field: str, value: str | None) -> bool:
    """Quantisation "" is none; a name or revision "" is not known."""
    return value is None or (field != "quantisation" and not value)


def _check_shapes(policy: Policy, model: ModelIdentity) -> None:
    for part in policy.interventions:
        if model.n_layers is not None and not 0 <= part.layer < model.n_layers:
            raise UsageError(f"The policy names layer {part.layer}; the model has 0 to {model.n_layers - 1}.")
        if model.d_model is not None and part.V.shape[1] != model.d_model:
            raise UsageError(
                f"The policy's directions have width {part.V.shape[1]}, the model's residual {model.d_model}."
            )
    depth = policy.model.n_layers if policy.model else None
    if depth is not None and model.n_layers is not None and depth != model.n_layers:
        raise UsageError(
            f"The policy was made for a model of {depth} layers ({policy.model}); the one loaded has {model.n_layers}."
        )
