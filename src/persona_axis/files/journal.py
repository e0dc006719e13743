"""The write-ahead journal of one shard that is not complete yet: what is in it survives ``kill -9``.

Byte format (all integers little-endian), version 1:

1. A journal is a sequence of records and nothing else. Record 0 has the header ``{"journal": 1, "config":
   <config hash>}`` and no arrays; the file is created atomically with it, so it is never torn.
2. A record is ``prefix | header | payload | crc``. The prefix has 24 bytes: the marker ``89 50 41 58 4A 0D 0A
   1A``, header size (u32), payload size (u64), crc32 of the 20 bytes before (u32). The prefix has its own
   checksum because a wrong size would make every later record look like a torn tail.
3. The header is ASCII JSON: ``{"header": <the caller's dict>, "arrays": [[name, dtype, shape], ...]}``; dtype
   in NumPy's notation (``<f4``). No NaN.
4. The payload is the raw bytes of the arrays, in the order of the header, C order, little-endian, no padding.
5. The last four bytes are the crc32 of header and payload.
6. One record is one ``write`` to a file opened for appending, with no buffer in the process: a killed process
   loses at most the record it was writing. A power cut loses at most what came after the last ``sync``.
7. Bytes that are no valid record, with no valid record after them, are a torn tail: reading returns what is
   before and cuts them off. With a valid record after them they are damage: `StorageError` with the offset.
8. One writer at a time. A file that grew under the writer is an error, never interleaved records.
"""

import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from persona_axis.errors import RunConflict, StorageError
from persona_axis.files.atomic import encode_json, storage_errors, sync_folder, write_atomic

log = logging.getLogger(__name__)

VERSION = 1
_MARKER = b"\x89PAXJ\r\n\x1a"
_PREFIX = struct.Struct("<8sIQI")
_CRC_BYTES = 4

Record = tuple[dict[str, Any], dict[str, np.ndarray]]


class Journal:
    """Append-only records (header dict, named arrays) of one unfinished shard; see the module's contract.

    Nothing is touched on disk before the first `read` or `append`. Usable as a context manager (closes).
    """

    def __init__(self, path: Path, config_hash: str) -> None:
        self.path = path
        self.config_hash = config_hash
        self._file: Any = None  # unbuffered, for appending
        self._end: int | None = None  # size of the file when every byte of it is known to be good

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self) -> list[Record]:
        """Every complete record, in order, arrays owned and writable; cuts a torn tail off. [] when absent.

        Raises RunConflict for a journal of another config, StorageError for damage before the tail.
        """
        if not self.path.exists():
            return []
        with storage_errors(self.path), self.path.open("rb") as file:
            scan = _scan(file, self.path)
            end, first = next(scan, (0, None))
            self._check_first(first)
            records = []
            for end, record in scan:  # noqa: B007 - the last end is where the good bytes stop
                records.append(record)
        self._cut(end)
        return records

    def append(self, header: dict[str, Any], arrays: dict[str, np.ndarray], *, sync: bool = False) -> None:
        """Add one record in one write; with `sync` it is on the disk when this returns.

        Arrays are numbers or booleans of any shape; the header is JSON (tuples come back as lists).
        Raises StorageError (disk full, no permission, another writer), RunConflict (another config),
        NonFiniteError (NaN in the header; NaN in arrays is the caller's business).
        """
        data = _encode(header, arrays, str(self.path))
        try:
            with storage_errors(self.path):
                self._open()
                self._write(data)
            if sync:
                self.sync()
        except BaseException:
            self.close()  # part of the record may be in the file: the next append recovers first
            raise

    def sync(self) -> None:
        """Make every appended record durable (fsync). Raises StorageError."""
        if self._file is not None:
            with storage_errors(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the next append checks it again and opens it."""
        file, self._file, self._end = self._file, None, None
        if file is not None:
            file.close()

    def delete(self) -> None:
        """Remove the journal (its shard is complete). Works when it is absent."""
        self.close()
        if not self.path.exists():
            return
        with storage_errors(self.path):
            self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    def _open(self) -> None:
        if self._file is not None:
            return
        if not self.path.exists():
            first = _encode({"journal": VERSION, "config": self.config_hash}, {}, str(self.path))
            write_atomic(self.path, first)
            self._end = len(first)
        elif self._end is None:
            self.read()
        self._file = self.path.open("ab", buffering=0)

    def _write(self, data: bytes) -> None:
        assert self._end is not None
        if os.fstat(self._file.fileno()).st_size != self._end:
            raise StorageError(
                f"{self.path} changed while this process was writing it. Is the same command running twice? "
                "Stop one of them and run the command again."
            )
        rest = memoryview(data)
        while rest:  # one round, but for a disk that fills up or a record over 2 GiB
            rest = rest[self._file.write(rest) :]
        self._end += len(data)

    def _check_first(self, record: Record | None) -> None:
        header = record[0] if record else {}
        if "journal" not in header:
            raise StorageError(
                f"{self.path} is not a journal, or its first record is damaged (byte offset 0). "
                "Delete that file and run the same command again: only this shard is made anew."
            )
        if header["journal"] != VERSION:
            raise StorageError(
                f"{self.path} has journal format {header['journal']}, this version of persona-axis reads "
                f"{VERSION}. Use the version that wrote it, or delete that file."
            )
        if header["config"] != self.config_hash:
            raise RunConflict(
                f"{self.path} belongs to another configuration: it holds config {header['config']}, "
                f"this run is {self.config_hash}. Use another run folder, or the options of that run."
            )

    def _cut(self, end: int) -> None:
        """Remove the torn tail, durably: an append after it would turn it into damage in the middle."""
        torn = self.path.stat().st_size - end
        if torn:
            log.info("%s: dropped the last %d bytes, a record cut off while being written", self.path, torn)
            with storage_errors(self.path), self.path.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        self._end = end


def _encode(header: dict[str, Any], arrays: dict[str, np.ndarray], where: str) -> bytes:
    stored = {name: _storable(name, array) for name, array in arrays.items()}
    layout = [[name, array.dtype.str, list(array.shape)] for name, array in stored.items()]
    head = encode_json({"header": header, "arrays": layout}, where)
    payload = [array.tobytes() for array in stored.values()]
    prefix = _PREFIX.pack(_MARKER, len(head), sum(map(len, payload)), 0)[:-_CRC_BYTES]
    crc = zlib.crc32(head)
    for data in payload:
        crc = zlib.crc32(data, crc)
    return b"".join([prefix, _u32(zlib.crc32(prefix)), head, *payload, _u32(crc)])


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _storable(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiub":
        raise TypeError(f"array {name!r} has dtype {array.dtype}; a journal holds numbers and booleans")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _scan(file: BinaryIO, path: Path) -> Iterator[tuple[int, Record]]:
    """Yield (offset after the record, record) up to the end or a torn tail. Raises StorageError on damage."""
    size = os.fstat(file.fileno()).st_size
    offset = 0
    while offset < size:
        found = _read_record(file, offset, size)
        if found is None:
            _refuse_damage(file, path, offset, size)
            return
        yield found
        offset = found[0]


def _read_record(file: BinaryIO, offset: int, size: int) -> tuple[int, Record] | None:
    """(offset after it, record) of the record that starts at `offset`; None when there is no valid one."""
    file.seek(offset)
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    marker, head_bytes, payload_bytes, crc = _PREFIX.unpack(prefix)
    if marker != _MARKER or zlib.crc32(prefix[:-_CRC_BYTES]) != crc:
        return None
    body_bytes = head_bytes + payload_bytes
    end = offset + _PREFIX.size + body_bytes + _CRC_BYTES
    if end > size:
        return None
    body = file.read(body_bytes)
    if _u32(zlib.crc32(body)) != file.read(_CRC_BYTES):
        return None
    return end, _decode(body, head_bytes)


def _decode(body: bytes, head_bytes: int) -> Record:
    head = json.loads(body[:head_bytes])
    arrays = {}
    offset = head_bytes
    for name, dtype, shape in head["arrays"]:
        view: np.ndarray = np.ndarray(shape, dtype, buffer=body, offset=offset)
        arrays[name] = view.copy()  # aligned, writable, and it lets go of the body
        offset += view.nbytes
    return head["header"], arrays


def _refuse_damage(file: BinaryIO, path: Path, offset: int, size: int) -> None:
    """Raise StorageError when a valid record follows the invalid bytes at `offset`."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        later = view.find(_MARKER, offset + 1)
        while later >= 0:
            if _read_record(file, later, size) is not None:
                raise StorageError(
                    f"{path} is damaged at byte offset {offset}, with good records after it. "
                    "Delete that file and run the same command again: only this shard is made anew."
                )
            later = view.find(_MARKER, later + 1)
