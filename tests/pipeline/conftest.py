"""Fixtures for the tests of the pipeline."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "collect"))

from run_fixtures import fake_judge, inputs, model_folder

__all__ = ["fake_judge", "inputs", "model_folder"]
