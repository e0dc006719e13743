"""Getting a shared axis and policy.

Contract:

1. Everything comes from one commit, looked up first: a repository that changes meanwhile cannot mix.
2. Only files of the known names are asked for. Each must have the checksum that the commit gives it, and axis and
   policy must load, before anything appears.
3. ``out`` appears whole, by one rename, or not at all. It must not exist or be empty; it may hold the same pull.
4. A pull that was killed leaves a hidden folder ``.<name>.<8 hex digits>.tmp`` beside ``out``, which the next one
   removes. A pull that runs holds a lock on its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import RepoSibling

from persona_axis.errors import PersonaAxisError, RunConflict, StorageError, UsageError
from persona_axis.files.atomic import (
    make_folder,
    read_json,
    replace_atomic,
    storage_errors,
    sync_folder,
    write_json,
)
from persona_axis.hub.artifact import AXIS, CARD, POLICY_FILES, SHARED, read_artifact
from persona_axis.hub.client import check_name, client, lookup
from persona_axis.hub.faults import hub_faults

FORMAT = "persona-axis/source/1"
SOURCE = "source.json"
_DOWNLOAD = ".download"  # inside the hidden folder: the client's own


@dataclass(frozen=True)
class Source:
    """Where a pulled folder came from."""

    repo: str
    commit: str
    endpoint: str
    files: dict[str, str]  # SHA-256 by name


def read_source(folder: str | Path) -> Source:
    """The record of a pulled folder.

    Raises:
        FileNotFoundError: the folder was not pulled.
        StorageError: the record is damaged.
    """
    file = Path(folder) / SOURCE
    data = read_json(file)
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise StorageError(f"{file} is not a record of a pull (expected {FORMAT}).")
    return Source(**data)


def pull(repo_id: str, out: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a shared axis and policy into a new folder, which then works where a run folder does.

    Args:
        repo_id: ``OWNER/NAME``.
        out: does not exist, is empty, or holds this very commit already (then nothing is downloaded).
        revision: branch, tag or commit; by default the main branch.
        token: of the Hub; by default ``HF_TOKEN`` or what ``hf auth login`` stored, if any.

    Returns:
        ``out``. Its ``source.json`` records repository and commit.

    Raises:
        RunConflict: ``out`` holds something else.
        UsageError: no such repository or revision, no access, or neither an axis nor a policy in it.
        StorageError: no network, a transfer that broke off, damaged files, or a disk that refuses.
    """
    check_name(repo_id)
    out = Path(out)
    held = _held(out, repo_id)
    if held is not None and held.commit == revision:
        return out
    api = client(token)
    with hub_faults(repo_id, revision):
        info = lookup(api, repo_id, revision)
    commit = str(info.sha)
    if held is not None:
        if held.commit == commit:
            return out
        raise RunConflict(
            f"{out} holds {repo_id} at commit {held.commit}, and {revision or 'the main branch'} is now {commit}. "
            "Pull into another folder, or remove this one."
        )
    wanted = [sibling for sibling in info.siblings or [] if sibling.rfilename in (*SHARED, CARD)]
    if {sibling.rfilename for sibling in wanted}.isdisjoint((AXIS, *POLICY_FILES)):
        raise UsageError(f"{repo_id} at {commit} holds no axis ({AXIS}) and no policy ({POLICY_FILES[0]}).")
    with storage_errors(out), _staging(out) as staging:
        files = {}
        with hub_faults(repo_id, revision), storage_errors(out):
            for sibling in wanted:
                files[sibling.rfilename] = _download(api, repo_id, commit, sibling, staging)
        shutil.rmtree(staging / _DOWNLOAD)
        _verify(staging, repo_id, commit)
        source = Source(repo_id, commit, constants.ENDPOINT, files)
        write_json(staging / SOURCE, {"format": FORMAT, **asdict(source)})
        _publish(staging, out)
    return out


# ---- the target --------------------------------------------------------------------------------------------------


def _held(out: Path, repo_id: str) -> Source | None:
    """What `out` already holds of this repository; None when it is free.

    Raises RunConflict when it holds anything else, UsageError when it cannot be made by one rename.
    """
    if blocking := [place for place in (out, *out.parents) if place.exists() and not place.is_dir()]:
        raise UsageError(f"--out {out}: {blocking[0]} is a file. Name another folder.")
    if out.exists() and (os.path.ismount(out) or out.resolve() == Path.cwd()):
        raise UsageError(f"--out {out} is a mount point or the current folder. Name a new folder inside it.")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / SOURCE).exists():
        names = ", ".join(sorted(place.name for place in out.iterdir())[:4])
        raise RunConflict(f"{out} is not empty and was not pulled (it has {names}). Name another --out.")
    source = read_source(out)
    if source.repo != repo_id or source.endpoint != constants.ENDPOINT:
        raise RunConflict(f"{out} holds {source.repo} of {source.endpoint}. Name another --out.")
    for name, digest in source.files.items():
        if not (out / name).is_file() or _sha256(out / name) != digest:
            raise RunConflict(f"{out / name} is not what was pulled from {repo_id}. Name another --out.")
    return source


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`; gone afterwards unless it was renamed."""
    target = out.resolve()
    make_folder(target.parent)
    for stale in _stale(target):
        shutil.rmtree(stale, ignore_errors=True)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    folder.mkdir()
    with _lock(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _stale(target: Path) -> list[Path]:
    """Hidden folders of pulls into `target` that no longer run."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    found = []
    for place in target.parent.iterdir():
        if pattern.fullmatch(place.name) and place.is_dir():
            with _lock(place) as free:
                if free:
                    found.append(place)
    return found


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold a folder; False when another process does. The system lets go when a process is killed."""
    if os.name == "nt":  # no locks on folders there: leave other pulls' alone
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _publish(staging: Path, out: Path) -> None:
    target = out.resolve()
    try:
        if target.exists():
            target.rmdir()  # empty, as was checked
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise RunConflict(f"{out} was filled by something else meanwhile. Name another --out.") from error
    sync_folder(target.parent)


# ---- the files ---------------------------------------------------------------------------------------------------


def _download(api: HfApi, repo_id: str, commit: str, sibling: RepoSibling, staging: Path) -> str:
    """Fetch one file, check it, put it in its place. Returns its SHA-256."""
    name = sibling.rfilename
    fetched = Path(api.hf_hub_download(repo_id, name, revision=commit, local_dir=staging / _DOWNLOAD))
    digest = _sha256(fetched)
    if sibling.lfs is not None:
        good = digest == sibling.lfs.sha256
    elif sibling.blob_id is not None:
        good = _git_blob(fetched.read_bytes()) == sibling.blob_id
    else:
        raise StorageError(f"{constants.ENDPOINT} gives no checksum of {name}; only a Hub that does can be trusted.")
    if not good:
        raise StorageError(
            f"{name} of {repo_id} did not arrive as it is at commit {commit}. Nothing is kept; run the same command "
            "again, and if it says so again, report it to the owner."
        )
    with replace_atomic(staging / name) as temp:
        os.replace(fetched, temp)
    return digest


def _verify(staging: Path, repo_id: str, commit: str) -> None:
    """What was fetched must load: checksums only say that it is what was pushed."""
    try:
        read_artifact(staging)
    except (PersonaAxisError, KeyError, TypeError, ValueError) as error:
        reason = str(error).replace(f"{staging}{os.sep}", "")
        raise StorageError(
            f"{repo_id} at commit {commit} does not load: {reason} Nothing is kept; its owner has to push it again."
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _git_blob(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
