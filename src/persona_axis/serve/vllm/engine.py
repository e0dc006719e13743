"""``persona-axis run --engine vllm``: replies and their activations from a vLLM engine, in one pass.

The engine runs in processes of its own; prompts go in as token ids, and every reply comes back with its ids, the
log-probabilities of the full softmax at temperature 1, and the mean residual that the plugin summed while it was
generated. Each rollout has a seed of its own, from the run's and its key. vLLM promises no more than its arithmetic
does: batches change which kernels run, so a resumed run need not repeat its replies bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from persona_axis.errors import MissingDependency, ModelError
from persona_axis.model.decode import check_finite, non_finite_logits
from persona_axis.model.engine import OnTokens, Reply, Request, Sampling, nobody, reply_seed
from persona_axis.model.fallback import content_start
from persona_axis.model.layers import check_layers
from persona_axis.model.loading import ChatModel, key_value_bytes
from persona_axis.serve.vllm.options import OFF, PREFIX

SEQUENCES = 128  # generated at one time
LONGEST_ON_CPU = 8192  # tokens of a conversation, which are then read at once
SPARE = 256  # positions: vLLM keeps a block of them (of 128 on a CPU) to itself, and rounds down to whole blocks
QUEUED = 2 * SEQUENCES  # in the engine at one time, so that it never waits for us


class VLLMEngine:
    """Implements :class:`~persona_axis.model.engine.Engine` with a ``vllm.LLM`` whose workers hold the plugin."""

    name = "vllm"

    def __init__(self, llm: Any, chat: ChatModel, layers: tuple[int, ...]) -> None:
        self.llm = llm
        self.chat = chat
        self.layers = layers

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: OnTokens = nobody
    ) -> Iterator[Reply]:
        """Replies as they are finished.

        Raises:
            ModelError: a reply begins with a thinking block, or given replies are to be told apart.
            NonFiniteError: NaN or infinity in an activation or a log-probability.
        """
        from vllm.inputs import tokens_input

        engine, left = self.llm.llm_engine, iter(requests)
        running: dict[str, Request] = {}
        while True:
            for request in islice(left, QUEUED - len(running)):
                self._check(request)
                running[request.key] = request
                engine.add_request(
                    request.key, tokens_input(list(request.prompt_ids)), self._parameters(request, sampling)
                )
            if not running:
                return
            for output in engine.step():
                if output.finished:
                    reply = self._reply(running.pop(output.request_id), output)
                    on_tokens(len(reply.token_ids))
                    yield reply

    def close(self) -> None:
        """End the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def _check(self, request: Request) -> None:
        if self.chat.opens_thinking(request.prompt_ids):
            raise ModelError(
                f"Rollout {request.key} begins with a thinking block, whose tokens do not count; the vLLM engine "
                "cannot tell where it ends. Use --engine loop."
            )

    def _parameters(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=reply_seed(sampling.seed, request.key) >> 1,  # vLLM's are signed
            stop_token_ids=sorted(self.chat.stop_ids),
            ignore_eos=True,  # the ids above are the ones that count
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"persona_axis_policy": OFF, "persona_axis_capture": 1},
        )

    def _reply(self, request: Request, output: Any) -> Reply:
        from persona_axis.serve.vllm.frontend import report_of

        said, report = output.outputs[0], report_of(output)
        if said.finish_reason not in ("stop", "length"):
            raise ModelError(f"vLLM ended rollout {request.key} with {said.finish_reason!r}; nothing of it is kept.")
        tokens = list(said.token_ids)
        if content_start(self.chat, request.prompt_ids, tokens):
            raise ModelError(
                f"The reply of rollout {request.key} begins with a thinking block, whose tokens do not count; the vLLM "
                "engine cannot leave them out. Use --engine loop."
            )
        logprobs = np.array(
            [step[token].logprob for step, token in zip(said.logprobs, tokens, strict=True)], dtype=np.float32
        )
        activation = None
        if report.activation is not None:
            places = [report.layers.index(layer) for layer in self.layers]
            activation = torch.from_numpy(report.activation[places])
            check_finite(activation, self.layers, request.key)
        if not np.isfinite(logprobs).all():
            raise non_finite_logits(request.key)
        return Reply(
            key=request.key,
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=logprobs,
            finish_reason=said.finish_reason,
            n_counted=report.n_counted,
            content_start=0,
            activation=activation,
        )


def _lengths(longest: int) -> dict[str, Any]:
    """How long a conversation may be. On a CPU prompts are read whole: vLLM 0.32 rewinds a seeded request's generator
    after each part of a prompt, which a CPU's generator does not do."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {"max_model_len": longest}
    longest = min(longest, LONGEST_ON_CPU)
    return {"max_model_len": longest, "enable_chunked_prefill": False, "max_num_batched_tokens": longest}


def start(chat: ChatModel, layers: tuple[int, ...] | None, batch_tokens: int) -> VLLMEngine:
    """A vLLM engine for the model that ``chat`` was loaded from, in its dtype, with the plugin in every worker.

    Args:
        chat: renders prompts, and judges replies.
        layers: captured ones; None is all.
        batch_tokens: positions of key/value storage.

    Raises:
        MissingDependency: vLLM is not installed.
        ModelError: its workers do not hold the plugin.
    """
    from persona_axis.serve.vllm.launch import verify

    captured = check_layers(layers, chat.n_layers)
    os.environ[f"{PREFIX}MAX_CAPTURES"] = str(QUEUED)  # those that wait after a preemption keep their places
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # the run has its own words for what goes on
    try:
        from vllm import LLM
    except ImportError as e:
        raise MissingDependency(f"--engine vllm needs vLLM ({e}): pip install 'persona-axis[vllm]'") from e
    config = chat.model.config
    longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or batch_tokens
    llm = LLM(
        str(chat.model.name_or_path),
        revision=getattr(config, "_commit_hash", None),
        trust_remote_code=type(chat.model).__module__.startswith("transformers_modules"),
        dtype=chat.dtype,
        max_num_seqs=SEQUENCES,
        **_lengths(min(int(longest), batch_tokens)),
        kv_cache_memory_bytes=(batch_tokens + SPARE) * key_value_bytes(config, chat.model.dtype),
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    verify(llm)
    return VLLMEngine(llm, chat, captured)
