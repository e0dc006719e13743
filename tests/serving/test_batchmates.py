"""Requests under different policies in one batch: each gets what it gets alone, and what Transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from plain_forward import forward, is_greedy
from real_engines import Answer, Ask, alone, together

pytestmark = pytest.mark.serving

QUESTION = "Who are you, and what do you want?"
WAYS: dict[str, dict[str, Any]] = {
    "off": {"policy": "off"},
    "default": {},
    "ceiling": {"policy": "ceiling"},
    "gone": {"policy": "gone"},
    "plane": {"policy": "plane"},
    "late": {"policy": "late"},
    "pushed": {"policy": "push"},
    "pushed by half": {"policy": "push", "strength": 0.5},
    "pulled": {"policy": "push", "strength": -1.5},
    "watched": {"policy": "ceiling", "strength": 0},
}
UNCHANGED = ("off", "watched")


@pytest.fixture(scope="module")
def batch(engines: Any, embedded: tuple[str, str], prompt: Callable[..., list[int]]) -> dict[str, Answer]:
    """One request of each way, run together."""
    llm = engines("roomy", embedded[0])
    return dict(zip(WAYS, together(llm, [Ask(prompt(QUESTION), **way) for way in WAYS.values()]), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_request_says_the_same_among_others_as_alone(way: str, batch: dict[str, Answer], roomy: Any) -> None:
    assert alone(roomy, batch[way].ask).tokens == batch[way].tokens


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_is_the_one_that_transformers_gives(
    way: str, batch: dict[str, Answer], plain: Any, policies: dict[str, Any], roomy: Any
) -> None:
    answer = batch[way]
    ask = answer.ask
    policy = None if way in UNCHANGED else policies[ask.policy or "floor"]
    strength = 1.0 if ask.strength is None else ask.strength
    n = len(ask.prompt)
    first = n if ask.policy == "late" else 0
    assert is_greedy(forward(plain, answer.ids, policy, strength, first), n, answer.tokens)
    if policy is not None:  # the policy binds: without it the reply is another
        assert not is_greedy(forward(plain, answer.ids), n, answer.tokens)


def test_what_changes_nothing_says_the_same(batch: dict[str, Answer], roomy: Any) -> None:
    assert batch["watched"].tokens == batch["off"].tokens


def test_every_policy_changes_the_text_in_its_own_way(batch: dict[str, Answer], roomy: Any) -> None:
    held = [tuple(answer.tokens) for way, answer in batch.items() if way != "watched"]
    assert len(set(held)) == len(held), {way: answer.text for way, answer in batch.items()}


def test_an_answer_says_what_held_it(batch: dict[str, Answer], policies: dict[str, Any], roomy: Any) -> None:
    for way, answer in batch.items():
        named = answer.ask.policy or "floor"
        report = answer.report
        assert report.policy == named
        assert report.content_hash == ("" if way in UNCHANGED else policies[named].content_hash)
        assert report.strength == {"off": 0, "watched": 0, "pushed by half": 0.5, "pulled": -1.5}.get(way, 1)
