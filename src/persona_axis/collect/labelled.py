"""Running the judges on labelled replies for ``judge-check``."""

from __future__ import annotations

from pathlib import Path

from persona_axis.catalog.catalog import Catalog, load_catalog
from persona_axis.collect.judge_check import JudgeCheck, LabelledReply, check_judge, read_labels
from persona_axis.collect.likelihood import LikelihoodJudge, Null, with_logprobs
from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.rollouts import content_ids
from persona_axis.collect.verdicts import Exchange
from persona_axis.model.engine import Request, Sampling
from persona_axis.model.loading import ChatModel, load_model
from persona_axis.model.selfcheck import choose_engine

NULL_QUESTIONS = 20
NULL_TOKENS = 96  # about the length of the labelled replies


def check_likelihood(labels: Path, model: str, dtype: str, device: str, seed: int) -> JudgeCheck:
    """The likelihood judge on labelled replies, its bar from a null of freshly generated default replies."""
    replies = read_labels(labels)
    chat = load_model(model, dtype=dtype, device=device)
    prompts = load_catalog().default_prompts
    judge = LikelihoodJudge(chat, prompts)
    null = default_null(chat, judge, seed)
    exchanges = with_logprobs(chat, [reply.exchange() for reply in replies])
    verdicts = list(judge.judge(exchanges))
    return check_judge(
        replies, verdicts, passed=lambda v: v.evidence is not None and v.evidence > null.threshold, seed=seed
    )


def check_llm(labels: Path, judge_name: str, seed: int) -> JudgeCheck:
    """An LLM judge on labelled replies; passed = score 2 or 3."""
    from persona_axis.collect.llm_judge import LLMJudge
    from persona_axis.llm.client import LLMClient

    replies = read_labels(labels)
    catalog = load_catalog()
    exchanges = [reply.exchange(_rubric(catalog, reply)) for reply in replies]
    with LLMClient(judge_name) as client:
        verdicts = list(LLMJudge(client).judge(exchanges))
    return check_judge(replies, verdicts, passed=lambda v: v.score is not None and v.score >= 2, seed=seed)


def _rubric(catalog: Catalog, reply: LabelledReply) -> str:
    return catalog.role(reply.role).rubric if reply.role in catalog.role_names else ""


def default_null(chat: ChatModel, judge: LikelihoodJudge, seed: int) -> Null:
    """The null of the embedded catalog's default prompts and first questions."""
    catalog = load_catalog()
    asked = [(p, q.text) for p in catalog.default_prompts for q in catalog.questions[:NULL_QUESTIONS]]
    requests = [
        Request(f"null/{i}", chat.template.prompt_ids(chat.template.messages(p, q))) for i, (p, q) in enumerate(asked)
    ]
    engine = choose_engine(chat, (0,), batch_tokens=32768).engine
    exchanges = []
    for reply in engine.generate(requests, Sampling(NULL_TOKENS, seed=seed)):
        prompt, question = asked[int(reply.key.split("/")[1])]
        ids = content_ids(reply.token_ids, reply.content_start, reply.finish_reason).tolist()
        exchanges.append(Exchange(reply.key, DEFAULT, "", prompt, question, chat.decode(ids), reply_ids=tuple(ids)))
    verdicts = judge.judge(with_logprobs(chat, exchanges))
    return Null.of([v.evidence for v in verdicts if v.evidence is not None])
