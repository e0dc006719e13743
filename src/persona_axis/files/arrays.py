"""Named arrays in one safetensors file: atomic writing, partial reading.

Written here and not by ``safetensors.numpy.save_file``, which saves a transposed view as if it were
contiguous, renames over its target by itself with mode 0600, and reports a full disk without an errno.

The file's metadata holds ``persona_axis.sha256``: the digest of the layout and all bytes of the arrays. The
rows of a shard hold the same digest, so a pair of files from two different writes shows in the headers.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from persona_axis.errors import StorageError
from persona_axis.files.atomic import replace_atomic, storage_errors

DIGEST_KEY = "persona_axis.sha256"
_METADATA = "__metadata__"
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_NUMPY_DTYPES = {code: np.dtype(name) for name, code in _DTYPES.items()}
_WHOLE = slice(None)


@dataclass(frozen=True)
class WrittenArrays:
    """What `write_arrays` put on the disk: layout by name, size of the file, digest of the content."""

    layout: dict[str, dict[str, Any]]
    size_bytes: int
    sha256: str


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> WrittenArrays:
    """Write arrays (any layout in memory, little-endian on disk) atomically to one safetensors file.

    Raises StorageError when the disk refuses, TypeError for a dtype that safetensors does not have.
    """
    stored = _in_file_order(arrays)
    layout = _layout(stored)
    sha256 = _digest(layout, stored.values())
    header = json.dumps({_METADATA: {DIGEST_KEY: sha256}, **layout}).encode()
    header += b" " * (-len(header) % 8)  # the arrays start aligned
    with replace_atomic(path) as temp:
        with temp.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in stored.values():
                file.write(array.data if array.size else b"")
        size_bytes = temp.stat().st_size
    return WrittenArrays(layout, size_bytes, sha256)


def _in_file_order(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """C-contiguous little-endian arrays, widest items first so that each starts aligned, then by name."""
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES or name == _METADATA:
            raise TypeError(f"array {name!r} with dtype {array.dtype} cannot be stored as safetensors")
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    return {name: np.asarray(arrays[name], arrays[name].dtype.newbyteorder("<"), order="C") for name in order}


def _layout(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    layout = {}
    start = 0
    for name, array in arrays.items():
        end = start + array.nbytes
        layout[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    return layout


def _digest(layout: dict[str, dict[str, Any]], parts: Any) -> str:
    digest = hashlib.sha256(json.dumps(layout, sort_keys=True).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_digest(path: Path) -> str | None:
    """The digest in the file's header; the arrays are not read.

    Raises SafetensorError on a malformed file: only the caller knows what to do about it.
    """
    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get(DIGEST_KEY)


def content_matches_digest(path: Path) -> bool:
    """Read the whole file (1 MiB at a time) and compare it with its digest. Raises as `read_digest` does."""
    expected = read_digest(path)
    with storage_errors(path), path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        del header[_METADATA]
        return _digest(header, iter(lambda: file.read(1 << 20), b"")) == expected


class ArrayReader:
    """The arrays of one open file. Every read is a fresh, writable NumPy array of just the part asked for."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path

    @property
    def names(self) -> list[str]:
        """Names of the arrays, sorted."""
        return sorted(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one array, from the header. Raises KeyError with the names there are."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, first: slice = _WHOLE, second: slice = _WHOLE) -> np.ndarray:
        """``array[first, second]`` without reading the rest; slices as in NumPy, steps other than 1 refused.

        ``read("activations", second=slice(a, b))`` reads only layers a to b of ``[n, n_layers, d_model]``.
        Raises KeyError for an unknown name, ValueError for a step or a second slice of a 1-d array.
        """
        stored = self._slice(name)
        shape = stored.get_shape()
        ranges = _ranges(shape, first, second)
        part = [stop - start for start, stop in ranges] + shape[len(ranges) :]
        if 0 in part:  # safetensors refuses some empty ranges
            return np.empty(part, _NUMPY_DTYPES[stored.get_dtype()])
        return stored[tuple(slice(start, stop) for start, stop in ranges)]

    def _slice(self, name: str) -> Any:
        if name not in self._file.keys():  # noqa: SIM118 - safe_open is no dict
            raise KeyError(f"{self._path} has no array {name!r}; it has {', '.join(self.names)}")
        return self._file.get_slice(name)


def _ranges(shape: list[int], first: slice, second: slice) -> list[tuple[int, int]]:
    """(start, stop) for the first two dimensions, or for as many of them as there are."""
    asked = (first, second)
    if any(part != _WHOLE for part in asked[len(shape) :]):
        raise ValueError(f"{first}, {second} asks for a dimension that shape {shape} does not have")
    ranges = []
    for part, size in zip(asked, shape, strict=False):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"{part} has a step; partial reads are contiguous")
        ranges.append((start, max(start, stop)))
    return ranges


@contextmanager
def open_array_file(path: Path) -> Iterator[ArrayReader]:
    """Open a safetensors file for partial reads (memory-mapped).

    Raises FileNotFoundError, or StorageError when it is malformed or not readable.
    """
    with storage_errors(path):
        try:
            opening = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise StorageError(
                f"{path} is damaged ({error}). Delete it and run the command that made it again."
            ) from error
    with opening as file:
        yield ArrayReader(file, path)
