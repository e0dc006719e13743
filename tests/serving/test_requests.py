"""Requests that come, go and fail: ids that look alike, aborts, policies that change, errors in the worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_forward import forward, off_by
from real_engines import Ask, alone, by_hand, held_of, steps, together, worker_of

from persona_axis.errors import ModelError, PersonaAxisError, UsageError
from persona_axis.serve.vllm import launch
from persona_axis.serve.vllm.frontend import report_of
from persona_axis.steering.policy import Policy

pytestmark = pytest.mark.serving

ASK = Ask([1, 2, 3], "off", tokens=3)
QUESTION = "How should I spend a free afternoon in autumn?"


def free_of(llm: Any) -> tuple[int, int, int]:
    """Requests that run, users of policies, places that are free; after the engine has heard of all ends."""
    together(llm, [ASK])
    held = held_of(llm)
    return len(held._running) - 1, sum(entry.users for entry in held.bank._entries), len(held.sums._free)


def test_ids_that_begin_alike_keep_apart(
    roomy: Any, prompt: Callable[..., list[int]], plain: Any, policies: dict[str, Any]
) -> None:
    ids = prompt(QUESTION)
    asks = {
        "r": Ask(ids, "floor", capture=True, tokens=8),
        "r1": Ask(ids, "off", capture=True, tokens=12),
        "r1-0": Ask(ids, "push", capture=True, tokens=10),
        "r11": Ask(ids, "ceiling", tokens=14),
        "1": Ask(ids, "push", 0.5, capture=True, tokens=6),
    }
    by_hand(roomy, asks)
    answers = steps(roomy, asks)
    assert set(answers) == set(asks)
    for name, answer in answers.items():
        ask = answer.ask
        strength = 1.0 if ask.strength is None else ask.strength
        of = forward(plain, answer.ids, policies.get(str(ask.policy)), strength)
        assert answer.report.policy == ask.policy
        assert len(answer.tokens) == ask.tokens
        if ask.capture:
            assert off_by(answer.report.activation, of.mean(*answer.counted)) < 1e-3, name


def test_the_same_id_again_starts_anew(roomy: Any, prompt: Callable[..., list[int]], plain: Any) -> None:
    for tokens in (12, 5):
        asks = {"again": Ask(prompt(QUESTION), "off", capture=True, tokens=tokens)}
        by_hand(roomy, asks)
        answer = steps(roomy, asks)["again"]
        assert answer.report.n_counted == tokens - 1
        assert off_by(answer.report.activation, forward(plain, answer.ids).mean(*answer.counted)) < 1e-3


def test_aborts_free_what_was_taken(roomy: Any, prompt: Callable[..., list[int]]) -> None:
    places = free_of(roomy)[2]
    asks = {f"a{i}": Ask(prompt(QUESTION), "floor", capture=True, projections=True, tokens=30) for i in range(4)}
    by_hand(roomy, asks)
    steps(roomy, asks, 5)
    held = held_of(roomy)
    assert len(held.sums._free) == places - 4
    assert held.bank[held.bank.loaded["floor"]].users == 4
    roomy.llm_engine.abort_request(["a0", "a2"])
    answers = steps(roomy, asks)
    assert set(answers) == {"a1", "a3"}
    assert answers["a1"].tokens == answers["a3"].tokens == alone(roomy, asks["a1"]).tokens
    assert free_of(roomy) == (0, 0, places)


def test_a_request_that_is_aborted_before_it_starts(roomy: Any, prompt: Callable[..., list[int]]) -> None:
    places = free_of(roomy)[2]
    asks = {"never": Ask(prompt(QUESTION), "floor", capture=True)}
    by_hand(roomy, asks)
    roomy.llm_engine.abort_request(["never"])
    assert steps(roomy, asks) == {}
    assert free_of(roomy) == (0, 0, places)


def test_wrong_keys_are_refused_before_anything_runs(roomy: Any, prompt: Callable[..., list[int]]) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for extra, said in (
        ({"persona_axis_polcy": "floor"}, "Unknown key persona_axis_polcy"),
        ({"persona_axis_policy": "flour"}, "there is no such policy"),
        ({"persona_axis_policy": "floor", "persona_axis_strength": 0.5}, "has bounds"),
        ({"persona_axis_capture": 2}, "expected 0 or 1"),
    ):
        with pytest.raises(VLLMValidationError, match=said):
            roomy.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(extra_args=extra), use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="for one reply"):
        roomy.generate(
            {"prompt_token_ids": [1, 2, 3]}, SamplingParams(n=2, extra_args={"persona_axis_capture": 1}), use_tqdm=False
        )
    assert not roomy.llm_engine.has_unfinished_requests()


def test_several_replies_to_one_request_are_all_held(roomy: Any, prompt: Callable[..., list[int]]) -> None:
    ask = Ask(prompt(QUESTION), "floor", tokens=8)
    wanted = alone(roomy, ask).tokens
    parameters = ask.parameters
    parameters.n, parameters.temperature, parameters.top_k = 2, 1.0, 1
    output = roomy.generate([ask.input], [parameters], use_tqdm=False)[0]
    assert [list(reply.token_ids) for reply in output.outputs] == [wanted, wanted]
    assert report_of(output).policy == "floor"


# ---- policies that change while requests run -----------------------------------------------------------------------


def weaker(policy: Policy) -> Policy:
    """The same directions with lower floors."""
    from persona_axis.steering.interventions import Intervention

    parts = [Intervention(p.layer, p.V, p.lo - 1, p.hi, p.shift) for p in policy.interventions]
    return Policy(tuple(parts))


def test_a_running_request_keeps_the_content_that_it_started_with(
    roomy: Any, prompt: Callable[..., list[int]], policies: dict[str, Any], policy_folder: Path, tmp_path: Path
) -> None:
    ids = prompt(QUESTION)
    old, new = policies["ceiling"], weaker(policies["floor"])
    new.save(tmp_path / "new")
    bank = held_of(roomy).bank
    ask = Ask(ids, "ceiling", tokens=24)
    under_old = alone(roomy, ask).tokens
    asks = {"before": ask}
    by_hand(roomy, asks)
    answers = steps(roomy, asks, 6)
    slot = bank[old.content_hash].slot

    launch.load(roomy, "ceiling", tmp_path / "new")
    try:
        asks["after"] = ask
        by_hand(roomy, {"after": ask})
        answers |= steps(roomy, asks, 1)
        assert (bank[old.content_hash].users, bank[new.content_hash].users) == (1, 1)
        assert bank[old.content_hash].slot == slot != bank[new.content_hash].slot
        answers |= steps(roomy, asks)
        assert answers["before"].tokens == under_old
        assert answers["before"].report.content_hash == old.content_hash
        assert answers["after"].tokens == alone(roomy, ask).tokens != under_old
        assert answers["after"].report.content_hash == new.content_hash
        free_of(roomy)
        assert bank[old.content_hash].users == 0
        assert bank.loaded["ceiling"] == new.content_hash
    finally:
        launch.load(roomy, "ceiling", policy_folder / "ceiling")
    assert alone(roomy, ask).tokens == under_old


def test_slots_of_replaced_policies_are_used_again(
    roomy: Any, policies: dict[str, Any], tmp_path: Path, prompt: Callable[..., list[int]]
) -> None:
    """Loading ten times as many contents as there are slots, with a request under each."""
    policy = policies["floor"]
    said = set()
    for _ in range(10):
        policy = weaker(policy)
        policy.save(tmp_path / policy.content_hash)
        launch.load(roomy, "passing", tmp_path / policy.content_hash)
        answer = together(roomy, [Ask(prompt(QUESTION), "passing", tokens=6)])[0]
        assert answer.report.content_hash == policy.content_hash
        said.add(tuple(answer.tokens))
    launch.unload(roomy, "passing")
    assert len(said) > 1
    assert "passing" not in held_of(roomy).bank.loaded


def test_an_unloaded_policy_holds_who_has_it_and_is_refused_to_others(
    roomy: Any, prompt: Callable[..., list[int]], policies: dict[str, Any], tmp_path: Path
) -> None:
    from vllm.exceptions import VLLMValidationError

    policies["gone"].save(tmp_path / "passing")
    launch.load(roomy, "passing", tmp_path / "passing")
    ask = Ask(prompt(QUESTION), "passing", tokens=16)
    wanted = alone(roomy, Ask(prompt(QUESTION), "gone", tokens=16)).tokens
    by_hand(roomy, {"under": ask})
    steps(roomy, {"under": ask}, 4)
    launch.unload(roomy, "passing")
    with pytest.raises(VLLMValidationError, match="there is no such policy"):
        by_hand(roomy, {"late": ask})
    assert steps(roomy, {"under": ask})["under"].tokens == wanted
    assert free_of(roomy)[:2] == (0, 0)


def test_a_policy_that_does_not_fit_is_refused_and_nothing_changes(
    roomy: Any, tmp_path: Path, prompt: Callable[..., list[int]], policies: dict[str, Any]
) -> None:
    from persona_axis.steering.interventions import cap

    torch.manual_seed(0)
    for name, policy, said in (
        ("wide", Policy((cap(3, torch.randn(64), 1.0),)), "width 64"),
        ("many", Policy((cap(3, torch.randn(3, 576), 1.0),)), "--max-directions 3"),
        ("turns", Policy((cap(3, torch.randn(576), 1.0),), positions="reply"), "positions 'reply'"),
    ):
        policy.save(tmp_path / name)
        loaded = held_of(roomy).bank.loaded
        with pytest.raises(ModelError, match=said):
            launch.load(roomy, "floor", tmp_path / name)
        assert held_of(roomy).bank.loaded == loaded
    answer = together(roomy, [Ask(prompt(QUESTION), tokens=2)])[0]
    assert answer.report.content_hash == policies["floor"].content_hash


def test_the_default_is_not_unloaded(roomy: Any) -> None:
    with pytest.raises(ModelError, match="default"):
        launch.unload(roomy, "floor")
    assert launch.verify(roomy)[0]["runner"] == "V1"


# ---- what must not pass in silence ---------------------------------------------------------------------------------


def test_an_error_in_the_operator_is_an_error_of_the_request(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator itself finds a slot that does not exist, in the middle of the model."""
    assert len(together(tiny_engine, [ASK])[0].tokens) == 3
    held = held_of(tiny_engine)
    fill = held.fill

    def fill_wrong(*args: Any) -> None:
        fill(*args)
        held.slots[1].fill_(99)
        held._active = {1}

    monkeypatch.setattr(held, "fill", fill_wrong)
    with pytest.raises(UsageError, match="slots holds numbers outside"):
        together(tiny_engine, [ASK])


def test_a_request_without_a_ticket_ends_the_engine(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the front end's process runs without the plugin."""
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.setattr(InputProcessor, "process_inputs", InputProcessor.process_inputs.__wrapped__)
    with pytest.raises(PersonaAxisError, match="came without a ticket"):
        together(tiny_engine, [ASK])


def test_a_ticket_for_content_that_is_not_there_ends_the_engine(tiny_engine: Any) -> None:
    """As when the front end has read other files than the worker: this one's policies are of another model."""
    with pytest.raises(PersonaAxisError, match="this worker does not hold"):
        together(tiny_engine, [Ask([1, 2, 3], "floor", tokens=3)])


def test_an_answer_without_a_report_is_not_given(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the engine's process runs without the plugin, or another version of it."""
    monkeypatch.setattr(type(held_of(tiny_engine)), "take_reports", lambda self: {})
    with pytest.raises(PersonaAxisError, match="without a worker's word"):
        together(tiny_engine, [ASK])


def test_a_worker_whose_model_was_loaded_before_the_plugin_came_is_refused(
    tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(worker_of(tiny_engine), "persona_axis_armed")
    with pytest.raises(ModelError, match="not held"):
        launch.verify(tiny_engine, {})
    with pytest.raises(ModelError, match="not held"):
        together(tiny_engine, [ASK])
