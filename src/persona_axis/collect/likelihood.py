"""The judge that needs no API: how much likelier the reply is under its role prompt than without any.

``evidence`` = mean over the reply's content tokens of ``log p(reply | role prompt) - log p(reply | no system
message)`` under the plain model, full softmax at temperature 1, nats per token. The first term was recorded while
generating. A reply of the default persona is compared between its own neutral prompt and the next: that is the null,
and a reply counts as expressing its role (``expressed``) when its evidence exceeds the null's 95th percentile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from persona_axis.collect.plan import DEFAULT
from persona_axis.collect.verdicts import Exchange, Verdict
from persona_axis.errors import JudgeError
from persona_axis.model.loading import ChatModel
from persona_axis.model.prefill import Prefiller
from persona_axis.model.reading import Passage, score_passages

NULL_PERCENTILE = 95
NULL_REPLIES = 20  # default replies, at least, for that percentile
PLAIN_PROMPT = "You are a helpful AI assistant."  # against no system message, when that is the only neutral prompt


@dataclass(frozen=True, slots=True)
class Null:
    """Evidence of default replies, one neutral prompt against another; nats per token."""

    n: int
    mean: float
    threshold: float  # the 95th percentile

    @classmethod
    def of(cls, evidence: Sequence[float]) -> Null:
        """Raises JudgeError when there is too little to take a percentile of."""
        if len(evidence) < NULL_REPLIES:
            raise JudgeError(
                f"Only {len(evidence)} default replies could be judged; the null needs at least {NULL_REPLIES}. "
                "Use more --questions or more default prompts."
            )
        values = np.asarray(evidence)
        return cls(len(values), float(values.mean()), float(np.percentile(values, NULL_PERCENTILE)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LikelihoodJudge:
    """Scores replies with the model that wrote them. Implements :class:`~persona_axis.collect.verdicts.Judge`."""

    name = "likelihood"
    kind: Literal["evidence", "score"] = "evidence"

    def __init__(self, chat: ChatModel, neutral_prompts: Sequence[str], prompt_bytes: int | None = None) -> None:
        """
        Args:
            chat: the plain model (no intervention entered).
            neutral_prompts: the default persona's prompts; a reply under one is compared with the next.
            prompt_bytes: of keys and values kept: every role is asked the same questions. None is as Prefiller has it.
        """
        self.chat = chat
        self.slots = Prefiller(chat, prompt_bytes)
        self.next_prompt = _cycle(neutral_prompts)

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]:
        """Shortest first. A reply without content tokens fails; it is not given a number."""
        own: dict[str, float] = {}
        judged = []
        for e in exchanges:
            if not e.reply_ids or e.logprob is None:
                yield Verdict(e.key, "failed", detail="the reply has no content tokens")
                continue
            own[e.key] = e.logprob
            judged.append(e)
        for key, logprob in self.without_role(judged):
            yield Verdict(key, "ok", evidence=own[key] - logprob)

    def without_role(self, exchanges: Sequence[Exchange]) -> Iterator[tuple[str, float]]:
        """(key, mean log p of the reply without a system message); a default reply's under the next neutral prompt.

        Replies must not be empty.
        """
        passages = [self._neutral(e) for e in exchanges]
        for key, [logprobs] in score_passages(self.chat, passages, slots=self.slots):
            yield key, float(logprobs.mean())

    def _neutral(self, e: Exchange) -> Passage:
        system = self.next_prompt.get(e.system_prompt, "") if e.persona == DEFAULT else ""
        prompt = self.chat.template.prompt_ids(self.chat.template.messages(system, e.question))
        return reply_passage(e.key, prompt, e.reply_ids)


def _cycle(prompts: Sequence[str]) -> dict[str, str]:
    """Each neutral prompt to the next, round about; a single one to none, or to a plain statement."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 2:
        return {p: "" if p else PLAIN_PROMPT for p in distinct}
    return dict(zip(distinct, [*distinct[1:], distinct[0]], strict=True))


def reply_passage(key: str, prompt: tuple[int, ...], reply: tuple[int, ...]) -> Passage:
    """A reply after a prompt that other replies follow too; the reply is what gets scored."""
    return Passage(key, (*prompt, *reply), ((len(prompt), len(prompt) + len(reply)),), shared=len(prompt) - 1)


def with_logprobs(chat: ChatModel, exchanges: Sequence[Exchange], slots: Prefiller | None = None) -> list[Exchange]:
    """Exchanges with the log-probability under their own prompt read anew; ids from the text where there are none.

    Prompts seen in ``slots`` before are not computed again.
    """
    passages, ids = [], {}
    for e in exchanges:
        prompt = chat.template.prompt_ids(chat.template.messages(e.system_prompt, e.question))
        reply = e.reply_ids or tuple(chat.tokenizer(e.reply, add_special_tokens=False)["input_ids"])
        if reply:
            ids[e.key] = reply
            passages.append(reply_passage(e.key, prompt, reply))
    logprob = {key: float(values.mean()) for key, [values] in score_passages(chat, passages, slots=slots)}
    return [replace(e, reply_ids=ids.get(e.key, ()), logprob=logprob.get(e.key)) for e in exchanges]
