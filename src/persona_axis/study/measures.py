"""What a held model says and how well it still predicts: the measurements behind a calibration.

Replies under role prompts are scored by the *plain* model whatever wrote them: pressure says how much a reply looks
like the role, not how surprised the held model was. The price is read off stored neutral replies, teacher-forced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_axis.collect.likelihood import LikelihoodJudge, reply_passage, with_logprobs
from persona_axis.collect.plan import PlanRow
from persona_axis.collect.rollouts import content_ids, shard_requests
from persona_axis.collect.verdicts import Exchange
from persona_axis.model.comparing import compare_states
from persona_axis.model.engine import Engine, Sampling
from persona_axis.model.head import Head
from persona_axis.model.loading import ChatModel
from persona_axis.model.reading import Passage, predicting_states
from persona_axis.steering.calibration import Fluency, fluency
from persona_axis.steering.hooks import held
from persona_axis.steering.policy import Policy

# Replies under role prompts, with their log-probability under that prompt -> pressure by key. A reply whose pressure
# cannot be told is left out.
Pressure = Callable[[Sequence[Exchange]], dict[str, float]]

PROMPT_BYTES = 1 << 30  # every candidate's replies are read after the same prompts, of which there are hundreds


@dataclass(frozen=True)
class ReplyFigure:
    """One reply under a role prompt, as the plain model sees it."""

    key: str
    ids: tuple[int, ...]  # content tokens
    pressure: float | None  # None for an empty reply
    neutral_logprob: float  # summed, under the neutral prompt, nats

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "ids": list(self.ids), "pressure": self.pressure, "neutral": self.neutral_logprob}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> ReplyFigure:
        return cls(d["key"], tuple(d["ids"]), d["pressure"], d["neutral"])


@dataclass(frozen=True)
class NeutralFigure:
    """One stored neutral reply read by the held model: sums over its tokens, see :class:`steering.Teacher`."""

    key: str
    tokens: int
    plain: float
    held: float
    agree: float
    kl: float


class Measures:
    """Runs one model, plain and held."""

    def __init__(
        self,
        chat: ChatModel,
        engine: Engine,
        sampling: Sampling,
        neutral_prompts: Sequence[str],
        pressure: Pressure | None = None,
    ) -> None:
        """
        Args:
            chat: the plain model (no intervention entered).
            engine: generates with it.
            sampling: as in the run, so that replies are paired with its own by random stream.
            neutral_prompts: the default persona's.
            pressure: None is the likelihood judge's evidence, nats per token.
        """
        self.chat = chat
        self.engine = engine
        self.sampling = sampling
        self.judge = LikelihoodJudge(chat, neutral_prompts, PROMPT_BYTES)
        self.pressure = pressure
        self.head = Head(chat.model)
        self._states: dict[str, Tensor] = {}  # plain, by neutral passage

    def plain(self, exchanges: Sequence[Exchange], evidence: dict[str, float]) -> list[ReplyFigure]:
        """The run's own replies.

        Args:
            exchanges: with the log-probabilities recorded while they were generated.
            evidence: the likelihood judge's verdicts, where there are any: those replies are not read again.
        """
        return self._figures(exchanges, evidence)

    def neutral_fluency(self, exchanges: Sequence[Exchange], evidence: dict[str, float]) -> Fluency:
        """How the run's own neutral replies read, each under the next neutral prompt; arguments as for :meth:`plain`.

        Not under its own: replies under role prompts are read without theirs as well.
        """
        said = [e for e in exchanges if e.reply_ids]
        neutral = self._neutral_logprobs(said, evidence)
        return fluency([e.reply_ids for e in said], [neutral[e.key] * len(e.reply_ids) for e in said])

    def _neutral_logprobs(self, said: Sequence[Exchange], evidence: dict[str, float]) -> dict[str, float]:
        """Mean log-probability under the neutral prompt; read only where evidence does not give it away."""
        known = {e.key: e.logprob - evidence[e.key] for e in said if e.key in evidence and e.logprob is not None}
        return known | dict(self.judge.without_role([e for e in said if e.key not in known]))

    def replies(self, policy: Policy, rows: Sequence[PlanRow]) -> list[ReplyFigure]:
        """Answer ``rows`` (role prompts of the plan) held by ``policy``."""
        return self._figures(self.answers(policy, rows), {})

    def answers(self, policy: Policy, rows: Sequence[PlanRow]) -> list[Exchange]:
        """The rows' replies held by ``policy``, with their log-probability under the plain model."""
        by_key = {row.key: row for row in rows}
        with held(self.chat, policy):
            replies = list(self.engine.generate(shard_requests(self.chat, list(rows)), self.sampling))
        exchanges = []
        for reply in replies:
            row = by_key[reply.key]
            ids = content_ids(reply.token_ids, reply.content_start, reply.finish_reason).tolist()
            exchanges.append(
                Exchange(
                    key=row.key,
                    persona=row.persona,
                    rubric=row.rubric,
                    system_prompt=row.system_prompt,
                    question=row.question,
                    reply=self.chat.decode(ids),
                    reply_ids=tuple(ids),
                )
            )
        empty = [e for e in exchanges if not e.reply_ids]
        return [*empty, *with_logprobs(self.chat, [e for e in exchanges if e.reply_ids], self.judge.slots)]

    def _figures(self, exchanges: Sequence[Exchange], evidence: dict[str, float]) -> list[ReplyFigure]:
        said = [e for e in exchanges if e.reply_ids]
        neutral = self._neutral_logprobs(said, evidence)
        if self.pressure is None:
            pressure = {e.key: e.logprob - neutral[e.key] for e in said if e.logprob is not None}
        else:
            pressure = {key: float(value) for key, value in self.pressure(said).items()}
        return [
            ReplyFigure(e.key, e.reply_ids, pressure.get(e.key), neutral.get(e.key, 0.0) * len(e.reply_ids))
            for e in exchanges
        ]

    def neutral(self, policy: Policy, passages: Sequence[Passage]) -> list[NeutralFigure]:
        """Read stored neutral replies held by ``policy``."""
        missing = [p for p in passages if p.key not in self._states]
        self._states |= {key: states.cpu() for key, states in predicting_states(self.chat, missing)}
        figures = []
        with held(self.chat, policy):
            states = {key: found.cpu() for key, found in predicting_states(self.chat, passages)}
        keys = [p.key for p in passages]
        sizes = [sum(b - a for a, b in p.spans) for p in passages]
        device = self.head.module.weight.device
        plain, other = (torch.cat([side[key] for key in keys]).to(device) for side in (self._states, states))
        targets = torch.tensor([t for p in passages for a, b in p.spans for t in p.token_ids[a:b]])
        compared = compare_states(self.head, plain, other, targets)
        columns = (compared.plain, compared.other, compared.agree, compared.kl)
        for key, size, *parts in zip(keys, sizes, *(c.double().split(sizes) for c in columns), strict=True):
            figures.append(NeutralFigure(key, size, *(float(part.sum()) for part in parts)))
        return figures


def neutral_passages(chat: ChatModel, exchanges: Iterable[Exchange]) -> list[Passage]:
    """Neutral replies of a run as passages to be read."""
    return [
        reply_passage(e.key, chat.template.prompt_ids(chat.template.messages(e.system_prompt, e.question)), e.reply_ids)
        for e in exchanges
        if e.reply_ids
    ]
