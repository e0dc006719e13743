"""How far a judge agrees with replies that people have scored: what its numbers are worth, with error bars.

Two questions, kept apart: does the judge's number (evidence, or a 0-3 score) rank the replies as people do
(area under the ROC curve, at both cuts of the scale), and does the filter built on it keep the replies it
should (Cohen's kappa against label >= 2)? Failed verdicts are counted and left out, never given a value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona_axis.collect.verdicts import Exchange, Verdict
from persona_axis.errors import UsageError
from persona_axis.geometry.fit import Interval

DRAWS = 1_000  # bootstrap draws of replies, with replacement
LABELS = (0, 1, 2, 3)

Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True, slots=True)
class LabelledReply:
    """A reply with the score people gave it."""

    key: str  # "label-<line of the file>", the key of its verdict
    role: str
    system_prompt: str
    question: str
    response: str
    score: int  # 0..3
    why: str = ""

    def exchange(self, rubric: str = "") -> Exchange:
        """As a judge sees it, with the rubric of its role; a likelihood judge adds the token ids."""
        return Exchange(self.key, self.role, rubric, self.system_prompt, self.question, self.response)


@dataclass(frozen=True, slots=True)
class JudgeCheck:
    """A judge against labels. ``None`` where it is undefined: only one side of the cut among the labels."""

    n: int  # labelled replies
    failed: int  # of them, without a verdict
    auc_fully: Interval | None  # ranks label 3 above the rest; 0.5 is chance
    auc_some: Interval | None  # ranks labels 2 and 3 above 0 and 1
    kappa: Interval | None  # passed against label >= 2; 0 is chance
    columns: tuple[str, ...]  # of the confusion: "dropped", "passed", or the judge's scores
    confusion: tuple[tuple[int, ...], ...]  # [4 labels, columns], counts of replies

    def to_dict(self) -> dict[str, Any]:
        """For JSON: intervals as ``{value, low, high}``."""
        return asdict(self)

    def render(self) -> str:
        """The table for a terminal."""
        lines = [
            f"{self.n} labelled replies, {self.failed} without a verdict (left out)",
            "",
            f"ranks 3 above the rest     AUC    {_shown(self.auc_fully)}",
            f"ranks 2, 3 above 0, 1      AUC    {_shown(self.auc_some)}",
            f"passed against 2, 3        kappa  {_shown(self.kappa)}",
            "",
            "label  " + "".join(f"{name:>9}" for name in self.columns),
        ]
        for label, counts in zip(LABELS, self.confusion, strict=True):
            lines.append(f"{label:>5}  " + "".join(f"{count:>9}" for count in counts))
        return "\n".join(lines)


def read_labels(path: Path) -> list[LabelledReply]:
    """Labelled replies from JSONL: ``role, system_prompt, question, response, score`` and optionally ``why``.

    Other fields are ignored, empty lines skipped. ``UsageError`` names the line and the field that is wrong.
    """
    try:
        with path.open(encoding="utf-8") as file:
            labels = [_label(path, number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not labels:
        raise UsageError(f"{path} holds no labelled replies")
    return labels


def check_judge(
    labels: Sequence[LabelledReply],
    verdicts: Sequence[Verdict],
    *,
    passed: Callable[[Verdict], bool],
    seed: int,
) -> JudgeCheck:
    """Compare verdicts (any order, one per label) with the labels.

    ``passed`` is the caller's filter and is asked about ``ok`` verdicts only. Intervals are the 2.5th and
    97.5th percentile of 1,000 draws of replies; a draw with one side of the cut missing is drawn again.
    ``ValueError`` when verdicts and labels do not belong together, or evidence and scores are mixed.
    """
    verdict_of = _by_key(labels, verdicts)
    judged = [(label, verdict_of[label.key]) for label in labels]
    judged = [(label, verdict) for label, verdict in judged if verdict.status == "ok"]
    numbers = np.array([_number(verdict) for _, verdict in judged], dtype=float)  # [judged]
    scores = np.array([label.score for label, _ in judged], dtype=int)  # [judged]
    kept = np.array([passed(verdict) for _, verdict in judged], dtype=bool)  # [judged]
    columns, column = _columns([verdict for _, verdict in judged], kept)
    confusion = np.zeros((len(LABELS), len(columns)), dtype=int)
    np.add.at(confusion, (scores, column), 1)
    return JudgeCheck(
        n=len(labels),
        failed=len(labels) - len(judged),
        auc_fully=_interval(scores == 3, numbers, _auc, seed),
        auc_some=_interval(scores >= 2, numbers, _auc, seed),
        kappa=_interval(scores >= 2, kept, _kappa, seed),
        columns=columns,
        confusion=tuple(tuple(map(int, row)) for row in confusion),
    )


def _label(path: Path, number: int, line: str) -> LabelledReply:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UsageError(f"{where}: not an object with named fields")
    texts = {name: _text(where, row, name) for name in ("role", "system_prompt", "question", "response")}
    score = row.get("score")
    if type(score) is not int or score not in LABELS:  # True is an int, and 2.0 equals 2
        raise UsageError(f"{where}: score must be 0, 1, 2 or 3, not {score!r}")
    return LabelledReply(f"label-{number}", score=score, why=_text(where, {"why": "", **row}, "why"), **texts)


def _text(where: str, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UsageError(f"{where}: {name} must be text" + (f", not {value!r}" if name in row else "; it is missing"))
    if name in ("role", "question") and not value.strip():
        raise UsageError(f"{where}: {name} is empty")
    return value


def _by_key(labels: Sequence[LabelledReply], verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    verdict_of = {verdict.key: verdict for verdict in verdicts}
    if len(verdict_of) != len(verdicts) or len({label.key for label in labels}) != len(labels):
        raise ValueError("a key occurs twice")
    if unpaired := verdict_of.keys() ^ {label.key for label in labels}:
        raise ValueError(f"labels and verdicts differ in {len(unpaired)} keys, such as {min(unpaired)!r}")
    return verdict_of


def _number(verdict: Verdict) -> float:
    number = verdict.evidence if verdict.evidence is not None else verdict.score
    if number is None:
        raise ValueError(f"verdict {verdict.key!r} is ok and holds neither evidence nor a score")
    return number


def _columns(verdicts: Sequence[Verdict], kept: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The columns of the confusion, and each verdict's column."""
    kinds = {verdict.evidence is None for verdict in verdicts}
    if len(kinds) > 1:
        raise ValueError("some verdicts hold evidence and some only a score: they are from different judges")
    if kinds == {True}:
        return tuple(map(str, LABELS)), np.array([verdict.score for verdict in verdicts], dtype=int)
    return ("dropped", "passed"), kept.astype(int)


def _interval(above: np.ndarray, judged: np.ndarray, statistic: Statistic, seed: int) -> Interval | None:
    """``statistic(above, judged)`` with its bootstrap interval; None when ``above`` has one class only."""
    if not len(above) or above.all() or not above.any():
        return None
    random = np.random.default_rng(seed)
    draws = [statistic(above[draw], judged[draw]) for draw in (_draw(above, random) for _ in range(DRAWS))]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(statistic(above, judged), float(low), float(high))


def _draw(above: np.ndarray, random: np.random.Generator) -> np.ndarray:
    while True:
        draw = random.integers(len(above), size=len(above))
        if above[draw].any() and not above[draw].all():
            return draw


def _auc(above: np.ndarray, numbers: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(above, numbers))


def _kappa(above: np.ndarray, kept: np.ndarray) -> float:
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(above, kept))


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return "undefined: the labels lie on one side"
    return f"{interval.value:.2f}  [{interval.low:.2f}, {interval.high:.2f}]"
