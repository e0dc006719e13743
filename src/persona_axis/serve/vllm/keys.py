"""What a request may ask for, and what it then runs under.

A request says so in flat keys, the same in ``SamplingParams.extra_args`` and in the ``vllm_xargs`` of an HTTP request
(which takes scalars only). The front end turns them into a :class:`Ticket`, which travels to the worker with the
request: the worker holds what the ticket says, or fails.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from persona_axis.errors import UsageError
from persona_axis.serve.vllm.options import OFF

TICKET = "persona_axis"  # the key under which a ticket travels, and a report comes back
POLICY, STRENGTH = "persona_axis_policy", "persona_axis_strength"
CAPTURE, PROJECTIONS = "persona_axis_capture", "persona_axis_projections"
KEYS = (POLICY, STRENGTH, CAPTURE, PROJECTIONS)
SMALLEST, LARGEST = 2.0**-126, 3.4e38  # strengths are float32 in the worker: others would be 0 there, or infinite


@dataclass(frozen=True)
class Asked:
    """The keys of a request; ``policy`` None leaves the choice to the server."""

    policy: str | None = None
    strength: float = 1.0
    capture: bool = False
    projections: bool = False


@dataclass(frozen=True)
class Offer:
    """A policy as the front end knows it. ``only_adds``: it has no bounds, so that a strength means something."""

    content_hash: str
    only_adds: bool


@dataclass(frozen=True)
class Ticket:
    """What a request runs under.

    Attributes:
        policy: its name, or "off".
        content_hash: of the policy whose directions are meant; "" when none is.
        strength: by which shifts are multiplied; 0 leaves the stream as it is.
        capture: whether the activations of the reply are summed.
        projections: whether the reply's projections on the policy's directions are returned, token by token.
    """

    policy: str = OFF
    content_hash: str = ""
    strength: float = 0.0
    capture: bool = False
    projections: bool = False

    @property
    def changes(self) -> bool:
        return bool(self.content_hash) and self.strength != 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def asked(extra: Mapping[str, Any] | None) -> Asked:
    """The keys in a request's extra arguments; other people's are left alone.

    Raises:
        UsageError: a key beginning with ``persona_axis`` that is none of the four, or a value that it cannot have.
    """
    ours = {key: value for key, value in (extra or {}).items() if key.startswith("persona_axis")}
    unknown = sorted(set(ours) - set(KEYS))
    if unknown:
        raise UsageError(f"Unknown key {', '.join(unknown)}; a request may have {', '.join(KEYS)}.")
    policy = ours.get(POLICY)
    if policy is not None and not isinstance(policy, str):
        raise UsageError(f"{POLICY} is {policy!r}: expected the name of a policy, or {OFF!r}.")
    return Asked(policy, _strength(ours.get(STRENGTH, 1.0)), _switch(ours, CAPTURE), _switch(ours, PROJECTIONS))


def ticket(wish: Asked, offers: Mapping[str, Offer], default: str | None) -> Ticket:
    """What a request that asked for ``wish`` runs under.

    Projections of a request that is off are on the directions of the server's default policy, or of its only one.

    Raises:
        UsageError: a policy that is not loaded, a strength that it cannot have, or projections on nothing.
    """
    name = wish.policy if wish.policy is not None else (default or OFF)
    if name != OFF and name not in offers:
        loaded = ", ".join(sorted(offers)) or "none"
        raise UsageError(f"{POLICY}={name!r}: there is no such policy (loaded: {loaded}). {OFF!r} runs without one.")
    strength = wish.strength if name != OFF else 0.0
    if strength not in (0, 1) and not offers[name].only_adds:
        raise UsageError(
            f"{STRENGTH}={wish.strength:g}: the policy {name!r} has bounds, which hold (1) or do not (0). Strengths "
            "in between, or beyond, are for policies that only add directions."
        )
    if strength == 0 and not wish.projections:
        return Ticket(name, "", 0.0, wish.capture)
    meant = name if name != OFF else _watched(offers, default)
    return Ticket(name, offers[meant].content_hash, strength, wish.capture, wish.projections)


def salted(salt: str | None, given: Ticket) -> str | None:
    """The prefix-cache salt of a request: blocks computed under different policies are never shared.

    Requests that change nothing keep the user's own, and with it the blocks of an unheld model.
    """
    if not given.changes:
        return salt
    return hashlib.sha256(json.dumps([salt, given.content_hash, given.strength]).encode()).hexdigest()


def _watched(offers: Mapping[str, Offer], default: str | None) -> str:
    if default is not None:
        return default
    if len(offers) == 1:
        return next(iter(offers))
    if not offers:
        raise UsageError(f"{PROJECTIONS}=1, but no policy is loaded on whose directions one could project.")
    raise UsageError(
        f"{PROJECTIONS}=1 needs to know on whose directions: name the policy with {POLICY}, and {STRENGTH}=0 to only "
        f"watch (loaded: {', '.join(sorted(offers))})."
    )


def _strength(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (value == 0 or SMALLEST <= abs(value) <= LARGEST):
        raise UsageError(f"{STRENGTH} is {value!r}: expected a number that float32 can hold.")
    return float(value)


def _switch(ours: Mapping[str, Any], key: str) -> bool:
    value = ours.get(key, 0)
    if not isinstance(value, (int, float)) or value not in (0, 1):
        raise UsageError(f"{key} is {value!r}: expected 0 or 1.")
    return bool(value)
