"""Prompts that go in by pieces and requests that are thrown out and come back: nothing is counted twice, or lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from plain_forward import forward, is_greedy, off_by
from real_engines import QUESTIONS, ROLE, Answer, Ask, by_hand, core_of, steps

pytestmark = pytest.mark.serving

POLICIES = ("off", "floor", "plane", "push")


def asks_of(prompt: Callable[..., list[int]], n: int, tokens: int) -> dict[str, Ask]:
    """Long prompts, each with its policy."""
    return {
        f"r{i}": Ask(
            prompt(QUESTIONS[i % len(QUESTIONS)], f"{ROLE} You are number {i}."),
            policy=POLICIES[(i + i // 4) % len(POLICIES)],
            capture=True,
            projections=POLICIES[(i + i // 4) % len(POLICIES)] != "off",
            tokens=tokens,
        )
        for i in range(n)
    }


@contextmanager
def watched(llm: Any) -> Iterator[dict[str, Any]]:
    """What the scheduler does while entered: how often each request is preempted, which pieces it is fed in."""
    scheduler = core_of(llm).scheduler
    seen: dict[str, Any] = {"preempted": [], "pieces": {}}
    preempt, schedule = scheduler._preempt_request, scheduler.schedule

    def preempting(request: Any, *args: Any, **kwargs: Any) -> Any:
        seen["preempted"].append(request.num_output_tokens)
        return preempt(request, *args, **kwargs)

    def scheduling(*args: Any, **kwargs: Any) -> Any:
        out = schedule(*args, **kwargs)
        for name, n in out.num_scheduled_tokens.items():
            seen["pieces"].setdefault(name.rpartition("-")[0], []).append(n)  # vLLM adds a suffix of its own
        return out

    scheduler._preempt_request, scheduler.schedule = preempting, scheduling
    try:
        yield seen
    finally:
        del scheduler._preempt_request, scheduler.schedule


def check(answers: dict[str, Answer], asks: dict[str, Ask], plain: Any, policies: dict[str, Any]) -> None:
    """Each is what Transformers gives, position for position."""
    assert set(answers) == set(asks)
    for answer in answers.values():
        policy = policies.get(str(answer.ask.policy))
        start, end = answer.counted
        of = forward(plain, answer.ids, policy)
        assert is_greedy(of, start, answer.tokens)
        assert answer.report.n_counted == end - start == answer.ask.tokens - 1
        assert off_by(answer.report.activation, of.mean(start, end)) < 1e-3
        if policy is not None:
            got = answer.report.projections
            assert got is not None
            for layer, p in of.projections.items():
                torch.testing.assert_close(torch.tensor(got[layer]), p[start:end], rtol=1e-3, atol=1e-3)


def test_a_prompt_in_pieces(
    cramped: Any, prompt: Callable[..., list[int]], plain: Any, policies: dict[str, Any]
) -> None:
    asks = asks_of(prompt, 4, 8)
    with watched(cramped) as seen:
        by_hand(cramped, asks)
        answers = steps(cramped, asks)
    assert not seen["preempted"]
    assert all(pieces[0] < len(asks[name].prompt) for name, pieces in seen["pieces"].items())
    check(answers, asks, plain, policies)


def test_requests_that_are_thrown_out_and_resumed_in_pieces(
    cramped: Any, prompt: Callable[..., list[int]], plain: Any, policies: dict[str, Any]
) -> None:
    asks = asks_of(prompt, 10, 40)
    with watched(cramped) as seen:
        by_hand(cramped, asks)
        answers = steps(cramped, asks)
    assert any(n > 2 for n in seen["preempted"])  # after some of the reply was fed
    check(answers, asks, plain, policies)


def test_requests_that_are_thrown_out_and_resumed_at_once(
    roomy: Any, prompt: Callable[..., list[int]], plain: Any, policies: dict[str, Any]
) -> None:
    """All of them together, in the middle of their replies, and again near the end."""
    asks = asks_of(prompt, 4, 16)
    with watched(roomy) as seen:
        by_hand(roomy, asks)
        answers: dict[str, Answer] = {}
        for n in (6, 7, None):
            answers |= steps(roomy, asks, n)
            if n is not None:
                core_of(roomy).scheduler.reset_prefix_cache(reset_running_requests=True)
    assert len(seen["preempted"]) == 8
    assert min(seen["preempted"]) > 2
    check(answers, asks, plain, policies)
