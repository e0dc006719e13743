"""Sums of replies against lists of rows: whatever is interleaved, the sum over the first tokens is theirs, or refused.

The rows hold whole numbers, whose float32 sums are exact.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_axis.errors import PersonaAxisError
from persona_axis.serve.vllm.sums import RECENT, Sums, read_saved

N_LAYERS, PLACES, WIDTH = 2, 3, 4


def some_sums() -> Sums:
    return Sums(N_LAYERS, PLACES, WIDTH, torch.device("cpu"))


@dataclass(eq=False)
class Listed:
    """A request that keeps every token."""

    place: int
    tokens: list[Tensor] = field(default_factory=list)  # [N_LAYERS, WIDTH] each

    def sum(self, count: int) -> Tensor:
        return sum(self.tokens[:count], torch.zeros(N_LAYERS, WIDTH))


def step(sums: Sums, requests: list[Listed], seed: int) -> None:
    """A token of each, written as the operator does: into the rows that ``admit`` says, and nobody's into row 0."""
    new = torch.randint(-99, 99, (len(requests), N_LAYERS, WIDTH), generator=torch.Generator().manual_seed(seed))
    rows = sums.admit([r.place for r in requests], [len(r.tokens) for r in requests])
    for request, row, token in zip(requests, rows, new.float(), strict=True):
        assert row > 0
        sums.recent[:, row] += token
        request.tokens.append(token)
    sums.recent[:, 0] += 1


def fed(sums: Sums, tokens: int) -> Listed:
    place = sums.take()
    assert place is not None
    request = Listed(place)
    for i in range(tokens):
        step(sums, [request], i)
    return request


def assert_reads(sums: Sums, request: Listed) -> None:
    """At every number of tokens that it may be asked for, and at no other."""
    seen = len(request.tokens)
    for count in range(max(0, seen - RECENT), seen + 1):
        assert torch.equal(sums.read(request.place, seen, count), request.sum(count)), (seen, count)
    with pytest.raises(PersonaAxisError, match=f"{seen + 1} tokens .* only {seen} of them"):
        sums.read(request.place, seen, seen + 1)
    if seen > RECENT:
        with pytest.raises(PersonaAxisError, match=f"ran {RECENT + 1} tokens past the end"):
            sums.read(request.place, seen, seen - RECENT - 1)


@given(st.integers(0, 2**32), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_any_interleaving_sums_each_request_alone(seed: int, steps: int) -> None:
    choose, sums = random.Random(seed), some_sums()
    running: list[Listed] = []
    for i in range(steps):
        if len(running) < PLACES and choose.random() < 0.5:
            place = sums.take()
            assert place is not None
            assert place not in {r.place for r in running}
            running.append(Listed(place))
        step(sums, choose.sample(running, choose.randint(0, len(running))), seed % 1000 + i)
        if running and choose.random() < 0.15:
            ended = running.pop(choose.randrange(len(running)))
            assert_reads(sums, ended)
            sums.give_back(ended.place)
    for request in running:
        assert_reads(sums, request)


@pytest.mark.parametrize("tokens", [0, 1, RECENT - 1, RECENT, RECENT + 1, 2 * RECENT, 3 * RECENT + 1])
def test_every_length_reads_at_every_count(tokens: int) -> None:
    sums = some_sums()
    assert_reads(sums, fed(sums, tokens))


def test_reading_takes_nothing_away() -> None:
    sums = some_sums()
    request = fed(sums, 7)
    assert_reads(sums, request)
    step(sums, [request], 99)
    assert_reads(sums, request)


def test_what_was_saved_stays_when_the_place_is_somebody_elses() -> None:
    sums = some_sums()
    request = fed(sums, 9)
    saved = sums.save(request.place)
    sums.give_back(request.place)
    others = [fed(sums, 5) for _ in range(PLACES)]
    assert request.place in {other.place for other in others}
    assert torch.equal(read_saved(saved, 9, 6), request.sum(6))
    for other in others:
        assert_reads(sums, other)


def test_a_place_that_is_given_is_empty() -> None:
    sums = some_sums()
    for tokens in (2 * RECENT + 1, 1, 0):
        for request in [fed(sums, tokens) for _ in range(PLACES)]:
            sums.give_back(request.place)
    fresh = [fed(sums, 0) for _ in range(PLACES)]
    assert all(not sums.read(r.place, 0, 0).any() for r in fresh)
    step(sums, fresh, 5)
    for request in fresh:
        assert_reads(sums, request)


def test_places_run_out() -> None:
    sums = some_sums()
    taken = [sums.take() for _ in range(PLACES)]
    assert sorted(p for p in taken if p is not None) == list(range(PLACES))
    assert sums.take() is None
    sums.give_back(1)
    assert sums.take() == 1
    assert Sums(N_LAYERS, 0, WIDTH, torch.device("cpu")).take() is None


def test_a_step_that_sums_nothing_moves_nothing() -> None:
    sums = some_sums()
    request = fed(sums, 3)
    before = sums.total.clone(), sums.recent.clone()
    assert sums.admit([], []) == []
    assert torch.equal(before[0], sums.total)
    assert torch.equal(before[1], sums.recent)
    assert_reads(sums, request)


def test_tensors_stay_where_they_are() -> None:
    sums = some_sums()
    where = sums.total.data_ptr(), sums.recent.data_ptr()
    sums.give_back(fed(sums, 10).place)
    fed(sums, 2)
    assert where == (sums.total.data_ptr(), sums.recent.data_ptr())
