"""The prefix cache: blocks computed under one policy serve no other, and serve the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from plain_forward import forward, off_by
from real_engines import BLOCK, ROLE, Answer, Ask, alone, together

pytestmark = pytest.mark.serving

WAYS: dict[str, dict[str, Any]] = {
    "off": {"policy": "off"},
    "floor": {"policy": "floor"},
    "ceiling": {"policy": "ceiling"},
    "plane": {"policy": "plane"},
    "late": {"policy": "late"},
    "pushed": {"policy": "push"},
    "pushed by half": {"policy": "push", "strength": 0.5},
    "off, mine": {"policy": "off", "salt": "mine"},
    "floor, mine": {"policy": "floor", "salt": "mine"},
    "floor, yours": {"policy": "floor", "salt": "yours"},
}


@pytest.fixture
def long(prompt: Callable[..., list[int]]) -> list[int]:
    """A prompt of several blocks."""
    ids = prompt("Tell me about the sea and the people who live by it. " * 4, ROLE)
    assert len(ids) > 2 * BLOCK
    return ids


def one(llm: Any, ids: list[int], **how: Any) -> Answer:
    return together(llm, [Ask(ids, tokens=8, **how)])[0]


def test_different_policies_never_share_and_the_same_one_does(roomy: Any, long: list[int]) -> None:
    apart = {name: alone(roomy, Ask(long, tokens=8, **how)).tokens for name, how in WAYS.items()}
    roomy.reset_prefix_cache()
    first = {name: one(roomy, long, **how) for name, how in WAYS.items()}
    again = {name: one(roomy, long, **how) for name, how in WAYS.items()}
    assert {name: answer.cached for name, answer in first.items()} == dict.fromkeys(WAYS, 0)
    assert all(answer.cached >= BLOCK for answer in again.values())
    assert {name: answer.tokens for name, answer in first.items()} == apart
    assert {name: answer.tokens for name, answer in again.items()} == apart


@pytest.mark.parametrize(
    "how",
    [
        {"policy": "ceiling", "strength": 0},
        {"policy": "push", "strength": 0},
        {"policy": "off", "projections": True},
        {"policy": "off", "capture": True},
        {"policy": "plane", "strength": 0, "projections": True},
    ],
)
def test_what_changes_nothing_shares_with_plain_requests(roomy: Any, long: list[int], how: dict[str, Any]) -> None:
    one(roomy, long, policy="off")
    assert one(roomy, long, **how).cached >= BLOCK
    assert one(roomy, long, salt="mine", **how).cached == 0


def test_the_default_shares_with_who_names_it(roomy: Any, long: list[int]) -> None:
    one(roomy, long)
    assert one(roomy, long, policy="floor").cached >= BLOCK
    assert one(roomy, long, policy="off").cached == 0


def test_collecting_does_not_part_requests_of_one_policy(roomy: Any, long: list[int]) -> None:
    one(roomy, long, policy="floor")
    assert one(roomy, long, policy="floor", capture=True, projections=True).cached >= BLOCK


def test_a_request_without_policy_leaves_with_the_salt_it_came_with(
    roomy: Any, long: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its blocks are those of a vLLM without the plugin."""
    sent = []
    core = roomy.llm_engine.engine_core
    add = core.add_request
    monkeypatch.setattr(core, "add_request", lambda request: (sent.append(request.cache_salt), add(request))[1])
    for salt in (None, "mine"):
        one(roomy, long, policy="off", salt=salt)
        one(roomy, long, policy="floor", salt=salt)
    plain, floor, mine, floor_mine = sent
    assert (plain, mine) == (None, "mine")
    assert len({floor, floor_mine, None, "mine"}) == 4
    assert all(len(salt) <= 128 and salt.isalnum() for salt in (floor, floor_mine))


def test_a_reply_after_a_cached_prompt_is_captured_whole(
    roomy: Any, long: list[int], plain: Any, policies: dict[str, Any]
) -> None:
    for name in ("off", "floor", "push"):
        one(roomy, long, policy=name)
        answer = together(roomy, [Ask(long, name, capture=True, projections=True, tokens=20)])[0]
        start, end = answer.counted
        of = forward(plain, answer.ids, policies.get(name))
        assert answer.cached >= BLOCK
        assert answer.report.n_counted == end - start == 19
        assert off_by(answer.report.activation, of.mean(start, end)) < 1e-3


def test_a_reply_that_is_a_prompt_now_does_not_count(roomy: Any, long: list[int], plain: Any) -> None:
    """A conversation's second turn finds the first reply's blocks; only the second reply is captured."""
    first = together(roomy, [Ask(long, "off", tokens=40, capture=True)])[0]
    answer = together(roomy, [Ask([*first.ids, 198], "off", tokens=10, capture=True)])[0]
    start, end = answer.counted
    assert answer.cached >= len(long)
    assert off_by(answer.report.activation, forward(plain, answer.ids).mean(start, end)) < 1e-3
