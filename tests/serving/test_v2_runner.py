"""vLLM's second model runner, which needs a GPU to run: the adapter against its real classes.

That an engine with it works is measured by ``benchmarks/vllm_gpu.py``.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from persona_axis.serve.vllm import runners
from persona_axis.serve.vllm.bank import Bank
from persona_axis.serve.vllm.held import HeldModel
from persona_axis.steering.interventions import add, cap
from persona_axis.steering.policy import Policy

pytestmark = pytest.mark.serving

CPU = torch.device("cpu")
# Requests of one forward: id, policy, strength, prompt tokens, fed before, fed now.
BATCH = (
    ("a", "held", 1.0, 9, 0, 5),  # a prompt's first piece
    ("b", "", 0.0, 4, 6, 1),
    ("c", "late", 1.0, 3, 0, 3),
    ("d", "pushed", 0.5, 7, 8, 1),
    ("e", "late", 1.0, 2, 5, 1),
)
PADDED = 16


def held_model() -> HeldModel:
    """With the batch's requests under way, which are all captured."""
    torch.manual_seed(0)
    bank = Bank(range(4), 4, 8, max_policies=3, max_directions=1, device=CPU)
    directions = torch.randn(4, 8)
    made = {
        "held": Policy((cap(0, directions[0], 1.0), cap(2, directions[2], 1.0))),
        "late": Policy((cap(1, directions[1], 1.0),), positions="decode"),
        "pushed": Policy(tuple(add(layer, directions[layer], 2.0) for layer in range(4))),
    }
    hashes = {name: bank.load(name, policy).content_hash for name, policy in made.items()}
    held = HeldModel(bank, rows=32, places=8)
    tickets = [
        (
            name,
            {
                "policy": policy or "off",
                "content_hash": hashes.get(policy, ""),
                "strength": strength,
                "capture": True,
                "projections": False,
            },
            prompt,
        )
        for name, policy, strength, prompt, _, _ in BATCH
    ]
    held.begin([], tickets)
    for name, _, _, prompt, before, _ in BATCH:  # as if the reply's tokens so far had been fed
        held._running[name].seen = max(0, before - prompt)
    return held


def buffers(held: HeldModel) -> dict[str, torch.Tensor]:
    return {"host": held._host[:, :PADDED].clone(), "slots": held.slots[:, :PADDED].clone()}


def real_batch() -> Any:
    """vLLM's own, filled by hand as its runner fills it."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    fed = np.array([now for *_, now in BATCH], np.int32)
    batch = InputBatch.make_dummy(len(BATCH), int(fed.sum()), InputBuffers(8, 32, CPU))
    starts = np.full(8 + 1, fed.sum(), np.int32)  # as long as the most requests there can be, then padding
    starts[0] = 0
    starts[1 : len(fed) + 1] = fed.cumsum()
    batch.req_ids = [name for name, *_ in BATCH]
    batch.num_scheduled_tokens = fed
    batch.query_start_loc_np = starts
    batch.query_start_loc = torch.from_numpy(starts)
    batch.num_computed_tokens_np = np.array([before for *_, before, _ in BATCH], np.int32)
    batch.num_tokens_after_padding = PADDED
    return batch


def through_v1() -> dict[str, torch.Tensor]:
    """The same forward as the first runner's adapter tells of it."""
    held = held_model()
    fed = np.array([now for *_, now in BATCH], np.int32)
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(
            num_reqs=len(BATCH),
            req_ids=[name for name, *_ in BATCH] + ["left over"],
            num_computed_tokens_cpu=np.array([before for *_, before, _ in BATCH] + [77]),
        ),
        query_start_loc=SimpleNamespace(np=np.concatenate([[0], fed.cumsum(), [fed.sum()] * 3])),
        _model_forward=lambda *_, **__: None,
        _dummy_run=lambda *_, **__: None,
    )
    runners.attach_v1(runner, held)
    runner._model_forward(torch.zeros(PADDED))
    return buffers(held)


def test_both_runners_fill_the_same_buffers() -> None:
    held = held_model()
    runners.fill_v2(held, real_batch())
    second, first = buffers(held), through_v1()
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_the_buffers_say_whose_each_row_is() -> None:
    held = held_model()
    runners.fill_v2(held, real_batch())
    slot = {name: held.bank[content].slot for name, content in held.bank.loaded.items()}
    a, c, d, e = slot["held"], 0, slot["pushed"], slot["late"]  # c is a prompt under a policy for replies
    assert held._host[0, :PADDED].tolist() == [a] * 5 + [0] + [c] * 3 + [d] + [e] + [0] * 5
    captured = held._host[1, :PADDED] > 0
    assert captured.nonzero().flatten().tolist() == [5, 9, 10]
    assert held.strength[:PADDED].tolist() == [1.0] * 5 + [0.0] + [1.0] * 3 + [0.5] + [1.0] * 6


def runner_class() -> Any:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return GPUModelRunner


class Recorded:
    """What a held model was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def fill(self, *_: Any) -> None:
        self.told.append("fill")

    def clear(self) -> None:
        self.told.append("clear")


def test_a_real_runners_methods_are_wrapped() -> None:
    """An object of vLLM's class, without the GPU that its constructor wants."""

    class Runner(runner_class()):  # type: ignore[misc]
        def prepare_inputs(self, *_: Any) -> Any:
            return real_batch()

        def execute_model(self, scheduler_output: Any, *_: Any, dummy_run: bool = False, **__: Any) -> Any:
            return None if dummy_run else self.prepare_inputs(scheduler_output)

        def capture_model(self, *_: Any, **__: Any) -> int:
            return 0

    runner, held = object.__new__(Runner), Recorded()
    assert runners.attach(runner, held) == "V2"  # type: ignore[arg-type]
    runner.execute_model("scheduled")
    runner.execute_model("made up", dummy_run=True)
    runner.capture_model()
    assert held.told == ["fill", "clear", "clear"]


def test_the_runner_on_a_cpu_is_the_first() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    runner, held = object.__new__(CPUModelRunner), Recorded()
    assert runners.attach(runner, held) == "V1"  # type: ignore[arg-type]


# ---- what an upgrade of vLLM may take away -------------------------------------------------------------------------


def test_the_batch_has_the_fields_that_are_read() -> None:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert fields >= {"req_ids", "query_start_loc_np", "num_computed_tokens_np", "num_tokens_after_padding"}


def test_the_second_runner_prepares_its_batches_where_the_adapter_waits() -> None:
    runner = runner_class()
    executed = inspect.signature(runner.execute_model).parameters
    assert executed["dummy_run"].default is False
    assert "self.prepare_inputs(" in inspect.getsource(runner.execute_model)
    assert callable(runner.capture_model)
    assert "query_start_loc_np=query_start_loc_np" in inspect.getsource(runner.prepare_inputs)


def test_the_first_runner_goes_through_the_forward_that_is_wrapped() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "self._model_forward(" in inspect.getsource(GPUModelRunner.execute_model)
    assert "self._model_forward(" not in inspect.getsource(GPUModelRunner._dummy_run)
    assert list(inspect.signature(GPUModelRunner._model_forward).parameters)[1:5] == [
        "input_ids",
        "positions",
        "intermediate_tensors",
        "inputs_embeds",
    ]


@pytest.mark.parametrize(
    ("module", "owner", "method"),
    [
        ("vllm.v1.worker.gpu_worker", "Worker", "load_model"),
        ("vllm.v1.worker.gpu_worker", "Worker", "execute_model"),
        ("vllm.v1.worker.gpu_worker", "Worker", "sample_tokens"),
        ("vllm.v1.core.sched.scheduler", "Scheduler", "update_from_output"),
        ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs"),
        ("vllm.v1.engine.llm_engine", "LLMEngine", "step"),
        ("vllm.v1.engine.async_llm", "AsyncLLM", "generate"),
    ],
)
def test_what_is_wrapped_is_there_and_not_overridden_on_the_cpu(module: str, owner: str, method: str) -> None:
    from importlib import import_module

    from vllm.v1.worker.cpu_worker import CPUWorker

    kind = getattr(import_module(module), owner)
    assert callable(getattr(kind, method))
    if owner == "Worker":
        assert method not in vars(CPUWorker)
