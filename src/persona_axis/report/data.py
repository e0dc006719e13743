"""What a report is made of. The pipeline fills these; nothing in this package reads a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from persona_axis.geometry.fit import Fit, Interval

NumberName = Literal["evidence", "score"]


@dataclass(frozen=True, slots=True)
class SampleRollout:
    """One rollout worth reading: a persona's strongest, median or weakest."""

    persona: str
    prompt: str  # system prompt, "" when there was none
    question: str
    reply: str
    number: float | None  # None: the judge failed or does not judge this persona
    number_name: NumberName
    kept: bool
    finish_reason: str  # "stop", "length", ...


@dataclass(frozen=True, slots=True)
class EvidenceGroup:
    """Every judged rollout of one persona group."""

    name: str
    values: list[float]
    kept: int
    total: int  # judged and failed rollouts together


@dataclass(frozen=True, slots=True)
class EvidenceSummary:
    """The judge's numbers, group by group, and the bar a rollout had to clear."""

    number_name: NumberName
    groups: list[EvidenceGroup]
    threshold: float | None = None  # kept = above this for evidence, at least this for a score
    threshold_note: str = ""  # where the bar comes from, one short phrase


@dataclass(frozen=True, slots=True)
class HeldRow:
    """One role prompt answered three ways by the same model."""

    persona: str
    question: str
    plain: str
    steered: str
    capped: str


@dataclass(frozen=True, slots=True)
class HeldDemo:
    """What activation capping did to the model's replies."""

    description: str  # which policy, which layers, which bound
    rows: list[HeldRow]
    mean_evidence: dict[str, Interval]  # keys "plain", "steered", "capped"
    perplexity_ratio: float | None = None  # capped over plain, on neutral text


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the report shows.

    ``summary`` is the content of ``summary.json``. Per-layer lists (``cos_axis_pc1``,
    ``cos_axis_pc1_unfiltered``, ``reliability``, ``components_70``) hold one number per captured layer, in
    the fit's order; ``roles_low`` and ``roles_high`` hold role names, the most extreme first. A key that is
    absent or None is shown as missing, never guessed.
    """

    title: str
    summary: dict[str, Any]
    fit: Fit
    samples: list[SampleRollout]
    evidence: EvidenceSummary | None = None
    held: HeldDemo | None = None
