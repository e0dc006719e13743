"""The plugin in a worker process: arming the model that is loaded, hearing of requests, answering for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from persona_axis.errors import ModelError, UsageError
from persona_axis.model.identity import ModelIdentity, quantisation_of
from persona_axis.model.loading import revision_of
from persona_axis.serve.vllm import layers, runners
from persona_axis.serve.vllm.bank import Bank
from persona_axis.serve.vllm.held import HeldModel
from persona_axis.serve.vllm.keys import TICKET
from persona_axis.serve.vllm.options import Options, checked_name
from persona_axis.steering.artifact import TOOL_VERSION, load_policy
from persona_axis.steering.compatibility import check_fits

ARMED = "persona_axis_armed"  # the attribute of a worker


@dataclass(frozen=True, eq=False)
class Armed:
    """A worker's model with the operator in it. ``runner``: V1 or V2."""

    held: HeldModel
    blocks: dict[int, nn.Module]
    identity: ModelIdentity
    runner: str


def install() -> None:
    """Wrap vLLM's worker: every model that it loads is held."""
    from vllm.v1.worker.gpu_worker import Worker

    _wrap(Worker, "load_model", _load_model)
    _wrap(Worker, "compile_or_warm_up_model", _warm_up)
    _wrap(Worker, "execute_model", _execute_model)
    _wrap(Worker, "sample_tokens", _sample_tokens)
    for method in (persona_axis_state, persona_axis_fetch, persona_axis_load, persona_axis_unload):
        setattr(Worker, method.__name__, method)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


# ---- what is wrapped -----------------------------------------------------------------------------------------------


def _load_model(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    options = Options.from_environment()
    config = worker.vllm_config
    refuse_unsupported(config)
    mark_compile_cache(config, options)
    loaded = original(worker, *args, **kwargs)
    setattr(worker, ARMED, hold(worker, options))
    return loaded


def _warm_up(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    with armed_of(worker).held.warming_up():
        return original(worker, *args, **kwargs)


def _execute_model(original: Callable[..., Any], worker: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    held = armed_of(worker).held
    held.begin(
        sorted(scheduled.finished_req_ids),
        [(new.req_id, _ticket(new), _prompt_tokens(new)) for new in scheduled.scheduled_new_reqs],
    )
    return _with_reports(held, original(worker, scheduled, *args, **kwargs))


def _sample_tokens(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    return _with_reports(armed_of(worker).held, original(worker, *args, **kwargs))


def _ticket(new: Any) -> dict[str, Any] | None:
    if new.sampling_params is None:  # an embedding: there is no reply to hold
        return {}
    return (new.sampling_params.extra_args or {}).get(TICKET)


def _prompt_tokens(new: Any) -> int:
    return len(new.prompt_token_ids) if new.prompt_token_ids is not None else len(new.prompt_embeds)


def _with_reports(held: HeldModel, output: Any) -> Any:
    """The reports of requests that started, on the output that travels to the scheduler."""
    if output is None:
        return None
    if hasattr(output, "get_output"):  # asynchronous: read when it is there
        reports = held.take_reports()
        if reports:
            later = output.get_output
            output.get_output = lambda: _add(later(), reports)
        return output
    if hasattr(output, "req_ids") and output.req_ids:
        return _add(output, held.take_reports())
    return output


def _add(output: Any, reports: dict[str, Any]) -> Any:
    if reports:
        output.persona_axis = reports
    return output


# ---- arming --------------------------------------------------------------------------------------------------------


def refuse_unsupported(config: Any) -> None:
    """Ways of running a model in which a row is not one whole token, or not a token of the request at all.

    Raises:
        UsageError: names the setting.
    """
    parallel, passes = config.parallel_config, config.compilation_config.pass_config
    wrong = {
        "sequence parallelism": getattr(passes, "enable_sp", False) or parallel.use_sequence_parallel_moe,
        "dual batch overlap (--enable-dbo)": getattr(parallel, "enable_dbo", False),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "data parallelism inside one engine (start several servers)": parallel.data_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "fast prefill of shared KV caches (--kv-sharing-fast-prefill)": config.cache_config.kv_sharing_fast_prefill,
        "an encoder-decoder model": config.model_config.is_encoder_decoder,
    }
    found = [name for name, on in wrong.items() if on]
    if found:
        raise UsageError(
            f"The persona-axis plugin cannot hold a model under {', '.join(found)}. Turn it off, or serve without the "
            "plugin (PERSONA_AXIS_DISABLE=1)."
        )


def mark_compile_cache(config: Any, options: Options) -> None:
    """Code compiled with the operator in it is never loaded without the plugin, nor the other way round.

    Policies are no part of the mark: compiled code does not know them.

    Raises:
        UsageError: ``additional_config`` is not a dict.
    """
    if not isinstance(config.additional_config, dict):
        raise UsageError(f"additional_config is a {type(config.additional_config).__name__}; the plugin marks a dict.")
    sizes = [options.max_policies, options.max_directions, options.max_captures]
    mark = {"version": TOOL_VERSION, "model": layers.next_model(), "bank": sizes}
    config.additional_config = {**config.additional_config, TICKET: mark}


def hold(worker: Any, options: Options) -> Armed:
    """Arm the model that ``worker`` has loaded, with the policies that are configured."""
    config, runner = worker.vllm_config, worker.model_runner
    text = config.model_config.hf_text_config
    n_layers, d_model = int(text.num_hidden_layers), int(config.model_config.get_hidden_size())
    device = torch.device(worker.device)
    blocks = layers.vllm_layers(runner.get_model(), n_layers)
    bank = Bank(blocks, n_layers, d_model, options.max_policies, options.max_directions, device)
    identity = identity_of(config, n_layers, d_model, options.model_name)
    for name, folder in options.policy_folders().items():
        policy = load_policy(folder)
        check_fits(policy, identity, options.allow_model)
        bank.load(name, policy)
    held = HeldModel(bank, rows_at_most(config), options.max_captures)
    layers.arm(blocks, held.run)
    return Armed(held, blocks, identity, runners.attach(runner, held))


def rows_at_most(config: Any) -> int:
    """The most rows of one forward: the scheduler's tokens, or the largest graph they may be padded to."""
    graphs = config.compilation_config.cudagraph_capture_sizes or [0]
    return max(int(config.scheduler_config.max_num_batched_tokens), *(int(size) for size in graphs)) + 64


def identity_of(config: Any, n_layers: int, d_model: int, name: str | None = None) -> ModelIdentity:
    """What policies are compared with."""
    model = config.model_config
    source = str(model.model)

    return ModelIdentity(
        name=name or (Path(source).name if Path(source).is_dir() else source),
        revision=revision_of(source, model.hf_config),
        quantisation=quantisation_of(model.hf_config) or str(model.quantization or ""),
        n_layers=n_layers,
        d_model=d_model,
    )


# ---- answers to collective_rpc -------------------------------------------------------------------------------------


def persona_axis_state(worker: Any) -> dict[str, Any]:
    """What this worker holds, for the launcher's check."""
    armed = armed_of(worker)
    return {
        "version": TOOL_VERSION,
        "runner": armed.runner,
        "n_layers": armed.held.bank.n_layers,
        "layers": list(layers.armed(armed.blocks)),
        "policies": armed.held.bank.loaded,
    }


def persona_axis_fetch(worker: Any, requests: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """:meth:`HeldModel.fetch` for each (request, tokens that count)."""
    held = armed_of(worker).held
    return [held.fetch(request, count) for request, count in requests]


def persona_axis_load(worker: Any, name: str, folder: str, allow_model: str | None = None) -> dict[str, str]:
    """Load a policy while the engine runs; what is loaded then."""
    armed = armed_of(worker)
    policy = load_policy(folder)
    check_fits(policy, armed.identity, allow_model)
    armed.held.bank.load(checked_name(name), policy)
    return armed.held.bank.loaded


def persona_axis_unload(worker: Any, name: str) -> dict[str, str]:
    """Requests that run under it go on; what is loaded then."""
    bank = armed_of(worker).held.bank
    bank.unload(name)
    return bank.loaded


def armed_of(worker: Any) -> Armed:
    """Raises ModelError when the worker's model is not held."""
    armed = getattr(worker, ARMED, None)
    if armed is None:
        raise ModelError("This worker's model is not held: the persona-axis plugin came too late to arm it.")
    return armed
