"""Activations and projections that an engine returns are those of a Transformers forward over the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_forward import Forward, forward, off_by
from real_engines import Answer, Ask, together

pytestmark = pytest.mark.serving

CLOSE, CLOSE_HALF = 1e-3, 1e-2
SHORT, LONG = "Reply with the single word yes.", "Tell me about the sea and the people who live by it."
COLLECT: dict[str, Any] = {"capture": True, "projections": True}
ASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "off, by length": (LONG, {"policy": "off", "tokens": 20}),
    "off, by EOS": (SHORT, {"policy": "off", "tokens": 60, "options": {"ignore_eos": False}}),
    "off, by a stop string": (LONG, {"policy": "off", "tokens": 60, "options": {"stop": [" and", " is", " of"]}}),
    "floor, by length": (LONG, {"policy": "floor", "tokens": 20}),
    "plane, by a stop string": (LONG, {"policy": "plane", "tokens": 60, "options": {"stop": ["e", "a"]}}),
    "ceiling, by length": (SHORT, {"policy": "ceiling", "tokens": 12}),
    "late, by length": (LONG, {"policy": "late", "tokens": 20}),
    "pushed by half, by length": (LONG, {"policy": "push", "strength": 0.5, "tokens": 20}),
    "watched, by length": (LONG, {"policy": "plane", "strength": 0, "tokens": 20}),
    "one token": (LONG, {"policy": "floor", "tokens": 1}),
}
ENDS = {"length": "length", "EOS": "stop", "string": "stop", "token": "length"}


def collected(llm: Any, prompt: Callable[..., list[int]]) -> dict[str, Answer]:
    asks = [Ask(prompt(question), **COLLECT, **how) for question, how in ASKS.values()]
    return dict(zip(ASKS, together(llm, asks), strict=True))


def plainly(model: Any, answer: Answer, policies: dict[str, Any]) -> Forward:
    """What Transformers computes for the same tokens under the same policy."""
    ask = answer.ask
    watched = ask.policy == "off"
    strength = 0.0 if watched else 1.0 if ask.strength is None else ask.strength
    first = len(ask.prompt) if ask.policy == "late" else 0
    return forward(model, answer.ids, policies["floor" if watched else str(ask.policy)], strength, first)


@pytest.fixture(scope="module")
def answers(engines: Any, embedded: tuple[str, str], prompt: Callable[..., list[int]]) -> dict[str, Answer]:
    return collected(engines("roomy", embedded[0]), prompt)


@pytest.mark.parametrize("how", [how for how in ASKS if how != "one token"])
def test_means_are_those_of_transformers(
    how: str, answers: dict[str, Answer], plain: Any, policies: dict[str, Any], roomy: Any
) -> None:
    answer = answers[how]
    start, end = answer.counted
    of = plainly(plain, answer, policies)
    report = answer.report
    assert answer.finish_reason == ENDS[how.split()[-1]]
    assert report.n_counted == end - start >= 1
    assert report.layers == tuple(range(30))
    assert report.activation is not None
    assert report.activation.shape == (30, 576)
    assert off_by(report.activation, of.mean(start, end)) < CLOSE
    # A token more or less, and the plain model's stream, would be seen.
    assert off_by(report.activation, of.mean(start, end + 1)) > CLOSE
    assert off_by(report.activation, of.mean(start - 1, end)) > CLOSE
    if answer.ask.policy != "off" and answer.ask.strength != 0:
        assert off_by(report.activation, forward(plain, answer.ids).mean(start, end)) > 10 * CLOSE


@pytest.mark.parametrize("how", [how for how in ASKS if how != "one token"])
def test_projections_are_those_before_the_layer_holds(
    how: str, answers: dict[str, Answer], plain: Any, policies: dict[str, Any], roomy: Any
) -> None:
    answer = answers[how]
    start, end = answer.counted
    wanted = plainly(plain, answer, policies).projections
    got = answer.report.projections
    assert got is not None
    assert set(got) == set(wanted)
    for layer, p in wanted.items():
        assert got[layer].shape == (end - start, p.shape[1])
        torch.testing.assert_close(torch.tensor(got[layer]), p[start:end], rtol=1e-3, atol=1e-3)


def test_some_projections_lie_below_the_floor_that_holds_them(
    answers: dict[str, Answer], policies: dict[str, Any], roomy: Any
) -> None:
    """So that those before and after the layer's intervention differ."""
    got = answers["floor, by length"].report.projections
    assert got is not None
    lo = {part.layer: float(part.lo) for part in policies["floor"].interventions}
    assert all((got[layer] < lo[layer] - 0.1).any() for layer in list(lo)[:3])


def test_a_reply_of_one_token_has_no_activation(answers: dict[str, Answer], roomy: Any) -> None:
    report = answers["one token"].report
    assert (report.n_counted, report.activation) == (0, None)
    assert report.projections is not None
    assert all(len(p) == 0 for p in report.projections.values())


def test_a_request_that_asks_for_nothing_gets_nothing(roomy: Any, prompt: Callable[..., list[int]]) -> None:
    only = [
        together(roomy, [Ask(prompt(SHORT), tokens=4, **ask)])[0].report
        for ask in ({}, {"capture": True}, {"projections": True})
    ]
    assert [(r.activation is not None, r.projections is not None) for r in only] == [
        (False, False),
        (True, False),
        (False, True),
    ]


# ---- bfloat16 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_answers(engines: Any, embedded: tuple[str, str], prompt: Callable[..., list[int]]) -> dict[str, Answer]:
    """Longer replies: rounding averages out over tokens."""
    asks = {}
    for how, (question, options) in ASKS.items():
        changes = {"tokens": 64} if how.endswith("by length") else {}
        if how.endswith("string"):
            changes = {"tokens": 90, "options": {**options["options"], "min_tokens": 64}}
        asks[how] = Ask(prompt(question), **COLLECT, **{**options, **changes})
    return dict(zip(asks, together(engines("half", embedded[0]), list(asks.values())), strict=True))


@pytest.mark.parametrize("how", [how for how in ASKS if how != "one token"])
def test_means_in_bfloat16(
    how: str, half_answers: dict[str, Answer], plain_half: Any, plain: Any, policies: dict[str, Any], half: Any
) -> None:
    """Within 1%, or, where Transformers in bfloat16 is further than half of that from itself in float32, within twice
    that distance."""
    answer = half_answers[how]
    of, exact = (plainly(model, answer, policies).mean(*answer.counted) for model in (plain_half, plain))
    assert off_by(answer.report.activation, of) < max(CLOSE_HALF, 2 * off_by(of, exact))
