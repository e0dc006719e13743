"""vLLM's two model runners: where each says what it is about to run.

Both end in :meth:`HeldModel.fill` with (request ids, first rows, tokens fed before, padded rows); forwards that are
nobody's, in :meth:`HeldModel.clear`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from persona_axis.errors import ModelError
from persona_axis.serve.vllm.held import HeldModel


def attach(runner: Any, held: HeldModel) -> str:
    """Have a runner fill the buffers before each forward; "V1" or "V2".

    Raises:
        ModelError: neither.
    """
    kinds = {kind.__module__ for kind in type(runner).__mro__ if kind.__name__ == "GPUModelRunner"}
    if "vllm.v1.worker.gpu.model_runner" in kinds:
        attach_v2(runner, held)
        return "V2"
    if "vllm.v1.worker.gpu_model_runner" in kinds:
        attach_v1(runner, held)
        return "V1"
    raise ModelError(
        f"The model runner {type(runner).__module__}.{type(runner).__name__} is not one that the persona-axis plugin "
        "knows. PERSONA_AXIS_DISABLE=1 serves without it."
    )


def attach_v1(runner: Any, held: HeldModel) -> None:
    """Real forwards go through ``_model_forward``; dummies do not."""
    forward, dummy = runner._model_forward, runner._dummy_run

    @wraps(forward)
    def held_forward(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        n = batch.num_reqs
        held.fill(batch.req_ids[:n], runner.query_start_loc.np, batch.num_computed_tokens_cpu[:n], _rows(args, kwargs))
        return forward(*args, **kwargs)

    @wraps(dummy)
    def held_dummy(*args: Any, **kwargs: Any) -> Any:
        held.clear()
        return dummy(*args, **kwargs)

    runner._model_forward, runner._dummy_run = held_forward, held_dummy


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of a forward given (input_ids, positions, intermediate_tensors, inputs_embeds), padding included."""
    names = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("input_ids", "inputs_embeds"):
        if given.get(name) is not None:
            return len(given[name])
    return len(given["intermediate_tensors"]["hidden_states"])


def attach_v2(runner: Any, held: HeldModel) -> None:
    """Real batches are prepared by ``prepare_inputs``; dummies are told to ``execute_model``. Graphs are captured
    without either."""
    prepare, execute, capture = runner.prepare_inputs, runner.execute_model, runner.capture_model

    @wraps(prepare)
    def held_prepare(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        fill_v2(held, batch)
        return batch

    @wraps(execute)
    def held_execute(scheduler_output: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
        if dummy_run:
            held.clear()
        return execute(scheduler_output, *args, dummy_run=dummy_run, **kwargs)

    @wraps(capture)
    def held_capture(*args: Any, **kwargs: Any) -> Any:
        held.clear()
        return capture(*args, **kwargs)

    runner.prepare_inputs, runner.execute_model, runner.capture_model = held_prepare, held_execute, held_capture


def fill_v2(held: HeldModel, batch: Any) -> None:
    """From a ``vllm.v1.worker.gpu.input_batch.InputBatch``."""
    held.fill(batch.req_ids, batch.query_start_loc_np, batch.num_computed_tokens_np, batch.num_tokens_after_padding)
