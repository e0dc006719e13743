"""Loading the model that an axis was made on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persona_axis.errors import UsageError
from persona_axis.files.atomic import read_json
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import COMMIT, EMBEDDED_NAME, HUB_ID, ModelIdentity
from persona_axis.model.loading import ChatModel, load_model


def load_origin(
    path: str | Path, axis: Axis, model: str | None = None, dtype: str = "auto", device: str = "auto"
) -> ChatModel:
    """The model named, else the one that made the axis.

    Args:
        path: of the axis. A run folder says how its model was loaded: name, revision and chat template.
        axis: read from there. One without its run says the model's name, which can be loaded when it is the embedded
            model's or a hub id.
        model, dtype, device: as :func:`load_model` takes them.

    Raises:
        UsageError: the axis does not say a model that can be loaded by name.
        ModelError, TemplateError, MissingDependency: as :func:`load_model`.
    """
    named = {"model": model} if model is not None else _of_run(Path(path)) or _of_axis(axis)
    return load_model(**named, dtype=dtype, device=device)


def differences(axis: Axis, chat: ChatModel) -> str:
    """A sentence when a loaded model is another than the one that made an axis; "" when nothing says so."""
    made_on = ModelIdentity.recorded(axis.metadata, axis.vectors.shape[1])
    loaded = ModelIdentity.of(chat)
    if made_on is None:
        return ""
    same_weights = bool(made_on.revision) and made_on.revision == loaded.revision
    differs = made_on.revision and loaded.revision and made_on.revision != loaded.revision
    if differs or (made_on.name != loaded.name and not same_weights):
        return f"This axis was made on another model ({made_on}); loaded is {loaded}. Projections mean little there."
    return ""


def _of_run(folder: Path) -> dict[str, Any]:
    """How a run loaded its model; {} when there is no run."""
    file = folder / "run.json"
    if not file.is_file():
        return {}
    known = read_json(file)["generation"]
    return {name: known[name] for name in ("model", "revision", "chat_template")}


def _of_axis(axis: Axis) -> dict[str, Any]:
    name, revision = str(axis.metadata.get("model") or ""), str(axis.metadata.get("revision") or "")
    if EMBEDDED_NAME.fullmatch(name):
        return {"model": "embedded"}
    if HUB_ID.fullmatch(name):
        return {"model": name, "revision": revision if COMMIT.fullmatch(revision) else None}
    said = f"says only that its model was called {name!r}" if name else "does not say its model"
    raise UsageError(f"This axis {said}. Name the model: --model (a hub id, a folder, a .gguf file, or 'embedded').")
