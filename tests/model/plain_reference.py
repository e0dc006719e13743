"""Plain Hugging Face code that the tests compare with: `generate` alone, one whole forward, hooks of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from persona_axis.model.engine import Reply, Request
from persona_axis.model.layers import text_decoder
from persona_axis.model.loading import ChatModel

SYSTEM = "You are a bard in a tavern."
# From shorter than a window to several times as long.
QUESTIONS = (
    "Hi",
    "What is rain?",
    "Tell me about the weather in the mountains, the rivers and the sea, and then say why.",
    "Why?",
    "Name three colours.",
    "A b c d e f g.",
    "Say something nice to the other guests.",
)


def requests_for(
    chat: ChatModel, questions: Sequence[str] = QUESTIONS, system: str = SYSTEM, shared: bool = False
) -> list[Request]:
    """A request per question; with ``shared``, the tokens all prompts begin with are declared as such."""
    prompts = [chat.template.prompt_ids(chat.template.messages(system, q)) for q in questions]
    common = 0
    if shared:
        while all(len(p) > common and p[common] == prompts[0][common] for p in prompts):
            common += 1
    return [Request(f"q{i}", prompt, common) for i, prompt in enumerate(prompts)]


def longest_prompt(requests: Iterable[Request]) -> int:
    return max(len(r.prompt_ids) for r in requests)


@torch.inference_mode()
def generate_greedily(chat: ChatModel, request: Request, max_tokens: int) -> list[int]:
    """`model.generate` on one prompt, alone, with the model's own stop tokens."""
    ids = torch.tensor([request.prompt_ids])
    out = chat.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def block_outputs(chat: ChatModel, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One forward without cache: every block's output ``[n_layers, n, d_model]`` and the logits ``[n, vocabulary]``."""
    outputs: list[Tensor] = []

    def keep(block: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden[0].float().clone())

    handles = [block.register_forward_hook(keep) for block in chat.blocks]
    try:
        logits = chat.model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(outputs), logits


def expected_activation(chat: ChatModel, request: Request, reply: Reply) -> Tensor:
    """Mean block outputs of a reply without thinking: all its tokens but the last (a stop token, or never read)."""
    tokens = [*request.prompt_ids, *reply.token_ids.tolist()]
    hidden, _ = block_outputs(chat, tokens)
    return hidden[:, len(request.prompt_ids) : -1].mean(1)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest over layers of ``|ours - theirs| / |theirs|``."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def by_key(replies: Iterable[Reply]) -> dict[str, Reply]:
    found: dict[str, Reply] = {}
    for reply in replies:
        assert reply.key not in found, f"{reply.key} was answered twice"
        found[reply.key] = reply
    return found


def tokens_of(replies: Iterable[Reply]) -> dict[str, list[int]]:
    return {key: reply.token_ids.tolist() for key, reply in by_key(replies).items()}


def state_of(chat: ChatModel) -> tuple[Any, ...]:
    """What a run must leave as it was: the attention implementation and every module's hooks."""
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in chat.model.named_modules()]
    return (chat.model.config._attn_implementation, chat.model.training, hooks)


@contextmanager
def scripted(chat: ChatModel, following: dict[int, int]) -> Iterator[None]:
    """While entered, the model answers token ``a`` with token ``following[a]``; its residuals are its own."""

    ids: list[Any] = []

    def see(decoder: Any, args: Any, kwargs: Any) -> None:
        ids[:] = kwargs["input_ids"].tolist()

    def force(head: Any, args: Any, logits: Tensor) -> None:
        by_row = logits.view(len(ids), -1, logits.shape[-1])  # the last columns of the inputs
        for row, tokens in enumerate(ids):
            for column, token in enumerate(tokens[-by_row.shape[1] :]):
                if token in following:
                    by_row[row, column, following[token]] = 1e4

    handles = [
        text_decoder(chat.model).register_forward_pre_hook(see, with_kwargs=True),
        chat.model.get_output_embeddings().register_forward_hook(force),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
