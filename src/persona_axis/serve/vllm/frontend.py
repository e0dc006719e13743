"""The plugin in the front end: requests are checked before they are sent, and answers before they are given.

Contract:

1. A request with a wrong key is refused as the user's mistake (HTTP 400), before anything is computed.
2. Every request leaves with a ticket; blocks of the prefix cache are shared only between requests that change the
   stream in the same way.
3. An answer that ends without a worker's report of what held it is an error, not an answer.
4. What a request collected is fetched once, when it has ended, and comes with its last answer.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np

from persona_axis.errors import PersonaAxisError, UsageError
from persona_axis.serve.vllm.held import unpacked
from persona_axis.serve.vllm.keys import CAPTURE, PROJECTIONS, TICKET, Offer, asked, salted, ticket
from persona_axis.serve.vllm.launch import verify_before_serving
from persona_axis.serve.vllm.options import Options
from persona_axis.steering.artifact import load_policy
from persona_axis.steering.policy import Policy


@dataclass
class FrontEnd:
    """What this process's front end offers to requests."""

    offers: dict[str, Offer] = field(default_factory=dict)
    default: str | None = None

    @classmethod
    def of(cls, options: Options) -> FrontEnd:
        """Raises StorageError for a policy that cannot be read."""
        policies = {name: load_policy(folder) for name, folder in options.policy_folders().items()}
        return cls({name: offer(policy) for name, policy in policies.items()}, options.default)


def offer(policy: Policy) -> Offer:
    """What requests may ask of a policy."""
    bounded = any(bool(part.lo.isfinite().any() or part.hi.isfinite().any()) for part in policy.interventions)
    return Offer(policy.content_hash, not bounded)


_front = FrontEnd()


def front() -> FrontEnd:
    """Of this process."""
    return _front


def install(options: Options) -> None:
    """Wrap vLLM's input processor and its two engines."""
    global _front
    _front = FrontEnd.of(options)
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    InputProcessor.process_inputs = _process_inputs(InputProcessor.process_inputs)
    LLMEngine.step = _step(LLMEngine.step)
    AsyncLLM.generate = _generate(AsyncLLM.generate)
    verify_before_serving()


# ---- requests ------------------------------------------------------------------------------------------------------


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        if not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kwargs)
        try:
            given = ticket(asked(_without_ticket(params.extra_args)), _front.offers, _front.default)
            _check_single(given.capture, given.projections, params.n)
        except UsageError as e:
            raise VLLMValidationError(str(e), parameter="persona_axis") from e
        request = original(self, request_id, prompt, params, *args, **kwargs)
        own = request.sampling_params
        own.extra_args = {**(own.extra_args or {}), TICKET: given.to_dict()}
        request.cache_salt = salted(request.cache_salt, given)
        return request

    return process_inputs


def _without_ticket(extra: dict[str, Any] | None) -> dict[str, Any] | None:
    """Parameters that are used again (a beam's, a child's) may carry one; it is made anew."""
    return {key: value for key, value in extra.items() if key != TICKET} if extra else extra


def _check_single(capture: bool, projections: bool, n: int) -> None:
    if n > 1 and (capture or projections):
        raise UsageError(f"{CAPTURE if capture else PROJECTIONS}=1 is for one reply; the request asks for n={n}.")


# ---- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Report:
    """What a worker says of a request that it ran.

    Attributes:
        policy: its name, or "off".
        content_hash: of the policy that held it; "" when nothing did.
        strength: by which shifts were multiplied.
        layers: whose activations there are.
        activation: mean over the reply's tokens that count, ``[layers, d_model]`` float32, when it was asked for and
            a token counts.
        n_counted: tokens that count: all of the reply but its last, which was never read, or ended it.
        projections: layer -> ``[n_counted, directions]`` float32, before the layer's intervention, when asked for;
            empty when no token counts.
    """

    policy: str
    content_hash: str
    strength: float
    n_counted: int
    layers: tuple[int, ...] = ()
    activation: np.ndarray | None = None
    projections: dict[int, np.ndarray] | None = None


def report_of(output: Any) -> Report:
    """Of a ``RequestOutput`` that has ended.

    Raises:
        PersonaAxisError: it carries none (the engine runs without the plugin, or the request was aborted), or what it
            asked for was not to be had.
    """
    said = _said(output)
    if said is None:
        raise _unheld(output)
    if "error" in said:
        raise PersonaAxisError(f"Request {output.request_id}: {said['error']}")
    activation, projections = said.get("activation"), said.get("projections")
    return Report(
        said["policy"],
        said["content_hash"],
        said["strength"],
        said.get("n_counted", _counted(len(output.outputs[0].token_ids))),
        tuple(said.get("layers", ())),
        None if activation is None else _from_text(activation),
        None if projections is None else {int(layer): np.array(p, np.float32) for layer, p in projections.items()},
    )


def _counted(tokens: int) -> int:
    """Of a reply's tokens: not the last, which was never read, or ended it."""
    return max(0, tokens - 1)


def _said(output: Any) -> dict[str, Any] | None:
    return (getattr(output, "kv_transfer_params", None) or {}).get(TICKET)


def _unheld(output: Any) -> PersonaAxisError:
    return PersonaAxisError(
        f"Request {output.request_id} came back without a worker's word on what held it: the engine's processes run "
        "without the persona-axis plugin, or another version of it. Its answer is not given."
    )


def _aborted(output: Any) -> bool:
    return all(reply.finish_reason == "abort" for reply in output.outputs)


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        ended = [output for output in outputs if _is_reply(output) and output.finished]
        wanting = _wanting(ended, [len(output.outputs[0].token_ids) for output in ended])
        if wanting:
            calls = [(said["request"], said["n_counted"]) for said in wanting]
            _put(wanting, self.collective_rpc("persona_axis_fetch", args=(calls,)))
        return outputs

    return step


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        tokens, wanting = 0, []
        answers = original(self, *args, **kwargs)
        async with contextlib.aclosing(answers):
            async for output in answers:
                if not _is_reply(output):
                    yield output
                    continue
                new = len(output.outputs[0].token_ids)
                tokens = tokens + new if _is_delta(args, kwargs) else new
                if output.finished:
                    wanting = _wanting([output], [tokens])
                    if wanting:
                        calls = [(said["request"], said["n_counted"]) for said in wanting]
                        _put(wanting, await self.collective_rpc("persona_axis_fetch", args=(calls,)))
                yield output

    return generate


def _is_reply(output: Any) -> bool:
    return hasattr(output, "outputs") and isinstance(output.outputs, list)


def _is_delta(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    from vllm.sampling_params import RequestOutputKind

    params = kwargs["sampling_params"] if "sampling_params" in kwargs else args[1]
    return bool(params.output_kind == RequestOutputKind.DELTA)


def _wanting(ended: list[Any], tokens: list[int]) -> list[dict[str, Any]]:
    """The reports of ended requests that collected something, told how many of their tokens count.

    Raises:
        PersonaAxisError: one has no report.
    """
    wanting = []
    for output, n in zip(ended, tokens, strict=True):
        said = _said(output)
        if said is None:
            if _aborted(output):
                continue
            raise _unheld(output)
        if said["collects"]:
            said["n_counted"] = _counted(n)
            wanting.append(said)
    return wanting


def _put(wanting: list[dict[str, Any]], answers: Sequence[list[dict[str, Any]]]) -> None:
    """Put what was collected into the reports, as JSON has it: they go into HTTP answers too."""
    for said, parts in zip(wanting, zip(*answers, strict=True), strict=True):
        errors = [part["error"] for part in parts if "error" in part]
        if errors:
            said["error"] = errors[0]
        else:
            said.update(joined(parts, said["n_counted"]))


def joined(parts: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
    """One result of what all ranks collected: pipeline stages have layers of their own, tensor ranks the same ones."""
    stages = {tuple(part["layers"]): part for part in parts}
    ordered = [stages[layers] for layers in sorted(stages)]
    result: dict[str, Any] = {"layers": [layer for part in ordered for layer in part["layers"]]}
    if "activation_sum" in ordered[0]:
        whole = np.concatenate([unpacked(part["activation_sum"]) for part in ordered])
        result["activation"] = _as_text(whole / count) if count else None
    if "projections" in ordered[0]:
        result["projections"] = {
            layer: unpacked(p).tolist() for part in ordered for layer, p in part["projections"].items()
        }
    return result


def _as_text(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4").tobytes()).decode()}


def _from_text(text: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text["float32"]), "<f4").reshape(text["shape"]).astype(np.float32)
