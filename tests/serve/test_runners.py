"""vLLM's two model runners: which is which, and what each says of the forward that it is about to run.

The runners are stand-ins with the names of vLLM's; the real ones run where vLLM is installed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from persona_axis.errors import ModelError
from persona_axis.serve.vllm.runners import attach

V1, V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
Calls = list[Any]


class Heard:
    """A held model that notes what it hears."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def fill(self, requests: Any, starts: Any, computed: Any, padded: int) -> None:
        n = len(requests)
        self.calls.append(("fill", list(requests), list(starts[: n + 1]), list(computed[:n]), padded))

    def clear(self) -> None:
        self.calls.append("clear")


def a_runner(module: str, calls: Calls, below: str | None = None) -> Any:
    """With two requests in its batch, of 3 and 1 tokens; below: the name of a class that inherits from vLLM's."""

    def noting(name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return result

        return call

    kind = type("GPUModelRunner", (), {"__module__": module})
    runner: Any = type(below, (kind,), {"__module__": "elsewhere"})() if below else kind()
    runner.input_batch = SimpleNamespace(
        num_reqs=2, req_ids=["a", "b", "stale"], num_computed_tokens_cpu=np.array([0, 7, 99])
    )
    runner.query_start_loc = SimpleNamespace(np=np.array([0, 3, 4, 4, 4]))
    for name in ("_model_forward", "_dummy_run", "execute_model", "capture_model"):
        setattr(runner, name, noting(name, "output"))
    prepared = SimpleNamespace(
        req_ids=["a", "b"],
        query_start_loc_np=np.array([0, 3, 4, 4]),
        num_computed_tokens_np=np.array([0, 7, 0]),
        num_tokens_after_padding=8,
    )
    runner.prepare_inputs = noting("prepare_inputs", prepared)
    return runner


FILLED = ("fill", ["a", "b"], [0, 3, 4], [0, 7], 8)


@pytest.mark.parametrize(("module", "version"), [(V1, "V1"), (V2, "V2")])
@pytest.mark.parametrize("below", [None, "CPUModelRunner", "GPUModelRunner"])
def test_runners_are_told_apart_by_the_module_of_vllms_class(module: str, version: str, below: str | None) -> None:
    calls: Calls = []
    held: Any = Heard(calls)
    assert attach(a_runner(module, calls, below), held) == version


@pytest.mark.parametrize("runner", [SimpleNamespace(), a_runner("vllm.v1.worker.tpu_model_runner", [])])
def test_another_runner_is_refused(runner: Any) -> None:
    held: Any = Heard([])
    with pytest.raises(ModelError, match=r"The model runner .* is not one .*PERSONA_AXIS_DISABLE=1"):
        attach(runner, held)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (([0] * 8, "positions"), {}),
        ((), {"input_ids": [0] * 8}),
        ((), {"input_ids": None, "inputs_embeds": [0] * 8}),
        ((None, "positions", None, [0] * 8), {}),
        ((None, "positions", {"hidden_states": [0] * 8}), {}),
    ],
)
def test_v1_fills_before_every_forward_of_its_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls: Calls = []
    held: Any = Heard(calls)
    runner = a_runner(V1, calls)
    attach(runner, held)
    assert runner._model_forward(*args, **kwargs) == "output"
    assert calls == [FILLED, "_model_forward"]


def test_v1s_dummies_are_nobodys() -> None:
    calls: Calls = []
    held: Any = Heard(calls)
    runner = a_runner(V1, calls)
    attach(runner, held)
    assert runner._dummy_run(8) == "output"
    assert calls == ["clear", "_dummy_run"]


def test_v2_fills_from_every_batch_that_it_prepares() -> None:
    calls: Calls = []
    held: Any = Heard(calls)
    runner = a_runner(V2, calls)
    attach(runner, held)
    assert runner.execute_model("scheduled") == "output"
    assert runner.prepare_inputs("scheduled").req_ids == ["a", "b"]
    assert calls == ["execute_model", "prepare_inputs", FILLED]


def test_v2s_dummies_and_graphs_are_nobodys() -> None:
    calls: Calls = []
    held: Any = Heard(calls)
    runner = a_runner(V2, calls)
    attach(runner, held)
    assert runner.execute_model("scheduled", None, dummy_run=True) == "output"
    assert runner.capture_model(profile_only=True) == "output"
    assert calls == ["clear", "execute_model", "clear", "capture_model"]
