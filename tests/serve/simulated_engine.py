"""A small engine that runs requests on a held model, and what that model should do, token by token in float64.

The engine does what vLLM's may: it feeds prompts in chunks, batches in any order, pads, finds prompts in a cache, takes
requests out and feeds them anew, runs past the end of a reply before it knows of it, aborts, replaces policies, and
runs forwards that are nobody's. The streams that it feeds are random, other ones each time that a position is fed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from small_policies import WIDTH, made
from torch import Tensor

from persona_axis.serve.vllm.bank import Bank
from persona_axis.serve.vllm.held import HeldModel, unpacked
from persona_axis.serve.vllm.keys import Ticket
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.policy import Policy

N_LAYERS, CAPACITY, DIRECTIONS = 3, 24, 2
IDS = ("1", "11", "111", "1-1", "0_1", "01", "0", "1-")  # some begin with others
NAMES = ("a", "b", "c")
Batch = Sequence[tuple["Request", int]]  # each with how many tokens of it are fed


@dataclass(eq=False)
class Request:
    """A request, and what was seen of it.

    ``policy`` is the one whose directions are meant, ``reply`` how many tokens it will have, ``overrun`` how many are
    fed beyond those that count, ``aborted_after`` the steps after which it is given up.
    """

    id: str
    ticket: Ticket
    policy: Policy | None
    prompt: int
    reply: int
    overrun: int = 0
    aborted_after: int | None = None
    computed: int = 0
    sampled: int = 0
    starved: bool = False  # no place for its activations was free when it started
    placed: bool = False
    after: list[np.ndarray] = field(default_factory=list)  # of each reply token fed: [layers, WIDTH]
    projected: list[dict[int, np.ndarray]] = field(default_factory=list)  # of each: layer -> [k]

    @property
    def counted(self) -> int:
        return max(0, self.reply - 1)

    @property
    def known(self) -> int:
        """Positions whose token is known and will be fed."""
        return self.prompt + min(self.sampled, self.counted + self.overrun)

    @property
    def ended(self) -> bool:
        return self.sampled > 0 and len(self.after) == self.counted + self.overrun and self.computed == self.known

    def part(self, layer: int, position: int) -> Intervention | None:
        """Of the policy, where it is meant."""
        if self.policy is None or (self.policy.positions == "decode" and position < self.prompt):
            return None
        return next((part for part in self.policy.interventions if part.layer == layer), None)


def change(part: Intervention | None, strength: float, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Projections of one token's stream ``[WIDTH]``, and what is added to it."""
    if part is None:
        return np.zeros(0), np.zeros(WIDTH)
    V, lo, hi, shift = (t.numpy().astype(np.float64) for t in (part.V, part.lo, part.hi, part.shift))
    p = V @ stream
    if strength == 0:
        return p, np.zeros(WIDTH)
    return p, (np.minimum(np.maximum(p, lo), hi) - p + strength * shift) @ V


class Engine:
    """Runs on ``layers`` of a model, by the one launch of GPUs when ``whole``."""

    def __init__(
        self, seed: int, layers: Sequence[int] = range(N_LAYERS), places: int = 8, whole: bool = False
    ) -> None:
        self.random = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.bank = Bank(layers, N_LAYERS, WIDTH, 12, DIRECTIONS, torch.device("cpu"))
        self.held = HeldModel(self.bank, CAPACITY, places)
        self.run: Callable[..., None] = self.held._run_all if whole else self.held.run
        self.free_places = places
        self.policies: dict[str, Policy] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.out: list[Request] = []  # preempted
        self.ended: list[Request] = []  # of which the workers have not been told
        self.answers: list[Request] = []  # of which nobody fetched anything yet

    # ---- policies and requests -----------------------------------------------------------------------------------

    def load(self, name: str) -> None:
        """A random policy under a name, replacing the one that has it."""
        layers = self.random.sample(range(N_LAYERS), self.random.randint(1, N_LAYERS))
        kind, k = self.random.choice(["cap", "band", "add", "all"]), self.random.randint(1, DIRECTIONS)
        positions = self.random.choice(["all", "all", "decode"])
        self.policies[name] = made(self.random.randrange(2**31), layers, kind, k=k, positions=positions)
        self.bank.load(name, self.policies[name])

    def ask(self, id: str, name: str | None, strength: float, capture: bool, projections: bool, **shape: Any) -> None:
        """A request that waits, checked against what is loaded now. ``name`` None is off, watching ``a``."""
        meant = self.policies[name or NAMES[0]]
        strength = strength if name else 0.0
        directed = strength != 0 or projections
        ticket = Ticket(name or "off", meant.content_hash if directed else "", strength, capture, projections)
        self.waiting.append(Request(id, ticket, meant if directed else None, **shape))

    # ---- steps ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.out or self.ended or self.answers)

    def step(self) -> None:
        self._fetch_some()
        self._begin()
        self._forward(self._batch())
        for request in list(self.running):
            if request.aborted_after is not None:
                request.aborted_after -= 1
            if request.ended or request.aborted_after == 0:
                self._end(request)
            elif self.random.random() < 0.1:
                self._preempt(request)
        if self.random.random() < 0.1:
            self._nobodys_forward()

    def _begin(self) -> None:
        new = [self.waiting.pop(0) for _ in range(min(len(self.waiting), self.random.randint(0, 3)))]
        back = [self.out.pop() for _ in range(self.random.randint(0, len(self.out)))]
        told = new + [request for request in back if self.random.random() < 0.5]
        for request in self.ended:
            self.free_places += request.placed
        for request in new:
            request.computed = self.random.choice([0, self.random.randrange(request.prompt)])  # found in a cache
            request.starved = request.ticket.capture and self.free_places == 0
            request.placed = request.ticket.capture and not request.starved
            self.free_places -= request.placed
        self.held.begin([r.id for r in self.ended], [(r.id, r.ticket.to_dict(), r.prompt) for r in told])
        self.ended = []
        self.running += new + back
        assert self.held.take_reports() == {r.id: report(r) for r in new}

    def _batch(self) -> list[tuple[Request, int]]:
        room, batch = CAPACITY, []
        for request in self.random.sample(self.running, self.random.randint(0, len(self.running))):
            left = min(request.known - request.computed, room)
            if left:
                batch.append((request, self.random.choice([left, self.random.randint(1, left)])))
                room -= batch[-1][1]
        return batch

    def _preempt(self, request: Request) -> None:
        """Its storage is taken away, but for what others still have in the cache."""
        self.running.remove(request)
        self.out.append(request)
        request.computed = self.random.choice([0, self.random.randint(0, max(0, request.computed - 1))])

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        self.ended.append(request)
        if request.ended:
            self.answers.append(request)

    # ---- forwards ------------------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> None:
        total = sum(n for _, n in batch)
        rows = self.random.choice([total, self.random.randint(total, CAPACITY)])
        self.held.fill(
            [request.id for request, _ in batch],
            np.array([0, *np.cumsum([n for _, n in batch]), 77, -5], dtype=np.int32),  # buffers are longer
            np.array([*(request.computed for request, _ in batch), 99], dtype=np.int32),
            rows,
        )
        tokens = [(request, request.computed + i) for request, n in batch for i in range(n)]
        after = {layer: self._layer(tokens, rows, layer) for layer in self.bank.layers}
        for row, (request, position) in enumerate(tokens):
            if position == request.prompt + len(request.after):
                request.after.append(np.stack([streams[row] for streams, _ in after.values()]))
                request.projected.append({layer: p[row] for layer, (_, p) in after.items()})
        for request, n in batch:
            whole = request.computed + n == request.prompt + request.sampled
            request.computed += n
            request.sampled += whole

    def _layer(
        self, tokens: Sequence[tuple[Request, int]], rows: int, layer: int
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Runs one layer and compares; streams after it, and projections before, of the batch's tokens."""
        hidden, residual = self._stream(rows)
        before = hidden.numpy().copy()
        stream = (hidden.double() if residual is None else hidden.double() + residual.double()).numpy()
        self.run(hidden, residual, layer)
        added, projections = np.zeros_like(stream), []
        for row, (request, position) in enumerate(tokens):
            p, added[row] = change(request.part(layer, position), request.ticket.strength, stream[row])
            projections.append(p)
        np.testing.assert_allclose(hidden.numpy(), before + added, atol=1e-5, rtol=1e-5)
        kept = ~added.any(1)
        assert np.array_equal(hidden.numpy()[kept], before[kept])
        return list(stream + added), projections

    def _stream(self, rows: int) -> tuple[Tensor, Tensor | None]:
        hidden = torch.randn(rows, WIDTH, generator=self.noise)
        return hidden, torch.randn(rows, WIDTH, generator=self.noise) if self.random.random() < 0.7 else None

    def _nobodys_forward(self) -> None:
        self.held.clear()
        rows = self.random.randint(1, CAPACITY)
        for layer in self.bank.layers:
            hidden, residual = self._stream(rows)
            before = hidden.clone()
            self.run(hidden, residual, layer)
            assert torch.equal(hidden, before)

    # ---- what was collected --------------------------------------------------------------------------------------

    def _fetch_some(self) -> None:
        for request in [r for r in self.answers if self.random.random() < 0.5]:
            self.answers.remove(request)
            if request.ticket.capture or request.ticket.projections:
                self.fetch(request)

    def fetch(self, request: Request) -> None:
        """What the held model says that a request collected, compared; once."""
        from persona_axis.serve.vllm.sums import RECENT

        got = self.held.fetch(request.id, request.counted)
        assert "nothing is kept" in self.held.fetch(request.id, request.counted)["error"]
        if request.starved:
            assert "places for activations were taken" in got["error"]
        elif request.ticket.capture and request.overrun > RECENT:
            assert f"{request.overrun} tokens past the end" in got["error"]
        else:
            self._compare(request, got)

    def _compare(self, request: Request, got: dict[str, Any]) -> None:
        assert got["layers"] == list(self.bank.layers)
        assert ("activation_sum" in got, "projections" in got) == (request.ticket.capture, request.ticket.projections)
        if request.ticket.capture:
            total = np.sum([np.zeros((len(self.bank.layers), WIDTH)), *request.after[: request.counted]], axis=0)
            np.testing.assert_allclose(unpacked(got["activation_sum"]), total, atol=1e-4, rtol=1e-5)
        if request.ticket.projections and request.policy is not None:
            here = [part for part in request.policy.interventions if part.layer in self.bank.layers]
            assert got["projections"].keys() == {str(part.layer) for part in here}
            for part in here:
                wanted = [p[part.layer] for p in request.projected[: request.counted]]
                p = unpacked(got["projections"][str(part.layer)])
                assert p.shape == (request.counted, len(part.V))
                np.testing.assert_allclose(p, np.reshape(wanted, p.shape), atol=1e-5, rtol=1e-5)


def report(request: Request) -> dict[str, Any]:
    """What a worker says of a request that starts."""
    ticket = request.ticket
    return {
        "policy": ticket.policy,
        "content_hash": ticket.content_hash if ticket.strength else "",
        "strength": ticket.strength,
        "request": request.id,
        "collects": ticket.capture or ticket.projections,
    }
