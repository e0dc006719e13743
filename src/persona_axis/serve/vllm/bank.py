"""The policy bank: every loaded policy's directions and bounds in persistent tensors, one slot each.

Contract:

1. The tensors are allocated once and never moved: compiled code and CUDA graphs read them where they are, so a policy
   is loaded by writing into a free slot.
2. A slot's content does not change while a request uses it. Loading another policy under a name takes a new slot; the
   old one is free again when its last request has ended, and is reused last of all, so that requests on their way still
   find it.
3. Each policy has two slots: one that holds, and one that only watches (the same directions, no bounds), for requests
   that want projections of an unchanged stream. Slot 0 is off.
4. What does not fit (more directions, slots or layers than there are; bounds for one batch; positions that a server
   cannot tell) is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from persona_axis.errors import UsageError
from persona_axis.steering.policy import Policy

HOLD, WATCH = 0, 1  # the two slots of an entry, in this order
POSITIONS = ("all", "decode")


@dataclass(eq=False)
class Entry:
    """A policy in the bank."""

    name: str
    content_hash: str
    slot: int  # that holds; the next one watches
    layers: tuple[int, ...]
    directions: dict[int, int]  # layer -> how many
    decode_only: bool
    users: int = 0  # requests that run under it
    retired: bool = False  # replaced or unloaded

    def slot_for(self, strength: float) -> int:
        return self.slot + (WATCH if strength == 0 else HOLD)


class Bank:
    """Args: ``layers`` are those of this process, global numbers; a policy's other layers are held elsewhere.

    Attributes:
        V: ``[layers, slots, k, d_model]`` float32. lo, hi, shift: ``[layers, slots, k]`` float32.
        touches: ``[layers, slots]`` int32, the slot itself where its policy has a part at the layer, else 0 (off).
    """

    def __init__(
        self,
        layers: Iterable[int],
        n_layers: int,
        d_model: int,
        max_policies: int,
        max_directions: int,
        device: torch.device,
    ) -> None:
        self.layers = tuple(layers)
        self.n_layers, self.d_model = n_layers, d_model
        self.max_policies, self.max_directions = max_policies, max_directions
        slots = 1 + 2 * max_policies
        size = (len(self.layers), slots, max_directions)
        self.V = torch.zeros(*size, d_model, device=device)
        self.lo = torch.full(size, -math.inf, device=device)
        self.hi = torch.full(size, math.inf, device=device)
        self.shift = torch.zeros(size, device=device)
        self.touches = torch.zeros(size[:2], dtype=torch.int32, device=device)
        self._entries: list[Entry] = []  # oldest first
        self._free = list(range(1, slots, 2))

    def __getitem__(self, content_hash: str) -> Entry:
        """The entry of a policy's content. Raises KeyError."""
        found = [entry for entry in self._entries if entry.content_hash == content_hash]
        if not found:
            raise KeyError(content_hash)
        return found[-1]

    @property
    def loaded(self) -> dict[str, str]:
        """Name -> content hash of what requests can ask for."""
        return {entry.name: entry.content_hash for entry in self._entries if not entry.retired}

    def load(self, name: str, policy: Policy) -> Entry:
        """Put a policy under a name, replacing what has it. The same content again changes nothing.

        Raises:
            UsageError: it does not fit.
        """
        current = self._named(name)
        if current is not None and current.content_hash == policy.content_hash:
            return current
        self._check(name, policy)
        slot = self._take_slot(name)
        if current is not None:
            current.retired = True
        entry = Entry(
            name,
            policy.content_hash,
            slot,
            policy.layers,
            {part.layer: len(part.V) for part in policy.interventions},
            policy.positions == "decode",
        )
        self._write(entry, policy)
        self._entries.append(entry)
        return entry

    def unload(self, name: str) -> None:
        """Requests that run under it go on. Raises UsageError for a name that is not loaded."""
        entry = self._named(name)
        if entry is None:
            raise UsageError(f"No policy {name!r} is loaded (loaded: {', '.join(self.loaded) or 'none'}).")
        entry.retired = True

    def _named(self, name: str) -> Entry | None:
        return next((e for e in self._entries if e.name == name and not e.retired), None)

    def _check(self, name: str, policy: Policy) -> None:
        where = f"Policy {name!r}"
        if policy.positions not in POSITIONS:
            raise UsageError(
                f"{where} is for positions {policy.positions!r}. A server sees tokens, not turns: it can hold "
                f"{' or '.join(POSITIONS)}. Make the policy for one of these."
            )
        for part in policy.interventions:
            if part.batch is not None:
                raise UsageError(
                    f"{where} has bounds for {part.batch} sequences of one batch; a server needs one each."
                )
            if not 0 <= part.layer < self.n_layers:
                raise UsageError(f"{where} names layer {part.layer}; the model has 0 to {self.n_layers - 1}.")
            k, width = part.V.shape
            if width != self.d_model:
                raise UsageError(f"{where} has directions of width {width}; the model's residual has {self.d_model}.")
            if k > self.max_directions:
                raise UsageError(
                    f"{where} has {k} directions at layer {part.layer}; the bank has room for {self.max_directions}. "
                    f"Start the server with --max-directions {k} (PERSONA_AXIS_MAX_DIRECTIONS={k})."
                )

    def _take_slot(self, name: str) -> int:
        if self._free:
            return self._free.pop(0)
        for entry in self._entries:
            if entry.retired and not entry.users:
                self._entries.remove(entry)
                return entry.slot
        running = sum(1 for entry in self._entries if entry.retired)
        raise UsageError(
            f"Policy {name!r} finds no slot: all {self.max_policies} are taken"
            + (f", {running} of them by replaced policies that requests still run under" if running else "")
            + f". Start the server with --max-policies {self.max_policies + 1} or more (PERSONA_AXIS_MAX_POLICIES)."
        )

    def _write(self, entry: Entry, policy: Policy) -> None:
        parts = {part.layer: part for part in policy.interventions}
        for i, layer in enumerate(self.layers):
            for slot in (entry.slot + HOLD, entry.slot + WATCH):
                self.V[i, slot] = 0
                self.lo[i, slot], self.hi[i, slot], self.shift[i, slot] = -math.inf, math.inf, 0
                self.touches[i, slot] = 0
                if layer in parts:
                    k = len(parts[layer].V)
                    self.V[i, slot, :k] = parts[layer].V.to(self.V)
                    self.touches[i, slot] = slot
                    if slot == entry.slot + HOLD:
                        for name in ("lo", "hi", "shift"):
                            getattr(self, name)[i, slot, :k] = getattr(parts[layer], name).to(self.V)


def bank_hash(loaded: Mapping[str, str]) -> str:
    """One hash over names and contents, to compare processes by."""
    return hashlib.sha256(json.dumps(sorted(loaded.items())).encode()).hexdigest()
