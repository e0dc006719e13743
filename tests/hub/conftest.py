"""Fixtures for the tests of hub."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "collect"))

from hub_fixtures import environment, hub, run_folder

__all__ = ["environment", "hub", "run_folder"]
