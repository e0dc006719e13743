"""Generation through ``model.generate``, for models the decoding loop cannot drive.

One reply at a time, with the same hooks, the same counting rules and the same resume behaviour: the sampler is
seeded from the run seed and the rollout key. Slow, correct, and always announced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from persona_axis.model.decode import check_finite, non_finite_logits
from persona_axis.model.engine import OnTokens, Reply, Request, Sampling, nobody, reply_seed
from persona_axis.model.layers import main_device, tapped
from persona_axis.model.loading import ChatModel
from persona_axis.model.tokens import announced, continuing


class GenerateEngine:
    """Implements :class:`~persona_axis.model.engine.Engine` with ``model.generate``."""

    name = "generate"

    def __init__(self, chat: ChatModel, layers: tuple[int, ...]) -> None:
        self.chat = chat
        self.layers = layers

    def generate(
        self, requests: Iterable[Request], sampling: Sampling, on_tokens: OnTokens = nobody
    ) -> Iterator[Reply]:
        for request in requests:
            reply = self._one(request, sampling)
            on_tokens(len(reply.token_ids))
            yield reply

    def close(self) -> None:
        """It holds nothing of its own."""

    @torch.inference_mode()
    def _one(self, request: Request, sampling: Sampling) -> Reply:
        steps: list[list[Tensor]] = [[] for _ in self.layers]

        def keep(i: int, hidden: Tensor) -> None:
            steps[i].append(hidden[0, -1].float().cpu())

        ids = torch.tensor([request.prompt_ids], device=main_device(self.chat.model))
        with torch.random.fork_rng(), tapped([self.chat.blocks[layer] for layer in self.layers], keep):
            torch.manual_seed(reply_seed(sampling.seed, request.key))
            try:
                with announced(continuing(len(request.prompt_ids), request.replies)):
                    out = plain_generate(self.chat, ids, sampling)
            except RuntimeError as e:
                if "probability tensor" not in str(e):
                    raise
                check_finite(torch.stack([layer[-1] for layer in steps]), self.layers, request.key)
                raise non_finite_logits(request.key) from e
        tokens = out.sequences[0, len(request.prompt_ids) :].tolist()
        logprobs = [
            float(step[0].float().log_softmax(-1)[token]) for step, token in zip(out.logits, tokens, strict=True)
        ]
        return self._reply(request, tokens, logprobs, steps)

    def _reply(self, request: Request, tokens: list[int], logprobs: list[float], steps: list[list[Tensor]]) -> Reply:
        start = content_start(self.chat, request.prompt_ids, tokens)
        stopped = tokens[-1] in self.chat.stop_ids
        # Step 0 read the prompt's last token; step i > 0 read reply token i - 1. The last was never read.
        counted = range(start + 1, len(tokens))
        activation = None
        if len(counted) > 0:
            with torch.inference_mode(False):  # a tensor like any other: the caller may change it
                activation = torch.stack([torch.stack([layer[i] for i in counted]).mean(0) for layer in steps])
            check_finite(activation, self.layers, request.key)
        if not np.isfinite(logprobs).all():
            raise non_finite_logits(request.key)
        return Reply(
            key=request.key,
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            finish_reason="stop" if stopped else "length",
            n_counted=len(counted),
            content_start=start,
            activation=activation,
        )


def content_start(chat: ChatModel, prompt_ids: tuple[int, ...], tokens: list[int]) -> int:
    """Index of the first reply token after a thinking block; ``len(tokens)`` when the block never closes."""
    if not chat.opens_thinking(prompt_ids) and tokens[:1] != [chat.think_start_id]:
        return 0
    return tokens.index(chat.think_end_id) + 1 if chat.think_end_id in tokens else len(tokens)


def plain_generate(chat: ChatModel, ids: Tensor, sampling: Sampling) -> Any:
    """``model.generate`` on one prompt ``[1, n]``, doing what the decoding loop does, with its logits.

    ``generate`` fills what a given configuration leaves open from the model's own (a repetition penalty, say),
    so the model's own is a blank one meanwhile.
    """
    own = chat.model.generation_config
    chat.model.generation_config = GenerationConfig()
    try:
        return chat.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_generation_config(chat, sampling),
        )
    finally:
        chat.model.generation_config = own


def _generation_config(chat: ChatModel, sampling: Sampling) -> GenerationConfig:
    greedy = sampling.temperature == 0
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=not greedy,
        temperature=None if greedy else sampling.temperature,
        top_p=None if greedy else sampling.top_p,
        top_k=None if greedy else 0,
        eos_token_id=sorted(chat.stop_ids) or None,
        pad_token_id=min(chat.stop_ids, default=0),
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
    )
