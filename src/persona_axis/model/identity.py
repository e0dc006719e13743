"""Which model something was made on: what an artifact says of it, and what a loaded one says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from persona_axis.errors import UsageError
from persona_axis.model.layers import text_config
from persona_axis.model.loading import ChatModel, revision_of

# What a recorded name or revision can be told by.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
EMBEDDED_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+) \(embedded .*\)")
COMMIT = re.compile(r"[0-9a-f]{40}")

RECORDED = "identity"  # the key of an artifact's metadata that holds asdict(ModelIdentity)


@dataclass(frozen=True)
class ModelIdentity:
    """A model as artifacts record it. What is unknown claims nothing.

    Attributes:
        name: as the user named it, or the id that Transformers loaded; "" is unknown.
        revision: commit on the Hub, or content hash of local weights; "" is unknown.
        quantisation: method and bits, as in "bitsandbytes 4-bit"; "" is none, None is unknown.
        n_layers, d_model: decoder blocks and width of the residual stream; None is unknown.
    """

    name: str
    revision: str = ""
    quantisation: str | None = None
    n_layers: int | None = None
    d_model: int | None = None

    @classmethod
    def of(cls, model: Any) -> ModelIdentity:
        """Of a :class:`ChatModel`, or what a Transformers model knows of itself."""
        if isinstance(model, ChatModel):
            return cls(model.name, model.revision, quantisation_of(model.model.config), model.n_layers, model.d_model)
        source = str(getattr(model, "name_or_path", "") or "")
        config = text_config(model)
        return cls(
            name=Path(source).name if source and Path(source).is_dir() else source,
            revision=revision_of(source, model.config) if source else "",
            quantisation=quantisation_of(model.config),
            n_layers=int(config.num_hidden_layers),
            d_model=int(config.hidden_size),
        )

    @classmethod
    def told(
        cls, model_id: str, revision: str = "", *, n_layers: int | None = None, d_model: int | None = None
    ) -> ModelIdentity:
        """By the user, of a file that does not say its model. Raises UsageError when there is no name."""
        if not model_id.strip():
            raise UsageError("The file does not say its model: name it (--model-id), so that the artifact does.")
        return cls(model_id, revision, n_layers=n_layers, d_model=d_model)

    @classmethod
    def recorded(cls, metadata: Mapping[str, Any], d_model: int) -> ModelIdentity | None:
        """What an axis's metadata says: a whole identity, or only the model and its revision; None for neither.

        Raises:
            UsageError: it is written there, but is not an identity.
        """
        known = metadata.get(RECORDED)
        if known is not None:
            return cls.from_dict(known)
        name = metadata.get("model")
        if not name:
            return None
        return cls(str(name), str(metadata.get("revision") or ""), d_model=d_model)

    @classmethod
    def from_dict(cls, known: Any) -> ModelIdentity:
        """From what ``dataclasses.asdict`` gave. Raises UsageError for anything else."""
        from pydantic import TypeAdapter, ValidationError

        names = [f.name for f in fields(cls)]
        if not isinstance(known, Mapping) or "name" not in known or not set(known) <= set(names):
            raise UsageError(
                f"{known!r} does not identify a model: it needs name, and may have {', '.join(names[1:])}."
            )
        try:
            return TypeAdapter(cls).validate_python(dict(known))
        except ValidationError as e:
            wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
            raise UsageError(f"{dict(known)!r} does not identify a model: {wrong}.") from e

    def __str__(self) -> str:
        revision = f"revision {self.revision}" if self.revision else "revision not known"
        shape = [
            *([f"{self.n_layers} layers"] if self.n_layers is not None else []),
            *([f"width {self.d_model}"] if self.d_model is not None else []),
        ]
        return ", ".join(
            [self.name or "unnamed", revision, *([self.quantisation] if self.quantisation else []), *shape]
        )


def quantisation_of(model_config: Any) -> str:
    """Method and bits from a model's ``quantization_config``; "" when it has none."""
    config = getattr(model_config, "quantization_config", None)
    if config is None:
        return ""
    known = config if isinstance(config, Mapping) else config.to_dict()
    method = known.get("quant_method") or known.get("quant_type") or type(config).__name__
    return f"{getattr(method, 'value', method)} {_bits(known)}".strip()


def _bits(config: Mapping[str, Any]) -> str:
    """As far as the common methods say it: "4-bit", or their own word for the weights' type, or ""."""
    for bits in (4, 8):
        if config.get(f"load_in_{bits}bit"):
            return f"{bits}-bit"
    groups = (config.get("config_groups") or {}).values()
    grouped = {(group.get("weights") or {}).get("num_bits") for group in groups if isinstance(group, Mapping)}
    found = {str(bits) for bits in (config.get("bits"), *grouped) if bits is not None}
    if found:
        return "/".join(sorted(found)) + "-bit"
    weights = config.get("weights", config.get("weights_dtype"))
    return weights if isinstance(weights, str) else ""
