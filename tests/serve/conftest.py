"""The plugin is configured by environment variables: each test starts without any, and leaves none behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("PERSONA_AXIS_")]:
            del os.environ[name]
        yield
