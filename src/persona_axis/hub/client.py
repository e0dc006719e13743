"""The Hub's client as this package uses it: HF_ENDPOINT and HF_TOKEN are honoured."""

from __future__ import annotations

import importlib.metadata
import re

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from persona_axis.errors import UsageError

TIMEOUT_SECONDS = 30.0  # of a look-up


def check_name(repo_id: str) -> None:
    """Raises UsageError for anything but ``OWNER/NAME``."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UsageError(f"{repo_id!r} is not a repository on the Hub: write OWNER/NAME.")


def client(token: str | None) -> HfApi:
    """With a token, or (None) with the one of the user, if any."""
    return HfApi(token=token, library_name="persona-axis", library_version=importlib.metadata.version("persona-axis"))


def lookup(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo:
    """A repository at a revision: its commit, and its files with sizes and checksums."""
    return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
