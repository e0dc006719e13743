"""What went wrong with the Hub, in one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from persona_axis.errors import PersonaAxisError, StorageError, UsageError

LOG_IN = "set HF_TOKEN, or run: hf auth login"
AGAIN = "run the same command again"


@contextmanager
def hub_faults(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into errors of this package; a bug passes unchanged."""
    try:
        yield
    except PersonaAxisError:
        raise
    except Exception as error:
        said = next(filter(None, (_explain(link, repo_id, revision) for link in _chain(error))), None)
        if said is None:
            raise
        raise said from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and its causes: the client wraps what the server said."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _explain(error: BaseException, repo_id: str, revision: str | None) -> PersonaAxisError | None:
    place = f"{constants.ENDPOINT}/{repo_id}"
    match error:
        case HFValidationError():
            return UsageError(f"{repo_id!r} is not a repository: write OWNER/NAME.")
        case OfflineModeIsEnabled():
            return UsageError(f"HF_HUB_OFFLINE forbids to ask the Hub. Unset it and {AGAIN}.")
        case GatedRepoError():
            return UsageError(f"{repo_id} is gated. Ask for access at {place}, then {LOG_IN}.")
        case DisabledRepoError():
            return UsageError(f"{repo_id} was disabled on the Hub. Name another repository.")
        case RevisionNotFoundError():
            return UsageError(f"{repo_id} has no revision {revision!r}. Those it has are listed at {place}/tree/main")
        case RepositoryNotFoundError():
            return UsageError(
                f"{repo_id} is not on {constants.ENDPOINT}, or not for this token to see. Check the name; for a "
                f"private repository {LOG_IN}."
            )
        case RemoteEntryNotFoundError():
            return StorageError(f"{repo_id} lacks a file that it lists ({_first_line(error)}). Report it to its owner.")
        case HfHubHTTPError():
            return _explain_status(error, repo_id)
        case HTTPError() | ConnectionError() | TimeoutError():
            return StorageError(
                f"Cannot reach {constants.ENDPOINT} ({_first_line(error)}). Check the network and HF_ENDPOINT, and "
                f"{AGAIN}."
            )
        case FileMetadataError() | JSONDecodeError():
            return StorageError(
                f"{constants.ENDPOINT} does not answer like the Hub ({_first_line(error)}). Check HF_ENDPOINT."
            )
        case EntryNotFoundError() if error.__cause__ is None:  # the client found no way to the server
            return StorageError(f"Cannot reach {constants.ENDPOINT}. Check the network and HF_ENDPOINT, and {AGAIN}.")
    if type(error) is OSError and error.errno is None:  # the client's check of sizes
        return StorageError(f"The transfer broke off ({_first_line(error)}). Nothing half is kept; {AGAIN}.")
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> PersonaAxisError:
    status = int(error.response.status_code)
    said = f" ({error.server_message})" if error.server_message else ""
    if status == 401:
        return UsageError(f"The Hub refuses the token{said}: {LOG_IN}.")
    if status == 403:
        return UsageError(
            f"The token in use may not do this to {repo_id}{said}. Use one that may write there: {LOG_IN}."
        )
    if status in (409, 412):
        return StorageError(f"{repo_id} changed at the same time{said}; {AGAIN}.")
    if status == 429:
        return StorageError(f"The Hub asks to slow down{said}. Wait some minutes and {AGAIN}.")
    if status >= 500:
        return StorageError(f"The Hub is in trouble (HTTP {status}){said}. Wait some minutes and {AGAIN}.")
    return StorageError(f"The Hub refuses (HTTP {status}){said}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
