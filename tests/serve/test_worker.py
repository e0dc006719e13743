"""A worker: which configurations it refuses, how it arms the model that it loaded, and what it hears of requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layered_models import N_LAYERS, a_model
from small_policies import WIDTH, made

from persona_axis.errors import ModelError, PersonaAxisError, UsageError
from persona_axis.model.identity import ModelIdentity
from persona_axis.serve.vllm import layers, worker
from persona_axis.serve.vllm.keys import TICKET, Ticket
from persona_axis.serve.vllm.options import Options
from persona_axis.steering.policy import Policy


def a_config(**changes: Any) -> Any:
    """Of vLLM, as far as the plugin looks. A change's name is a path with ``__`` for dots."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            enable_dbo=False,
            prefill_context_parallel_size=1,
            use_sequence_parallel_moe=False,
            data_parallel_size=1,
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
        ),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(enable_sp=False), cudagraph_capture_sizes=[1, 2, 4]
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        model_config=SimpleNamespace(
            is_encoder_decoder=False,
            model="org/model",
            quantization=None,
            hf_config=SimpleNamespace(_commit_hash="abc"),
            hf_text_config=SimpleNamespace(num_hidden_layers=N_LAYERS),
            get_hidden_size=lambda: WIDTH,
        ),
        speculative_config=None,
        additional_config={},
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        at = config
        for step in path:
            at = getattr(at, step)
        setattr(at, last, value)
    return config


# ---- configurations -------------------------------------------------------------------------------------------------


def test_tensor_and_pipeline_parallel_models_can_be_held() -> None:
    worker.refuse_unsupported(a_config())


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("compilation_config__pass_config__enable_sp", True, "sequence parallelism"),
        ("parallel_config__use_sequence_parallel_moe", True, "sequence parallelism"),
        ("parallel_config__enable_dbo", True, "--enable-dbo"),
        ("parallel_config__prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config__data_parallel_size", 2, "data parallelism"),
        ("speculative_config", SimpleNamespace(method="ngram"), "speculative decoding"),
        ("cache_config__kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill"),
        ("model_config__is_encoder_decoder", True, "encoder-decoder"),
    ],
)
def test_what_would_be_held_wrongly_is_refused_by_name(setting: str, value: Any, says: str) -> None:
    with pytest.raises(UsageError, match=rf"under [^,.]*{says}[^,.]*\. .*PERSONA_AXIS_DISABLE=1"):
        worker.refuse_unsupported(a_config(**{setting: value}))


def test_all_that_is_wrong_is_said_at_once() -> None:
    config = a_config(speculative_config=object(), model_config__is_encoder_decoder=True)
    with pytest.raises(UsageError, match="under speculative decoding, an encoder-decoder model"):
        worker.refuse_unsupported(config)


def mark(options: Options, **given: Any) -> Any:
    config = a_config(additional_config=given)
    worker.mark_compile_cache(config, options)
    return config.additional_config


def test_compiled_code_is_kept_apart_by_version_model_and_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, first = {"theirs": 1}, mark(Options(), theirs=1)
    assert first["theirs"] == 1
    assert first != plain
    assert first == mark(Options(), theirs=1)
    sizes = [Options(max_policies=9), Options(max_directions=2), Options(max_captures=1)]
    others = [mark(options, theirs=1) for options in sizes]
    layers.arm({}, lambda *_: None)
    others.append(mark(Options(), theirs=1))  # of the next model of this process
    monkeypatch.setattr(worker, "TOOL_VERSION", "0.0.9")
    others.append(mark(Options(), theirs=1))
    assert all(one != other for i, one in enumerate(others) for other in [first, *others[:i]])


def test_policies_leave_compiled_code_valid() -> None:
    assert mark(Options(policies=Path("a"), default="p")) == mark(Options(policies=Path("b")))


def test_a_configuration_that_cannot_be_marked_is_refused() -> None:
    with pytest.raises(UsageError, match="additional_config is a str"):
        worker.mark_compile_cache(a_config(additional_config="x"), Options())


@pytest.mark.parametrize(("graphs", "least"), [([1, 2, 4], 2048), ([512, 4096], 4096), ([], 2048), (None, 2048)])
def test_there_is_room_for_the_largest_forward(graphs: list[int] | None, least: int) -> None:
    assert worker.rows_at_most(a_config(compilation_config__cudagraph_capture_sizes=graphs)) >= least


# ---- arming ---------------------------------------------------------------------------------------------------------


class GPUModelRunner:
    """vLLM's, as far as arming looks at it."""

    __module__ = "vllm.v1.worker.gpu_model_runner"

    def __init__(self) -> None:
        self.model = a_model()
        self.get_model = lambda: self.model
        self._model_forward = self._dummy_run = lambda *args, **kwargs: None


def loaded(options: Options | None = None, **changes: Any) -> Any:
    """A worker that has loaded and armed a model."""
    one = SimpleNamespace(vllm_config=a_config(**changes), model_runner=GPUModelRunner(), device="cpu")
    one.persona_axis_armed = worker.hold(one, options or Options())
    return one


def saved(folder: Path, policy: Policy, model: ModelIdentity) -> Options:
    Policy(policy.interventions, {}, policy.positions, model).save(folder / "calm")
    return Options(folder)


MODEL = ModelIdentity("org/model", "abc", "", N_LAYERS, WIDTH)


def test_the_model_that_was_loaded_is_held_with_the_policies_of_the_environment(tmp_path: Path) -> None:
    policy = made(1)
    one = loaded(saved(tmp_path, policy, MODEL))
    state = worker.persona_axis_state(one)
    assert (state["layers"], state["n_layers"], state["runner"]) == ([0, 1, 2], N_LAYERS, "V1")
    assert state["policies"] == {"calm": policy.content_hash}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (ModelIdentity("org/other", "abc"), "Its model is org/other, the loaded model's org/model"),
        (ModelIdentity("org/model", "def"), "Its revision is def, the loaded model's abc"),
        (ModelIdentity("org/model", "abc", n_layers=9), "model of 9 layers"),
    ],
)
def test_a_policy_of_another_model_is_not_loaded(tmp_path: Path, other: ModelIdentity, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        loaded(saved(tmp_path, made(1), other))


def test_another_models_policy_is_loaded_when_the_model_is_allowed_by_name(tmp_path: Path) -> None:
    options = saved(tmp_path, made(1), ModelIdentity("org/other", "abc"))
    assert loaded(Options(options.policies, allow_model="org/model")).persona_axis_armed.held.bank.loaded
    named = Options(options.policies, model_name="org/other")
    assert loaded(named).persona_axis_armed.identity.name == "org/other"


def test_a_worker_that_was_not_armed_says_so() -> None:
    for call in (worker.persona_axis_state, lambda one: worker.persona_axis_fetch(one, [("r", 1)])):
        with pytest.raises(ModelError, match="not held: the persona-axis plugin came too late"):
            call(SimpleNamespace())


# ---- requests -------------------------------------------------------------------------------------------------------


def scheduled(*new: Any, ended: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    return SimpleNamespace(scheduled_new_reqs=list(new), finished_req_ids=ended)


def a_request(id: str, given: Ticket | None, tokens: list[int] | None = None, **more: Any) -> Any:
    params = SimpleNamespace(extra_args={"other": 1} if given is None else {TICKET: given.to_dict()})
    return SimpleNamespace(req_id=id, sampling_params=params, prompt_token_ids=tokens or [1, 2], **more)


def step(one: Any, scheduled: Any, run: Callable[..., Any] = lambda *_: None) -> Any:
    return worker._execute_model(run, one, scheduled)


def test_requests_start_before_the_forward_and_their_reports_leave_after_it() -> None:
    one, output = loaded(), SimpleNamespace(req_ids=["r"])

    def run(worker: Any, scheduled: Any) -> Any:
        assert set(one.persona_axis_armed.held._running) == {"r"}
        return output

    assert step(one, scheduled(a_request("r", Ticket(capture=True))), run) is output
    assert output.persona_axis["r"]["collects"]
    step(one, scheduled(ended={"r"}))
    assert "error" not in worker.persona_axis_fetch(one, [("r", 0)])[0]


def test_a_request_without_a_ticket_ends_the_step_before_the_forward() -> None:
    one, forwards = loaded(), []
    for params in (a_request("r", None).sampling_params, SimpleNamespace(extra_args=None)):
        request = SimpleNamespace(req_id="r", sampling_params=params, prompt_token_ids=[1])
        with pytest.raises(PersonaAxisError, match="Request r came without a ticket"):
            step(one, scheduled(request), lambda *_: forwards.append(1))
    assert forwards == []


def test_requests_that_are_no_replies_need_no_ticket() -> None:
    one = loaded()
    step(one, scheduled(SimpleNamespace(req_id="e", sampling_params=None, prompt_token_ids=[1])))
    assert one.persona_axis_armed.held._running["e"].slot == 0


def test_prompts_that_are_embeddings_have_a_length_too() -> None:
    request = a_request("r", Ticket(), prompt_embeds=torch.zeros(7, WIDTH))
    request.prompt_token_ids = None
    one = loaded()
    step(one, scheduled(request))
    assert one.persona_axis_armed.held._running["r"].prompt_tokens == 7


def test_what_vllm_warms_up_with_needs_no_ticket() -> None:
    """It makes up requests and runs them through the worker's own methods."""
    one = loaded()

    def warm_up(one: Any) -> str:
        step(one, scheduled(a_request("_warmup_0_", None)))
        step(one, scheduled(ended={"_warmup_0_"}))
        return "warm"

    assert worker._warm_up(warm_up, one) == "warm"
    assert one.persona_axis_armed.held._running == {}
    with pytest.raises(PersonaAxisError, match="without a ticket"):
        step(one, scheduled(a_request("r", None)))
