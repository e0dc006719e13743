"""Writes that a kill, a full disk or a power cut cannot tear.

Contract:

1. A reader of the final path sees the whole old content or the whole new content, nothing between.
2. When a call returns, the content and its name are on the disk (file and folder are both synced).
3. The temporary file lies in the same folder (a rename across file systems is not atomic), is called
   ``.<name>.<8 hex digits>.tmp``, and is gone when the write fails. Only a killed process leaves one behind:
   whoever owns the folder calls `remove_stale_temps` before starting to write.
4. Missing folders are made. Errors of the disk become `StorageError` with the path and what to do; any other
   exception passes unchanged.
"""

import errno
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from persona_axis.errors import NonFiniteError, StorageError

_STALE_TEMP = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")

_REMEDIES = {
    errno.ENOSPC: "Free space on {folder}",
    errno.EDQUOT: "Free some of your disk quota on {folder}",
    errno.EACCES: "Give this user access to {folder}",
    errno.EPERM: "Give this user access to {folder}",
    errno.EROFS: "Make the file system of {folder} writable",
    errno.EFBIG: "Raise the file size limit (ulimit -f) for {folder}",
    errno.EIO: "Check the disk under {folder}",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError that the user can mend (disk full, no permission, ...) into a `StorageError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        remedy = _REMEDIES[error.errno].format(folder=path.parent)
        raise StorageError(
            f"Cannot read or write {path}: {os.strerror(error.errno)}. "
            f"{remedy} and run the same command again; nothing finished is lost."
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a renamed file is not, before this)."""
    if os.name == "nt":  # Windows cannot open a folder, and writes its names through
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no sync for folders: a name is as durable as they make it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably. Raises StorageError when the disk refuses."""
    with storage_errors(folder):
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for place in missing:
            sync_folder(place.parent)


@contextmanager
def replace_atomic(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file in the folder of `path`; it replaces `path` when the block succeeds.

    The block may write to it by any means. Raises StorageError when the disk refuses; whatever the block
    raises (Ctrl-C included) passes, the temporary file is removed and `path` keeps its old content.
    """
    make_folder(path.parent)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with storage_errors(path):
        try:
            # Not mkstemp: its mode 0600 would hide results from the group whatever the umask says.
            os.close(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield temp
            _sync_file(temp)
            os.replace(temp, path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write bytes so that `path` holds the old content or all of `data`. Raises StorageError."""
    with replace_atomic(path) as temp:
        temp.write_bytes(data)


def remove_stale_temps(folder: Path) -> list[Path]:
    """Remove what killed writers left in `folder` (not below it) and return the paths, sorted.

    Only for the owner of the folder, before its writers start: a live writer's file would go too.
    """
    if not folder.is_dir():
        return []
    stale = sorted(path for path in folder.iterdir() if _STALE_TEMP.fullmatch(path.name))
    with storage_errors(folder):
        for path in stale:
            path.unlink(missing_ok=True)
    return stale


def encode_json(obj: Any, where: str, *, indent: int | None = None, ensure_ascii: bool = True) -> bytes:
    """`obj` as UTF-8 JSON. Raises NonFiniteError naming `where` and the place of a NaN or infinity."""
    try:
        text = json.dumps(obj, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError as error:
        place = _non_finite_place(obj)
        if place is None:
            raise
        raise NonFiniteError(
            f"{where}: the value at {place} is not finite, and JSON has no NaN or infinity. "
            "Store null, or leave the entry out."
        ) from error
    return text.encode()


def _non_finite_place(obj: Any, place: str = "$") -> str | None:
    """The path of the first NaN or infinity, as in ``$.layers[3]``; None when all is finite."""
    if isinstance(obj, float):
        return None if math.isfinite(obj) else place
    inner: list[tuple[str, Any]] = []
    if isinstance(obj, dict):
        inner = [(f"{place}.{key}", value) for key, value in obj.items()]
    elif isinstance(obj, list | tuple):
        inner = [(f"{place}[{index}]", value) for index, value in enumerate(obj)]
    return next(filter(None, (_non_finite_place(value, name) for name, value in inner)), None)


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as readable JSON. Raises NonFiniteError for NaN or infinity, StorageError for the disk."""
    data = encode_json(obj, str(path), indent=2, ensure_ascii=False)
    write_atomic(path, data + b"\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line. Raises NonFiniteError for NaN or infinity, StorageError for the disk."""
    write_atomic(path, b"".join(encode_json(row, str(path), ensure_ascii=False) + b"\n" for row in rows))


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, or StorageError when it is damaged."""
    with storage_errors(path):
        data = path.read_bytes()
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except ValueError as error:
        raise StorageError(
            f"{path} is not valid JSON ({error}). Restore it or delete it, and run the same command again."
        ) from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
