"""A model that is held while an engine runs it: which token belongs to which request, and what is done to it.

Contract:

1. :meth:`HeldModel.begin` hears of requests that start and end, :meth:`HeldModel.fill` of the rows of the next forward.
   One vectorised copy brings them to the device; padding gets slot 0, which is off.
2. A request runs under the content that its ticket names until it ends. A ticket whose content is not in the bank, or a
   request without one, ends the engine: nothing is served unheld.
3. Every position of a reply counts once, however often it is fed: after a preemption only positions beyond the highest
   one seen are new.
4. What a request collected is handed out once. It is kept from the end of the request until then, on the host; of
   requests whose answer nobody fetches (they were aborted) only the newest are kept.
5. Buffers are allocated when the model is loaded, so that an engine that measures its memory counts them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_axis.errors import PersonaAxisError, UsageError
from persona_axis.serve.vllm.bank import Bank, Entry
from persona_axis.serve.vllm.keys import Ticket
from persona_axis.serve.vllm.sums import Sums, read_saved
from persona_axis.steering.op import change_rows, intervene_

KEPT_RESULTS = 64  # at least; twice the places for activations where these are more


@dataclass(eq=False)
class Running:
    """A request in the engine."""

    ticket: Ticket
    prompt_tokens: int
    entry: Entry | None = None  # None is off
    place: int | None = None  # where its activations are summed
    seen: int = 0  # reply positions that were fed
    projections: list[tuple[Tensor, int]] = field(default_factory=list)  # of each: [layers, requests, k], which request
    fetched: bool = False
    failure: str = ""  # why its collected data are not to be had
    saved: tuple[Tensor, Tensor] | None = None  # its sums, when the place is somebody else's

    @property
    def slot(self) -> int:
        return 0 if self.entry is None else self.entry.slot_for(self.ticket.strength)

    @property
    def collects(self) -> bool:
        return self.ticket.capture or self.ticket.projections


class HeldModel:
    """Args: ``rows`` is the most tokens of one forward, padding included."""

    def __init__(self, bank: Bank, rows: int, places: int) -> None:
        device = bank.V.device
        self.bank = bank
        self.capacity = rows
        n, k = len(bank.layers), bank.max_directions
        self.sums = Sums(n, places, bank.d_model, device)
        # What each row of the next forward is: slot, row of the recent activations, strength. One array, one copy.
        self._host = torch.zeros(3, rows, dtype=torch.int32)
        self._slots, self._captured = self._host[0].numpy(), self._host[1].numpy()
        self._strength = self._host[2].view(torch.float32).numpy()
        self._device = self._host if device.type == "cpu" else self._host.to(device)
        self.strength = self._device[2].view(torch.float32)
        self.slots = torch.zeros(n, rows, dtype=torch.int32, device=device)  # of each layer: 0 where it has no part
        self.projections = torch.zeros(n, rows, k, device=device)
        self._kept = max(KEPT_RESULTS, 2 * places)
        self._place_of = {layer: i for i, layer in enumerate(bank.layers)}
        self._running: dict[str, Running] = {}
        self._ended: OrderedDict[str, Running] = OrderedDict()
        self._reports: dict[str, dict[str, Any]] = {}
        self._warming_up = False
        # Of the next forward, known on the host: its rows, which layers have anything to do, what is captured.
        self._rows: int | None = None  # any number
        self._active: set[int] = set()
        self._capturing: Tensor | None = None  # the rows, on the host
        self._watching: list[tuple[Running, int]] = []  # whose row's projections are to be collected

    # ---- requests ------------------------------------------------------------------------------------------------

    def begin(self, ended: Iterable[str], started: Iterable[tuple[str, Mapping[str, Any] | None, int]]) -> None:
        """Requests that ended since the last forward, and those that start, as (id, ticket, prompt tokens).

        Raises:
            PersonaAxisError: a request without a ticket, or a ticket for content that is not in the bank.
        """
        for request in ended:
            self._end(request)
        for request, given, prompt_tokens in started:
            if request not in self._running:  # resumed after a preemption, it is known
                self._start(request, given, prompt_tokens)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Requests that start in here are made up by the engine itself: they need no ticket, and are nobody's."""
        self._warming_up = True
        try:
            yield
        finally:
            self._warming_up = False
            self.take_reports()
            self.clear()

    def _start(self, request: str, given: Mapping[str, Any] | None, prompt_tokens: int) -> None:
        if given is None and self._warming_up:
            given = {}
        if given is None:
            raise PersonaAxisError(
                f"Request {request} came without a ticket: the front end runs without the persona-axis plugin, or "
                "another version of it. Nothing is served unheld; load it there too (VLLM_PLUGINS), or set "
                "PERSONA_AXIS_DISABLE=1 in every process."
            )
        ticket = Ticket(**given)
        running = Running(ticket, prompt_tokens)
        if ticket.content_hash:
            try:
                running.entry = self.bank[ticket.content_hash]
            except KeyError:
                raise PersonaAxisError(
                    f"Request {request} is to run under policy {ticket.policy!r} ({ticket.content_hash[:12]}), which "
                    f"this worker does not hold (it has {', '.join(self.bank.loaded) or 'none'})."
                ) from None
            running.entry.users += 1
        if ticket.capture:
            running.place = self.sums.take()
            if running.place is None:
                running.failure = (
                    f"all {self.sums.total.shape[1]} places for activations were taken when it started. Start the "
                    "engine with more (PERSONA_AXIS_MAX_CAPTURES), or ask for fewer at a time."
                )
        self._running[request] = running
        self._reports[request] = {
            "policy": ticket.policy,
            "content_hash": ticket.content_hash if ticket.changes else "",
            "strength": ticket.strength,
            "request": request,
            "collects": running.collects,
        }

    def _end(self, request: str) -> None:
        running = self._running.pop(request, None)
        if running is None:
            return
        self._collect()
        if running.entry is not None:
            running.entry.users -= 1
        if running.place is not None:
            running.saved = self.sums.save(running.place)
            self.sums.give_back(running.place)
            running.place = None
        if running.collects and not running.fetched:
            self._ended[request] = running
            while len(self._ended) > self._kept:
                self._ended.popitem(last=False)

    def take_reports(self) -> dict[str, dict[str, Any]]:
        """What this worker holds each request with that started since the last call."""
        reports, self._reports = self._reports, {}
        return reports

    def fetch(self, request: str, count: int) -> dict[str, Any]:
        """What a request collected over the first ``count`` tokens of its reply, once.

        Returns:
            ``layers``, and as asked ``activation_sum [layers, d_model]`` float32, and
            ``projections``: layer -> ``[tokens, directions]``; arrays as (shape, bytes). ``error`` instead when it is
            not to be had.
        """
        self._collect()
        running = self._ended.pop(request, None)
        if running is None and request in self._running:
            running = self._running[request]
            if running.fetched:
                running = None
            elif running.place is not None:
                running.saved = self.sums.save(running.place)
        if running is None:
            return {"error": f"nothing is kept of request {request}: it did not ask, or was fetched, or is too old."}
        running.fetched = True
        try:
            return self._result(running, count)
        except PersonaAxisError as e:
            return {"error": str(e)}

    def _result(self, running: Running, count: int) -> dict[str, Any]:
        if running.failure:
            raise PersonaAxisError(f"Nothing was collected for this request: {running.failure}")
        result: dict[str, Any] = {"layers": list(self.bank.layers)}
        if running.ticket.capture:
            result["activation_sum"] = _packed(read_saved(_there(running.saved), running.seen, count))
        if running.ticket.projections:
            entry = _there(running.entry)
            if count > len(running.projections):
                raise PersonaAxisError(f"{count} tokens of the reply count, but {len(running.projections)} were fed.")
            columns = [step[:, column] for step, column in running.projections[:count]]
            tokens = (
                torch.stack(columns).cpu() if columns else self.projections.new_zeros(0, 1, 1)
            )  # [tokens, layers, k]
            result["projections"] = {
                str(layer): _packed(tokens[:, self._place_of[layer], :k] if columns else torch.zeros(0, k))
                for layer, k in entry.directions.items()
                if layer in self._place_of
            }
        return result

    # ---- a forward -----------------------------------------------------------------------------------------------

    def fill(self, requests: Sequence[str], starts: np.ndarray, computed: np.ndarray, padded: int) -> None:
        """Say what the rows of the next forward are.

        Args:
            requests: ids, in the order of the batch.
            starts: ``[requests + 1]``, the first row of each, and the end.
            computed: ``[requests]``, how many of its tokens were fed before.
            padded: rows of the forward; those beyond the last request's are padding.

        Raises:
            UsageError: more rows than there is room for.
            PersonaAxisError: a request that never started.
        """
        self._collect()
        n = len(requests)
        total = int(starts[n])
        if max(total, padded) > self.capacity:
            raise UsageError(f"A forward of {max(total, padded)} tokens, but the plugin made room for {self.capacity}.")
        unknown = [request for request in requests if request not in self._running]
        if unknown:
            raise PersonaAxisError(f"Request {unknown[0]} is run, but never started: nothing is served unheld.")
        running = [self._running[request] for request in requests]
        counts = np.diff(starts[: n + 1])
        self._slots[total:padded] = 0
        self._captured[:padded] = 0
        self._strength[:padded] = 1
        self._slots[:total] = np.repeat([r.slot for r in running], counts)
        self._strength[:total] = np.repeat([r.ticket.strength for r in running], counts)
        self._prompts_off(running, starts, computed)
        self._admit(running, starts, computed)
        self._active = {layer for r in running if r.entry is not None for layer in r.entry.layers}
        self._rows = padded
        self._copy(padded)

    def clear(self) -> None:
        """The next forward is nobody's: a dummy, a warm-up, a capture of graphs."""
        self._collect()
        self._host.zero_()
        self._rows = None
        self._active, self._capturing = set(), None
        self._copy(self.capacity)

    def _copy(self, rows: int) -> None:
        if self._device is not self._host:
            # Pinned anew: the next step may be filled in while this copy still waits for the device.
            self._device[:, :rows].copy_(self._host[:, :rows].pin_memory(), non_blocking=True)
        self.slots[:, :rows] = self.bank.touches.index_select(1, self._device[0, :rows])

    def _prompts_off(self, running: list[Running], starts: np.ndarray, computed: np.ndarray) -> None:
        """Policies for generated tokens alone leave the prompt's as they are."""
        for r, start, end, done in zip(running, starts, starts[1:], computed, strict=False):
            if r.entry is not None and r.entry.decode_only:
                self._slots[start : min(end, start + max(0, r.prompt_tokens - done))] = 0

    def _admit(self, running: list[Running], starts: np.ndarray, computed: np.ndarray) -> None:
        """Reply positions that are fed for the first time: a row of the sums for each, and their projections kept."""
        places, tokens, rows = [], [], []
        for r, start, end, done in zip(running, starts, starts[1:], computed, strict=False):
            if not r.collects or r.failure:
                continue
            first = r.prompt_tokens + r.seen - int(done)  # the new position's row among this request's
            fresh = range(int(start) + first, int(end))
            if first < 0 and len(fresh):
                r.failure = "some of its positions were not computed by this engine (a cache filled elsewhere)."
            elif len(fresh) > 1:
                r.failure = (
                    "several of its tokens were fed at once, as in speculative decoding, which is not supported."
                )
            if r.failure or not len(fresh):
                continue
            if r.place is not None:
                places.append(r.place)
                tokens.append(r.seen)
                rows.append(fresh[0])
            if r.ticket.projections:
                self._watching.append((r, fresh[0]))
            r.seen += 1
        self._capturing = torch.tensor(rows) if rows else None
        if rows:
            self._captured[rows] = self.sums.admit(places, tokens)

    def _collect(self) -> None:
        """Keep the last forward's projections before they are overwritten."""
        if not self._watching:
            return
        rows = torch.tensor([row for _, row in self._watching], device=self.projections.device)
        step = self.projections.index_select(1, rows)
        for column, (r, _) in enumerate(self._watching):
            r.projections.append((step, column))
        self._watching = []

    def run(self, hidden: Tensor, residual: Tensor | None, layer: int) -> None:
        """What the operator does after decoder layer ``layer``: ``hidden [rows, d_model]`` is changed in place."""
        if len(hidden) > self.capacity:
            raise UsageError(f"A forward of {len(hidden)} tokens, but the plugin made room for {self.capacity}.")
        if self._rows is not None and len(hidden) != self._rows:
            raise PersonaAxisError(
                f"Layer {layer} has {len(hidden)} rows in a forward of {self._rows}: its tokens are spread over "
                "processes or parts of a batch, which the plugin cannot tell apart."
            )
        run = self._run_needed if hidden.device.type == "cpu" else self._run_all
        run(hidden, residual, layer)

    def _run_all(self, hidden: Tensor, residual: Tensor | None, layer: int) -> None:
        """One launch, whatever the batch: a CUDA graph replays it for others."""
        i = self._place_of[layer]
        sums, captured = self.sums.recent[i], self._device[1]
        intervene_(hidden, *self._policy(i), residual, sums, captured, self.projections[i], self.strength)

    def _run_needed(self, hidden: Tensor, residual: Tensor | None, layer: int) -> None:
        """What this batch needs at this layer."""
        i = self._place_of[layer]
        if layer in self._active:
            projections = self.projections[i] if self._watching else None
            change_rows(hidden, *self._policy(i), residual, projections=projections, strength=self.strength)
        if self._capturing is not None:
            rows = self._capturing
            stream = hidden[rows].float() if residual is None else hidden[rows].float() + residual[rows].float()
            self.sums.recent[i].index_add_(0, self._host[1, rows], stream)

    def _policy(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        bank = self.bank
        return bank.V[i], bank.lo[i], bank.hi[i], bank.shift[i], self.slots[i]


def _there(thing: Any) -> Any:
    if thing is None:
        raise AssertionError("a request that collects has what it collects into")
    return thing


def _packed(t: Tensor) -> tuple[list[int], bytes]:
    """An array as what any transport carries; read by :func:`unpacked`."""
    return list(t.shape), t.contiguous().numpy().astype("<f4").tobytes()


def unpacked(packed: Sequence[Any]) -> np.ndarray:
    """float32, of the shape that was packed."""
    shape, content = packed
    return np.frombuffer(content, dtype="<f4").reshape(shape).copy()
