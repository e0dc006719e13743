"""Proof at load that the decoding loop computes what the model's own ``generate`` does.

Eight greedy tokens for five prompts of different lengths, with so little room that sequences share a batch, wait
and are refilled. Models small enough are checked in float32, where the tokens must be equal; larger ones in their own
dtype, where a difference is excused only at a near tie between the two tokens. What the loop cannot prove, it does
not do: the engine is then ``model.generate``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from persona_axis.errors import NonFiniteError
from persona_axis.model.decode import DecodingLoop
from persona_axis.model.engine import Engine, Request, Sampling
from persona_axis.model.fallback import GenerateEngine, plain_generate
from persona_axis.model.layers import check_layers, decoder_layers, main_device, text_config
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import Passage, score_passages

CHECK_TOKENS = 8
FLOAT32_COPY_PARAMETERS = 1_500_000_000  # up to here a float32 copy is affordable
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_QUESTIONS = (
    "Hi.",
    "What is rain?",
    "Name three colours and say why you chose them.",
    "Why?",
    "Tell me a story.",
)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engine to use and, when it is the fallback, why."""

    engine: Engine
    reason: str = ""


def choose_engine(chat: ChatModel, layers: tuple[int, ...] | None, batch_tokens: int) -> EngineChoice:
    """The decoding loop if it proves itself on this model, else ``model.generate`` with the reason."""
    captured = check_layers(layers, chat.n_layers)
    reason = loop_objection(chat)
    if reason:
        return EngineChoice(GenerateEngine(chat, captured), reason)
    chat.loop_proven = True
    return EngineChoice(DecodingLoop(chat, captured, batch_tokens))


def loop_objection(chat: ChatModel) -> str:
    """Why the loop must not be used for this model; "" when it agrees with ``generate``."""
    types = set(getattr(text_config(chat.model), "layer_types", None) or []) - SUPPORTED_LAYER_TYPES
    if types:
        return f"its blocks keep state the loop does not manage ({', '.join(sorted(types))})"
    subject, tie = _subject(chat)
    requests = [
        Request(f"check-{i}", subject.template.prompt_ids(subject.template.messages("", question)))
        for i, question in enumerate(_QUESTIONS)
    ]
    greedy = Sampling(max_tokens=CHECK_TOKENS, temperature=0)
    longest = max(len(r.prompt_ids) for r in requests) + CHECK_TOKENS
    try:
        loop = DecodingLoop(subject, (0,), batch_tokens=2 * longest)  # two at a time: waits and refills
        replies = {r.key: r for r in loop.generate(requests, greedy)}
    except NonFiniteError:
        return ""  # damaged weights, whatever runs them: generating says in which layer and rollout
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as e:
        # Whatever a foreign forward raises on our cache or mask: reported to the user as the fallback's reason.
        return f"its forward does not accept the loop's cache or mask ({type(e).__name__}: {e})"
    for request in requests:
        tokens, logits = _reference(subject, request, greedy)
        ours = replies[request.key]
        if not _agrees(ours.token_ids.tolist(), tokens, logits, tie):
            return f"its tokens differ from generate's on {request.key}"
        if request in (requests[0], requests[-1]) and not _scoring_agrees(subject, request, tokens, logits, tie):
            return "its log-probabilities differ from generate's"
    return ""


def _subject(chat: ChatModel) -> tuple[ChatModel, float]:
    """What is checked (a float32 copy when affordable) and the logit gap that counts as a tie."""
    parameters = sum(p.numel() for p in chat.model.parameters())
    if chat.model.dtype == torch.float32:
        return chat, 1e-3
    if parameters > FLOAT32_COPY_PARAMETERS or getattr(chat.model, "hf_quantizer", None) is not None:
        return chat, 0.5
    model = copy.deepcopy(chat.model).float()
    path = next(name for name, module in chat.model.named_modules() if module is chat.blocks)
    return replace(chat, model=model, blocks=decoder_layers(model, path)), 1e-3


def _reference(chat: ChatModel, request: Request, sampling: Sampling) -> tuple[list[int], Tensor]:
    """``generate``'s own tokens and its logits ``[n, vocabulary]`` float32."""
    ids = torch.tensor([request.prompt_ids], device=main_device(chat.model))
    with torch.inference_mode():
        out = plain_generate(chat, ids, sampling)
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).float().cpu()


def _agrees(ours: list[int], theirs: list[int], logits: Tensor, tie: float) -> bool:
    """Equal up to the first position where their two choices are within ``tie`` of each other."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return bool((logits[i, b] - logits[i, a]).abs() < tie)
    return len(ours) == len(theirs)


def _scoring_agrees(chat: ChatModel, request: Request, tokens: list[int], logits: Tensor, tie: float) -> bool:
    """Both ways of scoring, with and without a shared prefix."""
    start = len(request.prompt_ids)
    passages = [
        Passage(name, (*request.prompt_ids, *tokens), ((start, start + len(tokens)),), shared)
        for name, shared in (("whole", 0), ("after a prefix", start - 1))
    ]
    proven = replace(chat, loop_proven=True)
    scored = [values for p in passages for _, [values] in score_passages(proven, [p])]
    expected = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    return all(bool((torch.from_numpy(s) - expected).abs().max() < max(tie, 1e-3)) for s in scored)
