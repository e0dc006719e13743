"""What a judge is asked and what it answers; the same for every judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Exchange:
    """One finished rollout as a judge sees it."""

    key: str
    persona: str  # role name, or "default"
    rubric: str  # role-specific 0-3 rubric text; "" for the default persona
    system_prompt: str  # "" when there was no system message
    question: str
    reply: str  # decoded text, no template tokens
    # What the likelihood judge needs; an LLM judge ignores the rest.
    reply_ids: tuple[int, ...] = ()  # content tokens only, as generated (no end-of-turn token)
    logprob: float | None = None  # mean log p of those under the prompt they came from, nats per token


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's answer for one rollout. A failure is a failure: it holds no score and no evidence."""

    key: str
    status: Literal["ok", "failed"]
    score: int | None = None  # 0..3, LLM judges
    evidence: float | None = None  # nats per token, the likelihood judge
    detail: str = ""  # the judge's own words, or why it failed


class Judge(Protocol):
    """Anything that turns exchanges into verdicts, in any order, one verdict per exchange."""

    name: str  # stable id, recorded with every verdict ("likelihood", "openai/gpt-4.1-mini")
    kind: Literal["evidence", "score"]

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[Verdict]: ...
