"""Find the Assistant Axis of a chat model, see persona drift along it, steer it, hold it.

Everything here is loaded when it is first used: importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_axis.catalog.catalog import Catalog, load_catalog
    from persona_axis.collect.fitting import FitResult
    from persona_axis.geometry.axis import Axis
    from persona_axis.geometry.space import PersonaSpace
    from persona_axis.model.loading import ChatModel, load_model
    from persona_axis.model.reading import TurnReading, read_conversation
    from persona_axis.pipeline import RunResult, RunSettings, calibrate, run
    from persona_axis.steering.hooks import cap, steer
    from persona_axis.steering.policy import Policy

__version__ = "0.1.0"

_HOME = {
    "Axis": "geometry.axis",
    "Catalog": "catalog.catalog",
    "ChatModel": "model.loading",
    "FitResult": "collect.fitting",
    "PersonaSpace": "geometry.space",
    "Policy": "steering.policy",
    "RunResult": "pipeline",
    "RunSettings": "pipeline",
    "TurnReading": "model.reading",
    "calibrate": "pipeline",
    "cap": "steering.hooks",
    "load_catalog": "catalog.catalog",
    "load_model": "model.loading",
    "read_conversation": "model.reading",
    "run": "pipeline",
    "steer": "steering.hooks",
}

__all__ = [
    "Axis",
    "Catalog",
    "ChatModel",
    "FitResult",
    "PersonaSpace",
    "Policy",
    "RunResult",
    "RunSettings",
    "TurnReading",
    "calibrate",
    "cap",
    "load_catalog",
    "load_model",
    "read_conversation",
    "run",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'persona_axis' has no attribute {name!r}")
    return getattr(import_module(f"persona_axis.{_HOME[name]}"), name)
