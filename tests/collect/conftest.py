"""Fixtures for the tests of collect."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from persona_axis.collect import plan as plan_module


@pytest.fixture(scope="module")
def small_shards() -> Iterator[int]:
    """Eight rollouts per shard in this module, so that a small plan has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHARD_ROWS", 8)
        yield 8
