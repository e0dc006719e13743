"""Sharing a folder's axis and policy: one commit that holds all of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from persona_axis.errors import UsageError
from persona_axis.hub.artifact import CARD, SHARED, Artifact, read_artifact
from persona_axis.hub.card import model_card, subject
from persona_axis.hub.client import check_name, client, lookup
from persona_axis.hub.faults import LOG_IN, hub_faults


@dataclass(frozen=True)
class PushPlan:
    """What a push would send."""

    artifact: Artifact
    card: str

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name in the repository, the card included."""
        return {**{file.name: file.size for file in self.artifact.files}, CARD: len(self.card.encode())}


@dataclass(frozen=True)
class PushResult:
    """What a push did."""

    repo_id: str
    commit: str
    url: str
    sizes: dict[str, int]  # bytes by name in the repository
    changed: bool  # False: the repository held all of it already, and no commit was made


def plan_push(path: str | Path, repo_id: str) -> PushPlan:
    """Read what would be sent; nothing is asked of the Hub.

    Raises:
        UsageError: neither an axis nor a policy in the folder, or no OWNER/NAME.
        StorageError: a damaged file.
    """
    check_name(repo_id)
    artifact = read_artifact(path)
    return PushPlan(artifact, model_card(artifact, repo_id))


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> PushResult:
    """Share a folder's axis and policy, with a card, as one commit.

    The repository's card and files of these names become those of the folder, so one that the folder does not have
    goes: no old policy stays beside a new axis. Other files of the repository stay.

    Args:
        path: a run folder, a pulled one, or the folder of a policy.
        repo_id: ``OWNER/NAME``; created when missing.
        private: create it private. A repository that exists and is public is refused.
        token: of the Hub; by default ``HF_TOKEN`` or what ``hf auth login`` stored.
        revision: a branch that exists; by default the main one.
        message: of the commit.

    Raises:
        UsageError: nothing to share, no token or one that may not, a public repository for ``private``.
        StorageError: a damaged file, no network, or the repository changed meanwhile.
    """
    plan = plan_push(path, repo_id)
    token = token or get_token()
    if token is None:
        raise UsageError(f"Pushing needs a token of the Hub that may write: {LOG_IN}.")
    api = client(token)
    with hub_faults(repo_id, revision):
        head = _head(api, repo_id, private, revision)
        there = [sibling.rfilename for sibling in (head.siblings or [])] if head else []
        gone = [name for name in SHARED if name in there and name not in plan.sizes]
        done = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(file.name, str(file.path)) for file in plan.artifact.files),
                CommitOperationAdd(CARD, plan.card.encode()),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=message or f"Share {subject(plan.artifact)}",
            revision=revision,
            parent_commit=head.sha if head else None,
        )
    return PushResult(repo_id, done.oid, done.commit_url, plan.sizes, head is None or done.oid != head.sha)


def _head(api: HfApi, repo_id: str, private: bool, revision: str | None) -> ModelInfo | None:
    """The repository as it is; None when it had to be made."""
    try:
        head = lookup(api, repo_id, revision)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        if revision not in (None, "main"):
            raise UsageError(
                f"{repo_id} does not exist yet, so it has no branch {revision!r}: push without a revision first."
            ) from None
        # None leaves it to the owner: an organisation's default may be private.
        api.create_repo(repo_id, private=private or None)
        return None
    if private and not head.private:
        raise UsageError(
            f"{repo_id} exists and is public. Make it private in its settings on the Hub, or name another repository."
        )
    return head
