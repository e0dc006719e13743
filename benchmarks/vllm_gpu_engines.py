"""What the engines of ``benchmarks/vllm_gpu.py`` do, each in a process of its own. Nothing is judged here.

Activations and the token ids they belong to go into a folder, a file per reply, where :func:`read_again` finds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.vllm_child import Start, distinct_prompts, engine, generate, parameters
from persona_axis.steering.artifact import load_policy
from persona_axis.steering.policy import Policy

TEXTS = 8  # prompts, each with a text that is scored
LONGEST = 2048
SCORED = 96  # tokens of a text
LIKELIEST = 5  # tokens whose log-probabilities are asked for at each step of a reply
LENGTH, UNTIL_EOS = 48, 1024  # tokens of a reply, at most
STOPS = [".", ",", " the", " and", "\n"]  # one of which nearly every reply says
BRIEFLY = " Reply with one short sentence."

Names = Sequence[str | None]  # of policies; None says nothing about one, as a client of plain vLLM


def devices() -> dict[str, Any]:
    """The GPUs, in words."""
    from persona_axis.serve.vllm.install import vllm_version

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": names, "cuda": torch.version.cuda, "vllm": vllm_version()}


def observe(
    start: Start, policies: Names, folder: str | None, captured: Names = (), replies: str = ""
) -> dict[str, Any]:
    """Log-probabilities of given texts and of greedy replies under each policy, alone and all in one batch.

    Args:
        start: of the engine.
        policies: what requests name, each for every text.
        folder: of the policies; None is an engine without the plugin.
        captured: what requests name whose replies are captured.
        replies: a folder for those.
    """
    with engine(start, LONGEST, held=folder is not None) as llm:
        [settings, *_] = llm.collective_rpc("benchmark_settings")
        found: dict[str, Any] = {**settings, **_compared(llm, start, policies)}
        if folder is None:
            return {**found, "refusal": _refusal(llm)}
        found["workers"] = llm.collective_rpc("persona_axis_state")
        if captured:
            found["replies"] = _captured(llm, start, captured, Path(folder), Path(replies))
            found["after_abort"] = _after_abort(llm, start, captured[-1])
    return found


def _refusal(llm: Any) -> str:
    """How our launchers refuse this engine; "" when they do not."""
    from persona_axis.errors import ModelError
    from persona_axis.serve.vllm.launch import verify

    try:
        verify(llm, {})
    except ModelError as e:
        return str(e)
    return ""


def _extra(policy: str | None, **more: int) -> dict[str, Any]:
    named = {} if policy is None else {"persona_axis_policy": policy}
    return {**named, **{f"persona_axis_{key}": value for key, value in more.items()}}


# ---- alone and in a batch ----------------------------------------------------------------------------------------


def _compared(llm: Any, start: Start, policies: Names) -> dict[str, Any]:
    """By path (given texts, greedy replies) and company (alone, batched): an entry per text and policy, texts first."""
    texts = scored_texts(start)
    prompts = distinct_prompts(start, TEXTS)
    jobs = [(i, policy) for i in range(TEXTS) for policy in policies]

    def score(chosen: Sequence[tuple[int, str | None]]) -> list[dict[str, Any]]:
        params = [parameters(1, _extra(policy), prompt_logprobs=0) for _, policy in chosen]
        answers = generate(llm, [texts[i] for i, _ in chosen], params)
        return [entry(texts[i][1:], a.prompt_logprobs[1:]) for a, (i, _) in zip(answers, chosen, strict=True)]

    def decode(chosen: Sequence[tuple[int, str | None]]) -> list[dict[str, Any]]:
        params = [parameters(LENGTH, _extra(policy), logprobs=LIKELIEST) for _, policy in chosen]
        replies = [a.outputs[0] for a in generate(llm, [prompts[i] for i, _ in chosen], params)]
        return [entry(reply.token_ids, reply.logprobs) for reply in replies]

    found: dict[str, Any] = {"policies": list(policies)}
    for name, path in (("given", score), ("greedy", decode)):
        found[name] = {"alone": [said for job in jobs for said in path([job])], "batched": path(jobs)}
    return found


def scored_texts(start: Start) -> list[list[int]]:
    """Prompts, each followed by some of the next one: whatever is given can be scored."""
    prompts = distinct_prompts(start, TEXTS + 1)
    return [prompt + following[:SCORED] for prompt, following in pairwise(prompts)]


def entry(ids: Sequence[int], steps: Sequence[Any]) -> dict[str, Any]:
    """Tokens, and at each the log-probabilities by id that vLLM gave."""
    found = [{str(token): one.logprob for token, one in step.items()} for step in steps]
    assert len(found) == len(ids)
    return {"ids": list(ids), "steps": found}


# ---- capture -----------------------------------------------------------------------------------------------------


def _captured(llm: Any, start: Start, policies: Names, folder: Path, replies: Path) -> list[dict[str, Any]]:
    """Replies that end by EOS, at their length and at a string, in one batch."""
    from transformers import AutoTokenizer

    prompts = distinct_prompts(start, TEXTS)
    short = _ended_briefly(start, AutoTokenizer.from_pretrained(start.source))
    endings = {
        "eos": (short, {"ignore_eos": False}, UNTIL_EOS),
        "length": (prompts, {}, LENGTH),
        "string": (prompts, {"stop": STOPS, "detokenize": True}, UNTIL_EOS),
    }
    jobs = [(e, p, name) for e, (given, _, _) in endings.items() for p in given for name in policies]
    params = [
        parameters(endings[e][2], _extra(name, capture=1, projections=int(name != "off")), **endings[e][1])
        for e, _, name in jobs
    ]
    answers = generate(llm, [prompt for _, prompt, _ in jobs], params)
    found = []
    for (ending, _, name), answer in zip(jobs, answers, strict=True):
        policy = None if name == "off" else load_policy(folder / str(name))
        found.append({"ending": ending, **_kept(answer, str(name), policy, replies)})
    return found


def _ended_briefly(start: Start, tokenizer: Any) -> list[list[int]]:
    """Prompts that most models answer in a sentence."""
    from persona_axis.model.chat import ChatTemplate

    template = ChatTemplate.of(tokenizer)
    things = ("rain", "a river", "bread", "the moon", "a bicycle", "salt", "a violin", "winter")
    return [list(template.prompt_ids(template.messages("", f"What is {thing}?{BRIEFLY}"))) for thing in things]


_numbers = count()


def _kept(answer: Any, name: str, policy: Policy | None, replies: Path) -> dict[str, Any]:
    """Write a reply's activation down; what is said of it."""
    from persona_axis.serve.vllm import report_of

    report, reply = report_of(answer), answer.outputs[0]
    prompt, ids = list(answer.prompt_token_ids), list(reply.token_ids)
    replies.mkdir(parents=True, exist_ok=True)
    if report.n_counted:
        activation = np.asarray(report.activation)
        content = {"ids": [*prompt, *ids], "start": len(prompt), "n_counted": report.n_counted, "policy": name}
        np.savez(replies / f"{next(_numbers)}.npz", activation=activation, **content)
    off_bounds = 0.0
    if policy is not None and report.n_counted:
        off_bounds = bounds_error(policy, np.asarray(report.activation), report.projections or {})
    return {
        "policy": name,
        "finish": reply.finish_reason,
        "stop": reply.stop_reason,
        "tokens": len(ids),
        "n_counted": report.n_counted,
        "bounds_error": off_bounds,
    }


def bounds_error(policy: Policy, activation: np.ndarray, projections: dict[int, np.ndarray]) -> float:
    """Projections are from before a layer's intervention, activations from after it: by how much the mean of what the
    formula makes of the ones differs from the projection of the other, as a share of the activation's norm."""
    worst = 0.0
    for part in policy.interventions:
        moved = np.clip(projections[part.layer], part.lo.numpy(), part.hi.numpy()) + part.shift.numpy()
        here = part.V.numpy() @ activation[part.layer]
        error = np.abs(moved.mean(0) - here).max() / np.linalg.norm(activation[part.layer])
        worst = max(worst, float(error))
    return worst


def read_again(model: str, dtype: str, folder: str, replies: str) -> list[float]:
    """Of each reply in a folder, the worst layer's relative error against Hugging Face for the same ids."""
    from persona_axis.model.loading import load_model

    chat = load_model(model, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    return [_error(chat, file, Path(folder)) for file in sorted(Path(replies).glob("*.npz"))]


def _error(chat: Any, file: Path, folder: Path) -> float:
    from persona_axis.model.reading import Passage, read_passages
    from persona_axis.steering.hooks import held

    kept = np.load(file)
    start, name = int(kept["start"]), str(kept["policy"])
    passage = Passage(file.stem, tuple(kept["ids"].tolist()), ((start, start + int(kept["n_counted"])),))
    with nullcontext() if name == "off" else held(chat, load_policy(folder / name)):
        [(_, means)] = read_passages(chat, [passage])
    return worst_layer(kept["activation"], means[0].numpy())


def worst_layer(got: np.ndarray, want: np.ndarray) -> float:
    """Of ``[layers, d_model]``: the largest relative error of a layer."""
    return float((np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max())


# ---- requests that end early, the cache, preemption --------------------------------------------------------------


def _after_abort(llm: Any, start: Start, policy: str | None) -> dict[str, int]:
    """What requests still hold of the plugin, after all were aborted in the middle and another, plain one has run."""
    from vllm.inputs import tokens_input

    names = [f"aborted-{i}" for i in range(TEXTS)]
    for name, prompt in zip(names, distinct_prompts(start, TEXTS), strict=True):
        llm.llm_engine.add_request(name, tokens_input(prompt), parameters(UNTIL_EOS, _extra(policy, capture=1)))
    for _ in range(8):
        llm.llm_engine.step()
    [during, *_] = llm.collective_rpc("benchmark_requests")
    llm.llm_engine.abort_request(names)
    generate(llm, distinct_prompts(start, 1), parameters(4, _extra("off")))
    [after, *_] = llm.collective_rpc("benchmark_requests")
    return {**after, "places_taken_before": during["places_taken"]}


def cached(start: Start, policies: Sequence[str], folder: str, replies: str) -> list[dict[str, Any]]:
    """One long prompt under each policy twice, one request at a time: how many of its tokens were in the cache."""
    prompt = [token for part in distinct_prompts(start, 8) for token in part][: LONGEST // 2]
    found = []
    with engine(start, LONGEST) as llm:
        for name in [name for name in policies for _ in range(2)]:
            [answer] = generate(llm, [prompt], parameters(LENGTH, _extra(name, capture=1)))
            kept = _kept(answer, name, None, Path(replies))
            found.append({**kept, "cached": int(answer.num_cached_tokens or 0)})
    return found


def preempted(start: Start, policies: Sequence[str], folder: str, replies: str) -> dict[str, Any]:
    """More captured requests than the cache holds."""
    prompts = distinct_prompts(start, start.sequences)
    names = [policies[i % len(policies)] for i in range(len(prompts))]
    params = [parameters(start.tokens, _extra(name, capture=1)) for name in names]
    with engine(start, LONGEST) as llm:
        answers = generate(llm, prompts, params)
        kept = [_kept(answer, name, None, Path(replies)) for answer, name in zip(answers, names, strict=True)]
        counters = Counter({m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")})
    return {"preemptions": int(counters["vllm:num_preemptions"]), "replies": kept}
