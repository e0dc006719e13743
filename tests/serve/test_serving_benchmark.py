"""What ``benchmarks/serving.py`` makes of the seconds and bytes that its engines' processes report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import serving, vllm_child
from benchmarks.serving import Held, Plan, added_share, by_start, in_turn, memory, plugin, run, within
from benchmarks.vllm_child import ChildFailed, Start, environment, floor, in_child, middle, with_start

START = Start("somebody/model", "somebody/model", "float32", sequences=4, tokens=10)
HELD = Held(Path("policies/cap"), "cap", {"share_changed": [0.5]})


# ---- figures -----------------------------------------------------------------------------------------------------


def test_starts_alternate() -> None:
    order: list[str] = []
    found = in_turn(lambda: order.append("a") or [1.0], lambda: order.append("b") or [2.0], 3, lambda _: None)
    assert "".join(order) == "abbaab"
    assert found == ([[1.0]] * 3, [[2.0]] * 3)


def test_a_pair_of_starts_is_one_ratio_of_medians() -> None:
    with_it = [[9.0, 2.0, 1.0], [4.0, 4.0, 4.0], [2.0, 2.0, 2.0]]  # medians 2, 4, 2
    without = [[1.0, 1.0, 9.0], [3.0, 3.0, 3.0], [1.8, 1.8, 1.8]]  # 1, 3, 1.8
    found = by_start(with_it, without)
    assert (
        found.value == 0.75
    )  # of 0.5, 0.75, 0.9: seconds without over seconds with are tokens per second the other way
    assert found.pairs == 3
    assert (found.low, found.high) == (0.5, 0.9)


def test_what_capture_adds_is_told_from_what_the_cache_takes() -> None:
    peaks = {(32, False): 100, (256, False): 180, (32, True): 130, (256, True): 235}
    assert added_share(peaks, 32, 256, stored=50) == pytest.approx((235 - 130 - (180 - 100)) / 50)


# ---- what the processes are told ---------------------------------------------------------------------------------


class Children:
    """In place of engines' processes: keeps what they are told."""

    def __init__(self, answer: Any) -> None:
        self.told: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer = answer

    def __call__(self, work: str, variables: dict[str, str], **arguments: Any) -> Any:
        json.dumps(arguments)
        self.told.append((work, variables, arguments))
        return self.answer(variables, arguments)


def test_the_arms_differ_in_the_plugin_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(lambda variables, _: [1.0] if "PERSONA_AXIS_DISABLE" in variables else [1.25])
    monkeypatch.setattr(serving, "in_child", children)
    result = plugin(Plan(START, starts=2, rounds=1), HELD)
    assert result.ratio.value == pytest.approx(0.8)
    assert result.claim.met(result.ratio) is False
    assert result.details["milliseconds_per_step_more"] == pytest.approx(25)
    assert result.details["tokens_per_s_with_without"] == pytest.approx([32, 40])
    (_, held, with_policy), (_, plain, without) = children.told[:2]
    differing = {k for k in held | plain if held.get(k) != plain.get(k)}
    assert all(name.startswith("PERSONA_AXIS_") for name in differing)
    assert plain["PERSONA_AXIS_DISABLE"] == "1"
    assert held["PERSONA_AXIS_POLICIES"] == str(HELD.folder.resolve())
    assert with_policy == {**without, "extra": {"persona_axis_policy": "cap"}}
    assert without["extra"] is None


def test_within_one_engine_both_are_compared_with_plain_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    children = Children(lambda *_: [[1.0, 1.0], [1.25, 1.25], [2.0, 2.0]])
    monkeypatch.setattr(serving, "in_child", children)
    policy, capture = within(Plan(START), HELD)
    assert len(children.told) == 1
    assert (policy.claim.name, policy.ratio.value) == ("serving, policy", 0.8)
    assert (capture.claim.name, capture.ratio.value) == ("serving, capture", 0.5)


@pytest.mark.parametrize(("per_token", "met"), [(0, True), (1, False)])
def test_memory_of_capture_is_met_when_it_does_not_grow(
    per_token: int, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 1000

    def answer(_: Any, arguments: dict[str, Any]) -> dict[str, int]:
        stack = arguments["capture"] * per_token * arguments["reply"] * START.sequences * width * 4
        return {"peak": 10**6 + 500 * arguments["reply"] + stack, "sums": 4096 + stack, "width": width}

    children = Children(answer)
    monkeypatch.setattr(serving, "in_child", children)
    growth, buffers = memory(Plan(START, memory_pairs=2))
    assert growth.ratio.value == pytest.approx(per_token)
    assert growth.claim.met(growth.ratio) is met
    assert buffers.claim.met(buffers.ratio) is met
    assert len(children.told) == 8
    assert {told[2]["start"]["tokens"] for told in children.told} == {256}  # one configuration for all


def test_nobodys_settings_of_the_plugin_reach_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_AXIS_DEFAULT", "mine")
    monkeypatch.setenv("PERSONA_AXIS_CACHE", "/somewhere")
    names = {name for name in environment(START) if name.startswith("PERSONA_AXIS_")}
    assert names == {"PERSONA_AXIS_CACHE", "PERSONA_AXIS_MODEL_NAME", "PERSONA_AXIS_MAX_CAPTURES"}
    disabled = {name for name in environment(START, disabled=True) if name.startswith("PERSONA_AXIS_")}
    assert disabled == {"PERSONA_AXIS_CACHE", "PERSONA_AXIS_DISABLE"}


def test_a_runner_is_asked_for_by_name() -> None:
    key = "VLLM_USE_V2_MODEL_RUNNER"
    assert [environment(START, runner=r).get(key) for r in ("V1", "V2")] == ["0", "1"]
    assert environment(START).get(key) == os.environ.get(key)


def test_a_process_answers_or_says_why_not() -> None:
    numbers = in_child("benchmarks.vllm_child:floor", dict(os.environ), projections=[1.0, 2.0, 3.0], lift=0.0)
    assert numbers == 2.0
    with pytest.raises(ChildFailed, match="there_is_none"):
        in_child("benchmarks.vllm_child:there_is_none", dict(os.environ))


def test_a_start_reaches_its_process_whole() -> None:
    given = json.loads(json.dumps(with_start(START, rounds=3)))
    assert Start(**given["start"]) == START
    assert given["rounds"] == 3


# ---- policies ----------------------------------------------------------------------------------------------------


def test_eight_layers_around_two_thirds_of_the_depth() -> None:
    assert list(middle(30)) == list(range(16, 24))
    assert list(middle(12)) == list(range(4, 12))
    assert list(middle(3)) == [0, 1, 2]
    for n_layers in range(1, 100):
        assert len(middle(n_layers)) == min(8, n_layers)
        assert middle(n_layers)[-1] < n_layers


def test_a_floor_is_counted_from_the_median_in_standard_deviations() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).numpy() * 2 + 5
    assert floor(values, 0.0) == pytest.approx(np.median(values))
    assert floor(values, 3.0) == pytest.approx(5 + 3 * 2, abs=0.1)


# ---- without vLLM ------------------------------------------------------------------------------------------------


def test_without_vllm_nothing_is_measured_and_it_says_how(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm_child, "find_spec", lambda name: None)
    assert list(run()) == []
    assert serving.main([]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("pip install 'persona-axis[vllm]'") == 2
