"""Figures measured so far, on disk as soon as they are made: a calibration that is killed measures nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persona_axis.files.journal import Journal
from persona_axis.study.measures import NeutralFigure, ReplyFigure

PLAIN = "plain"  # stands for a policy's content hash


class Ledger:
    """What every policy was measured to do, by the content of the policy and the key of the prompt or reply."""

    def __init__(self, path: Path, config_hash: str) -> None:
        """
        Args:
            path: the journal.
            config_hash: over everything beside the policy that decides a figure.
        """
        self.journal = Journal(path, config_hash)
        self.replies: dict[str, dict[str, ReplyFigure]] = {}
        self.neutral: dict[str, dict[str, NeutralFigure]] = {}
        for record, _ in self.journal.read():
            self._take(record["policy"], record["replies"], record["neutral"])

    def _take(self, policy: str, replies: list[dict[str, Any]], neutral: list[dict[str, Any]]) -> None:
        self.replies.setdefault(policy, {}).update({r["key"]: ReplyFigure.from_dict(r) for r in replies})
        self.neutral.setdefault(policy, {}).update({n["key"]: NeutralFigure(**n) for n in neutral})

    def add(self, policy: str, replies: Sequence[ReplyFigure] = (), neutral: Sequence[NeutralFigure] = ()) -> None:
        """Raises StorageError when the disk refuses; what was added before stays."""
        record: dict[str, Any] = {
            "policy": policy,
            "replies": [r.to_dict() for r in replies],
            "neutral": [asdict(n) for n in neutral],
        }
        self.journal.append(record, {})
        self._take(policy, record["replies"], record["neutral"])

    def missing_replies(self, policy: str, keys: Sequence[str]) -> list[str]:
        known = self.replies.get(policy, {})
        return [key for key in keys if key not in known]

    def missing_neutral(self, policy: str, keys: Sequence[str]) -> list[str]:
        known = self.neutral.get(policy, {})
        return [key for key in keys if key not in known]

    def close(self) -> None:
        self.journal.close()
