"""A model that an engine runs, held: every row of every forward against a reference, and every sum.

The property runs whole lives of requests through a simulated engine (``simulated_engine.py``), which compares each
forward as it goes. The other tests are of one rule each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_engine import CAPACITY, IDS, N_LAYERS, NAMES, Engine
from small_policies import WIDTH, made

from persona_axis.errors import PersonaAxisError, UsageError
from persona_axis.serve.vllm import held as held_module
from persona_axis.serve.vllm.bank import Bank
from persona_axis.serve.vllm.held import HeldModel, unpacked
from persona_axis.serve.vllm.keys import Ticket

WISHES = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from([None, *NAMES]),
            "strength": st.sampled_from([1.0, 1.0, 0.0, -2.5]),
            "capture": st.sampled_from([True, True, False]),
            "projections": st.sampled_from([True, True, False]),
            "prompt": st.integers(1, 9),
            "reply": st.integers(1, 12),
            "overrun": st.sampled_from([0, 0, 1, 1, 2, 4, 5]),
            "aborted_after": st.sampled_from([None, None, None, 1, 5]),
        }
    ),
    min_size=1,
    max_size=len(IDS),
)


@given(
    WISHES,
    st.integers(0, 2**31),
    st.sampled_from([range(N_LAYERS), (1, 2)]),
    st.sampled_from([0, 1, 3, 8]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_token_of_every_request_is_held_and_counted_as_alone(
    wishes: list[dict[str, Any]], seed: int, layers: Any, places: int, whole: bool
) -> None:
    engine = Engine(seed, layers, places, whole)
    for name in NAMES:
        engine.load(name)
    for i, (id, wish) in enumerate(zip(IDS, wishes, strict=False)):
        engine.ask(id, **wish)
        if i % 2:
            engine.load(engine.random.choice(NAMES))  # while requests are on their way to the old one
    for _ in range(400):
        if not engine.busy:
            break
        engine.step()
    assert not engine.busy
    assert_nothing_is_left(engine, places)


def assert_nothing_is_left(engine: Engine, places: int) -> None:
    """No request holds a policy or a place any more."""
    assert all(entry.users == 0 for entry in engine.bank._entries)
    taken = [engine.held.sums.take() for _ in range(places + 1)]
    assert taken[-1] is None
    assert sorted(taken[:-1]) == list(range(places))  # type: ignore[type-var]


# ---- one rule each --------------------------------------------------------------------------------------------------

HELD = made(1, range(N_LAYERS), "add")  # moves every row
CAPTURED = Ticket(capture=True).to_dict()


def a_model(places: int = 2, max_policies: int = 2) -> HeldModel:
    return HeldModel(Bank(range(N_LAYERS), N_LAYERS, WIDTH, max_policies, 1, torch.device("cpu")), CAPACITY, places)


def ticket(model: HeldModel, capture: bool = False, projections: bool = False) -> dict[str, Any]:
    """Under ``HELD``, which is loaded."""
    return Ticket("p", model.bank.load("p", HELD).content_hash, 1.0, capture, projections).to_dict()


def feed(model: HeldModel, *batch: tuple[str, int, int]) -> torch.Tensor:
    """A forward of (request, fed before, tokens now); the stream afterwards, ones before."""
    starts = np.cumsum([0, *(n for _, _, n in batch)])
    model.fill([id for id, _, _ in batch], starts, np.array([done for _, done, _ in batch]), int(starts[-1]))
    hidden = torch.ones(int(starts[-1]), WIDTH)
    for layer in range(N_LAYERS):
        out = hidden.clone()
        model.run(out, None, layer)
    return out


def summed(got: dict[str, Any]) -> float:
    """How many rows of ones were summed."""
    total = unpacked(got["activation_sum"])
    assert (total == total[0, 0]).all()
    return float(total[0, 0])


def test_a_request_without_a_ticket_ends_the_engine() -> None:
    with pytest.raises(PersonaAxisError, match=r"Request r came without a ticket.*PERSONA_AXIS_DISABLE=1"):
        a_model().begin([], [("r", None, 3)])


def test_a_ticket_for_content_that_is_not_held_ends_the_engine() -> None:
    model = a_model()
    model.bank.load("p", made(2))
    with pytest.raises(PersonaAxisError, match=f"Request r .* 'p' .{HELD.content_hash[:12]}.*it has p"):
        model.begin([], [("r", Ticket("p", HELD.content_hash, 1.0).to_dict(), 3)])


def test_a_request_that_never_started_ends_the_engine() -> None:
    model = a_model()
    model.begin([], [("r", Ticket().to_dict(), 3)])
    with pytest.raises(PersonaAxisError, match="Request q is run, but never started"):
        feed(model, ("r", 0, 3), ("q", 0, 1))


def test_requests_that_the_engine_warms_up_with_are_nobodys() -> None:
    model = a_model()
    model.bank.load("p", HELD)
    with model.warming_up():
        model.begin([], [("_warmup_0_", None, 3)])
        assert feed(model, ("_warmup_0_", 0, 3)).eq(1).all()
        model.begin(["_warmup_0_"], [])
    assert model.take_reports() == {}
    model.run(torch.ones(CAPACITY, WIDTH), None, 0)  # as when graphs are captured next: any number of rows
    with pytest.raises(PersonaAxisError, match="without a ticket"):
        model.begin([], [("r", None, 3)])


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    model = a_model()
    model.begin([], [("r", Ticket().to_dict(), 99)])
    feed(model, ("r", 0, CAPACITY))
    with pytest.raises(UsageError, match=f"{CAPACITY + 1} tokens, .* room for {CAPACITY}"):
        feed(model, ("r", CAPACITY, CAPACITY + 1))
    with pytest.raises(UsageError, match="room for"):
        model.fill(["r"], np.array([0, 1]), np.array([0]), CAPACITY + 1)
    model.clear()
    with pytest.raises(UsageError, match="room for"):
        model.run(torch.ones(CAPACITY + 1, WIDTH), None, 0)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_forward_of_other_rows_than_were_said_is_refused(rows: int) -> None:
    model = a_model()
    model.begin([], [("r", ticket(model), 3)])
    feed(model, ("r", 0, 3))
    with pytest.raises(PersonaAxisError, match=f"Layer 1 has {rows} rows in a forward of 3"):
        model.run(torch.ones(rows, WIDTH), None, 1)


def test_nobodys_forward_is_off_in_every_row() -> None:
    model = a_model()
    model.begin([], [("r", ticket(model, capture=True), CAPACITY - 1)])
    assert not feed(model, ("r", 0, CAPACITY)).eq(1).all(1).any()
    model.clear()
    for rows in (CAPACITY, 3):
        hidden = torch.ones(rows, WIDTH)
        model.run(hidden, None, 0)
        model._run_all(hidden, None, 0)
        assert hidden.eq(1).all()
    part = HELD.interventions[0]
    once = 1 + part.shift @ part.V
    np.testing.assert_allclose(unpacked(model.fetch("r", 1)["activation_sum"])[0], once, rtol=1e-5)


@pytest.mark.parametrize("way", ["run", "_run_all"])
def test_nobodys_forward_leaves_what_was_collected(way: str) -> None:
    model = a_model()
    model.begin([], [("r", ticket(model, projections=True), 1)])
    feed(model, ("r", 0, 1))
    feed(model, ("r", 1, 1))
    model.clear()
    for layer in range(N_LAYERS):
        getattr(model, way)(torch.ones(CAPACITY, WIDTH), None, layer)
    got = model.fetch("r", 1)["projections"]
    for part in HELD.interventions:
        np.testing.assert_allclose(unpacked(got[str(part.layer)])[0], part.V.sum(1), rtol=1e-5)


@pytest.mark.parametrize("way", ["run", "_run_all"])
def test_a_layer_without_a_part_in_the_policy_is_off_whatever_the_stream(way: str) -> None:
    model = a_model()
    entry = model.bank.load("q", made(1, (1,), "all"))
    model.begin([], [("r", Ticket("q", entry.content_hash, 1.0).to_dict(), 9)])
    model.fill(["r"], np.array([0, 2]), np.array([0]), 2)
    hidden = torch.full([2, WIDTH], torch.inf)
    for layer in (0, 2):
        getattr(model, way)(hidden, None, layer)
    assert hidden.eq(torch.inf).all()


def test_a_slot_that_is_given_to_another_policy_holds_with_that() -> None:
    model = a_model(max_policies=1)
    model.begin([], [("r", ticket(model), 3)])
    first = feed(model, ("r", 0, 3))
    model.begin(["r"], [])
    model.bank.unload("p")
    other = model.bank.load("q", made(2, range(N_LAYERS), "add"))
    model.begin([], [("s", Ticket("q", other.content_hash, 1.0).to_dict(), 3)])
    second = feed(model, ("s", 0, 3))
    part = made(2, range(N_LAYERS), "add").interventions[-1]
    torch.testing.assert_close(second[0], 1 + part.shift @ part.V)
    assert not torch.allclose(first, second)


def test_a_request_that_finds_no_place_gets_an_error_and_no_sum() -> None:
    model = a_model(places=1)
    model.begin([], [("r", CAPTURED, 1), ("s", CAPTURED, 1)])
    feed(model, ("r", 0, 1), ("s", 0, 1))
    feed(model, ("s", 1, 1), ("r", 1, 1))
    assert summed(model.fetch("r", 1)) == 1
    assert "all 1 places" in model.fetch("s", 1)["error"]
    model.begin(["r"], [("t", CAPTURED, 1)])  # the place is free again
    feed(model, ("t", 0, 1))
    feed(model, ("t", 1, 1))
    assert summed(model.fetch("t", 1)) == 1


@pytest.mark.parametrize("ended", [True, False])
def test_what_was_collected_is_handed_out_once(ended: bool) -> None:
    """Also when it is fetched before the worker hears that the request has ended, as is usual."""
    model = a_model()
    model.begin([], [("r", CAPTURED, 1)])
    feed(model, ("r", 0, 1))
    feed(model, ("r", 1, 1))
    if ended:
        model.begin(["r"], [])
    assert summed(model.fetch("r", 1)) == 1
    assert "nothing is kept of request r" in model.fetch("r", 1)["error"]
    model.begin(["r"], [])
    assert "nothing is kept of request r" in model.fetch("r", 1)["error"]


def test_only_the_newest_results_are_kept_for_answers_that_nobody_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "KEPT_RESULTS", 3)
    model = a_model(places=1)
    for i in range(5):
        model.begin([], [(f"r{i}", CAPTURED, 1)])
        feed(model, (f"r{i}", 0, 1))
        model.begin([f"r{i}"], [])
    assert ["error" in model.fetch(f"r{i}", 0) for i in range(5)] == [True, True, False, False, False]


def test_ids_are_free_again_when_their_request_has_ended() -> None:
    model = a_model()
    for _ in range(2):
        model.begin([], [("r", CAPTURED, 1)])
        for done in range(4):
            feed(model, ("r", done, 1))
        model.begin(["r"], [])
        assert summed(model.fetch("r", 3)) == 3


def test_a_request_that_does_not_collect_leaves_nothing() -> None:
    model = a_model()
    model.begin([], [("r", ticket(model), 1)])
    feed(model, ("r", 0, 1))
    model.begin(["r", "never heard of"], [])
    assert "it did not ask" in model.fetch("r", 0)["error"]


@pytest.mark.parametrize("wish", [{"capture": True}, {"projections": True}])
def test_counting_more_tokens_than_were_fed_is_an_error(wish: dict[str, bool]) -> None:
    model = a_model()
    model.begin([], [("r", ticket(model, **wish), 1)])
    feed(model, ("r", 0, 1))
    feed(model, ("r", 1, 1))
    assert "2 tokens of the reply count" in model.fetch("r", 2)["error"]


def test_several_reply_tokens_at_once_are_an_error_and_no_wrong_sum() -> None:
    model = a_model()
    model.begin([], [("r", CAPTURED, 2), ("s", CAPTURED, 2)])
    feed(model, ("r", 0, 2), ("s", 0, 2))
    feed(model, ("r", 2, 2), ("s", 2, 1))
    feed(model, ("r", 4, 1), ("s", 3, 1))
    assert "several of its tokens were fed at once" in model.fetch("r", 3)["error"]
    assert summed(model.fetch("s", 2)) == 2


def test_positions_that_this_engine_did_not_compute_are_an_error_and_no_wrong_sum() -> None:
    model = a_model()
    model.begin([], [("r", CAPTURED, 2)])
    feed(model, ("r", 4, 1))
    assert "not computed by this engine" in model.fetch("r", 1)["error"]


def test_sums_of_bfloat16_streams_are_float32_over_both_halves() -> None:
    model = a_model()
    model.begin([], [("r", ticket(model, capture=True), 1)])
    wanted = torch.zeros(WIDTH)
    feed(model, ("r", 0, 1))
    for done in range(1, 8):
        model.fill(["r"], np.array([0, 1]), np.array([done]), 1)
        hidden, residual = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(done)).bfloat16()
        model.run(hidden, residual, 0)
        wanted += hidden[0].float() + residual[0].float()
    np.testing.assert_allclose(unpacked(model.fetch("r", 7)["activation_sum"])[0], wanted, rtol=1e-6, atol=1e-6)
