"""How the plugin is configured: by environment variables, which every process that vLLM starts inherits."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_axis.errors import UsageError

PREFIX = "PERSONA_AXIS_"
OFF = "off"  # what a request names that is not to be held
ELSEWHERE = {"CACHE"}  # variables of the package that are not the plugin's
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Options:
    """What the operator of a server asks for.

    Attributes:
        policies: a policy folder, or a folder of policy folders, each named after its folder; None is no policy.
        default: what requests that name no policy run under; None is off.
        max_policies: slots of the bank: policies that are loaded, or were replaced and still have requests.
        max_directions: directions a policy may have at a layer.
        max_captures: requests whose activations are summed at one time.
        allow_model: name of the served model, to hold it with policies made for another one of the same shape.
        model_name: what policies call the served model, when that is not its Hub id or the name of its folder.
    """

    policies: Path | None = None
    default: str | None = None
    max_policies: int = 8
    max_directions: int = 1
    max_captures: int = 64
    allow_model: str | None = None
    model_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_policies", "max_directions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{PREFIX}{name.upper()} must be at least 1, not {getattr(self, name)}.")
        if self.max_captures < 0:
            raise UsageError(f"{PREFIX}MAX_CAPTURES must be 0 or more, not {self.max_captures}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Options:
        """Raises UsageError for a value that is no such thing, and for names it does not know: a misspelt
        ``PERSONA_AXIS_POLICY`` must not serve an unheld model."""
        given = {
            name.removeprefix(PREFIX): value
            for name, value in environment.items()
            if name.startswith(PREFIX) and value != ""
        }
        known: dict[str, Callable[[str], Any]] = {
            "POLICIES": lambda v: Path(v).expanduser(),
            "DEFAULT": str,
            "MAX_POLICIES": _count,
            "MAX_DIRECTIONS": _count,
            "MAX_CAPTURES": _count,
            "ALLOW_MODEL": str,
            "MODEL_NAME": str,
        }
        switch = given.pop("DISABLE", "0")
        if switch not in ("0", "1"):
            raise UsageError(f"{PREFIX}DISABLE={switch!r}: expected 0 or 1.")
        unknown = sorted(set(given) - set(known) - ELSEWHERE)
        if unknown:
            raise UsageError(
                f"Unknown variable {', '.join(PREFIX + name for name in unknown)}. The vLLM plugin knows "
                f"{', '.join(PREFIX + name for name in (*known, 'DISABLE'))}."
            )
        values: dict[str, Any] = {}
        for name, read in known.items():
            if name in given:
                try:
                    values[name.lower()] = read(given[name])
                except ValueError as e:
                    raise UsageError(f"{PREFIX}{name}={given[name]!r}: {e}.") from e
        if values.get("default") == OFF:
            values["default"] = None
        if "default" in values and values["default"] is not None and "policies" not in values:
            raise UsageError(
                f"{PREFIX}DEFAULT={values['default']} names a policy, but {PREFIX}POLICIES names no folder of them."
            )
        return cls(**values)

    def policy_folders(self) -> dict[str, Path]:
        """Name -> folder, by name.

        Raises:
            UsageError: no policy there, a name that a request could not say, or a default that is not among them.
        """
        from persona_axis.steering.artifact import holds_policy

        if self.policies is None:
            return {}
        if not self.policies.is_dir():
            raise UsageError(f"{PREFIX}POLICIES={self.policies} is not a folder.")
        here = self.policies.resolve()
        folders = [here] if holds_policy(here) else sorted(f for f in here.iterdir() if f.is_dir() and holds_policy(f))
        if not folders:
            raise UsageError(f"{PREFIX}POLICIES={self.policies}: no policy there, nor in a folder below it.")
        found = {checked_name(folder.name): folder for folder in folders}
        if self.default is not None and self.default not in found:
            raise UsageError(f"{PREFIX}DEFAULT={self.default}: there is no such policy; loaded are {', '.join(found)}.")
        return found


def checked_name(name: str) -> str:
    """A name that a request can say. Raises UsageError for others."""
    if name == OFF or not _NAME.fullmatch(name):
        raise UsageError(
            f"A policy cannot be served as {name!r}: use letters, digits, '.', '_' and '-', and not 'off'."
        )
    return name


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("expected a whole number")
    return int(text)
