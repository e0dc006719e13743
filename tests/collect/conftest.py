"""Fixtures for the tests of collect."""

from __future__ import annotations

import pytest

from persona_axis.collect import plan as plan_module


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> int:
    """Eight rollouts per shard, so that a small plan has several."""
    monkeypatch.setattr(plan_module, "SHARD_ROWS", 8)
    return 8
