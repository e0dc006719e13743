"""The keys of a request, what it then runs under, and which blocks of the prefix cache it shares."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from persona_axis.errors import UsageError
from persona_axis.serve.vllm.keys import Asked, Offer, Ticket, asked, salted, ticket

CALM, WARM = "c" * 64, "d" * 64
OFFERS = {"calm": Offer(CALM, only_adds=False), "warm": Offer(WARM, only_adds=True)}
BOUNDED, ADDS = {"calm": OFFERS["calm"]}, {"warm": OFFERS["warm"]}


def given_ticket(
    extra: dict[str, Any] | None = None, offers: dict[str, Offer] = OFFERS, default: str | None = None
) -> Ticket:
    named = {f"persona_axis_{key}": value for key, value in (extra or {}).items()}
    return ticket(asked(named), offers, default)


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_the_four_keys_are_read_and_those_of_others_left_alone() -> None:
    ours = {
        "persona_axis_policy": "calm",
        "persona_axis_strength": 0,
        "persona_axis_capture": 1,
        "persona_axis_projections": True,
    }
    assert asked({**ours, "kv_transfer_params": {"x": 1}, "persona": 3}) == Asked("calm", 0.0, True, True)


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}])
def test_a_request_without_keys_leaves_all_to_the_server(extra: dict[str, Any] | None) -> None:
    assert asked(extra) == Asked(None, 1.0, False, False)


@pytest.mark.parametrize(
    "key", ["persona_axis", "persona_axis_", "persona_axis_polcy", "persona_axis_Capture", "persona_axis_policy "]
)
def test_any_other_key_of_ours_is_refused_by_name(key: str) -> None:
    with pytest.raises(UsageError, match=f"Unknown key {key}; .*persona_axis_policy.*persona_axis_projections"):
        asked({key: 1, "persona_axis_capture": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("policy", value) for value in (1, True, ["calm"])),
        *(("strength", value) for value in ("1", None, True, [1.0], math.nan, math.inf, -math.inf)),
        *(("capture", value) for value in ("1", "true", 2, -1, 0.5, None, [1], math.nan)),
        *(("projections", value) for value in ("yes", 2, [0])),
    ],
)
def test_values_of_another_type_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"persona_axis_{key}"):
        asked({f"persona_axis_{key}": value})


@pytest.mark.parametrize("value", [10**400, -1e39, 1e-46, -1e-300], ids=["huge", "large", "small", "tiny"])
def test_strengths_that_would_be_another_number_in_the_worker_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="float32"):
        asked({"persona_axis_strength": value})


@pytest.mark.parametrize(("value", "on"), [(0, False), (1, True), (0.0, False), (1.0, True), (False, False)])
def test_switches_are_0_or_1_in_any_spelling_of_a_number(value: Any, on: bool) -> None:
    assert asked({"persona_axis_capture": value}).capture is on
    assert asked({"persona_axis_projections": value}).projections is on


# ---- what it runs under ---------------------------------------------------------------------------------------------


def test_a_named_policy_is_the_content_that_is_loaded_under_it() -> None:
    assert given_ticket({"policy": "calm"}) == Ticket("calm", CALM, 1.0)
    assert given_ticket({"policy": "calm", "capture": 1, "projections": 1}) == Ticket("calm", CALM, 1.0, True, True)
    assert given_ticket({"policy": "calm"}).changes


def test_a_request_that_names_none_runs_under_the_default() -> None:
    assert given_ticket(default="warm") == Ticket("warm", WARM, 1.0)
    assert given_ticket({"policy": "calm"}, default="warm") == Ticket("calm", CALM, 1.0)


@pytest.mark.parametrize(("wish", "default"), [({}, None), ({"policy": "off"}, "warm"), ({"policy": "off"}, None)])
def test_off_is_unheld_whatever_the_default(wish: dict[str, Any], default: str | None) -> None:
    assert given_ticket(wish, default=default) == Ticket("off", "", 0.0)
    assert given_ticket({**wish, "capture": 1}, default=default) == Ticket("off", "", 0.0, capture=True)
    assert not given_ticket(wish, default=default).changes


def test_a_policy_that_is_not_loaded_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'clam'.*loaded: calm, warm"):
        given_ticket({"policy": "clam"})
    with pytest.raises(UsageError, match="loaded: none"):
        given_ticket({"policy": "calm"}, {})


@pytest.mark.parametrize("strength", [-2.5, 0.25, 1.5, 1e6])
def test_only_policies_that_add_have_strengths(strength: float) -> None:
    assert given_ticket({"policy": "warm", "strength": strength}) == Ticket("warm", WARM, strength)
    with pytest.raises(UsageError, match=r"persona_axis_strength=.*'calm' has bounds"):
        given_ticket({"policy": "calm", "strength": strength})


@pytest.mark.parametrize("name", ["calm", "warm"])
def test_strength_0_leaves_the_stream_as_it_is(name: str) -> None:
    assert given_ticket({"policy": name, "strength": 0}) == Ticket(name, "", 0.0)
    watched = given_ticket({"policy": name, "strength": 0, "projections": 1})
    assert watched == Ticket(name, OFFERS[name].content_hash, 0.0, projections=True)
    assert not watched.changes


def test_strength_means_nothing_to_a_request_that_is_off() -> None:
    assert given_ticket({"policy": "off", "strength": 3.0}) == Ticket()


def test_projections_of_off_are_on_the_default_or_the_only_policy() -> None:
    off = {"policy": "off", "projections": 1}
    assert given_ticket(off, default="warm") == Ticket("off", WARM, 0.0, projections=True)
    assert given_ticket(off, BOUNDED) == Ticket("off", CALM, 0.0, projections=True)
    assert given_ticket({"projections": 1}, ADDS) == Ticket("off", WARM, 0.0, projections=True)


def test_projections_on_nobody_knows_what_are_refused() -> None:
    with pytest.raises(UsageError, match="no policy is loaded"):
        given_ticket({"projections": 1}, {})
    with pytest.raises(UsageError, match=r"on whose directions: .*calm, warm"):
        given_ticket({"policy": "off", "projections": 1})


def test_a_ticket_survives_the_way_to_the_worker() -> None:
    sent = given_ticket({"policy": "warm", "strength": -1.5, "capture": 1})
    assert Ticket(**sent.to_dict()) == sent


# ---- salts ----------------------------------------------------------------------------------------------------------

SALTS = st.none() | st.text(max_size=40)
HASHES = st.sampled_from([CALM, WARM, "e" * 64])
STRENGTHS = st.floats(-1e6, 1e6).filter(bool)
CHANGES = st.tuples(SALTS, HASHES, STRENGTHS)


def salt_of(salt: str | None, content: str, strength: float) -> str:
    given = salted(salt, Ticket("any", content, strength))
    assert given is not None
    return given


@given(CHANGES, CHANGES)
def test_requests_that_differ_share_no_blocks(one: Any, other: Any) -> None:
    assume(one != other)
    assert salt_of(*one) != salt_of(*other)


@given(CHANGES, SALTS)
def test_a_held_request_shares_no_blocks_with_one_that_is_not(held: Any, salt: str | None) -> None:
    assert salt_of(*held) != salt


@given(CHANGES, st.booleans(), st.booleans())
def test_requests_that_are_changed_alike_share_blocks(change: Any, capture: bool, projections: bool) -> None:
    salt, content, strength = change
    other = Ticket("another name", content, strength, capture, projections)
    assert salted(salt, other) == salt_of(*change)


@given(SALTS, st.booleans(), st.booleans(), st.sampled_from(["", CALM]))
def test_a_request_that_changes_nothing_keeps_the_users_salt(
    salt: str | None, capture: bool, projections: bool, watched: str
) -> None:
    assert salted(salt, Ticket("off", watched, 0.0, capture, projections)) == salt


@given(CHANGES)
def test_salts_are_what_vllm_takes(change: Any) -> None:
    salt = salt_of(*change)
    assert 0 < len(salt) <= 128
    assert not set(salt) & set("@/\\\0")


def test_a_salt_cannot_be_made_up_by_a_user() -> None:
    """Not by giving as a salt what another request's parts, written after one another, would be."""
    assert salt_of("a", CALM, 1.0) != salt_of(f'a", "{CALM}', CALM, 1.0)
    assert salt_of(None, CALM, 1.0) != salt_of("null", CALM, 1.0)
    assert salt_of(None, CALM, 1.0) != salt_of("", CALM, 1.0)
