"""A shard: ``<name>.parquet`` (a row per rollout or verdict), beside it ``<name>.safetensors`` (arrays).

Contract:

1. Arrays are written first, rows last, both atomically: **a shard is complete when its parquet file exists**.
   Arrays without rows are what a kill left behind, and are overwritten.
2. The parquet schema metadata holds ``persona_axis.version`` (of this format), ``persona_axis.rows`` (count),
   ``persona_axis.config`` (config hash) and ``persona_axis.arrays`` (JSON: null, or layout, size and sha256
   of the safetensors file, and whether it was dropped). The safetensors file holds the same sha256.
3. `is_complete` reads footer, header and sizes only. Pages of the parquet file carry checksums, which
   `read_rows` verifies; `verify_arrays` reads every byte of the arrays.
4. Another config hash is refused (`RunConflict`); damage is a `StorageError` naming the one file to delete.
5. A shard with arrays is written once: two files cannot be replaced in one step. Rows alone can be replaced.
6. `drop_arrays` first marks the rows, then deletes the file, so arrays that vanish by accident are damage.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from persona_axis.errors import RunConflict, StorageError
from persona_axis.files.arrays import (
    ArrayReader,
    content_matches_digest,
    open_array_file,
    read_digest,
    write_arrays,
)
from persona_axis.files.atomic import make_folder, replace_atomic, storage_errors, sync_folder

VERSION = 1
_PREFIX = "persona_axis."


@dataclass
class ReadLog:
    """Counts reads of shard contents by file (footers and headers are free), passed in by whoever asks."""

    counts: Counter[Path] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Footer:
    rows: int
    config_hash: str
    arrays: dict[str, Any] | None  # layout, size_bytes, sha256, dropped


def write_shard(
    folder: Path,
    name: str,
    rows: list[dict[str, Any]] | pa.Table,
    schema: pa.Schema,
    arrays: dict[str, np.ndarray],
    config_hash: str,
) -> None:
    """Write a complete shard, durable when this returns. Missing folders are made.

    `rows` have exactly the columns of `schema`; a key left out of a dict is null. `arrays` are numbers of any
    shape (``{}`` for none). Raises StorageError (disk), RunConflict (a shard with arrays is already there),
    ValueError (a column that the schema lacks, another schema).
    """
    rows_path, arrays_path = _paths(folder, name)
    table = _table(rows, schema, name)
    make_folder(folder)
    if rows_path.exists() and (arrays or arrays_path.exists()):
        raise RunConflict(
            f"{rows_path} is complete already, and a shard with arrays is written once. "
            f"Delete {rows_path} to make it anew."
        )
    info = None
    if arrays:
        info = {**asdict(write_arrays(arrays_path, arrays)), "dropped": False}
    else:
        _delete(arrays_path)  # left by a killed write that did have arrays
    _write_rows(rows_path, table, _Footer(table.num_rows, config_hash, info))


def is_complete(folder: Path, name: str, config_hash: str) -> bool:
    """Whether the shard is there and whole, judged from footer and sizes; False when it was never finished.

    Raises RunConflict for another config, StorageError for a damaged file (the message says what to delete).
    """
    rows_path, arrays_path = _paths(folder, name)
    if not rows_path.exists():
        return False
    footer = _read_footer(rows_path, config_hash)
    if footer.arrays is not None and not footer.arrays["dropped"]:
        _check_pair(rows_path, arrays_path, footer.arrays)
    return True


def read_rows(
    folder: Path,
    name: str,
    columns: list[str] | None = None,
    *,
    config_hash: str | None = None,
    log: ReadLog | None = None,
) -> pa.Table:
    """The rows of a complete shard, all columns or those named, checksums verified.

    Raises FileNotFoundError (not complete), RunConflict (another config; None skips the check), StorageError
    (damaged), KeyError (no such column).
    """
    rows_path, _ = _paths(folder, name)
    _read_footer(rows_path, config_hash)
    _note(log, rows_path)
    with (
        _damage_errors(rows_path, rows_path),
        pq.ParquetFile(rows_path, page_checksum_verification=True) as file,
    ):
        unknown = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if unknown:
            raise KeyError(f"{rows_path} has no column {unknown}; it has {file.schema_arrow.names}")
        table = file.read(columns)
    return table.replace_schema_metadata(_foreign_metadata(table.schema))


@contextmanager
def open_arrays(
    folder: Path, name: str, *, config_hash: str | None = None, log: ReadLog | None = None
) -> Iterator[ArrayReader]:
    """Open the arrays of a complete shard for partial reads: ``arrays.read("x", second=slice(8, 12))``.

    Raises FileNotFoundError (not complete), RunConflict (another config; None skips the check), StorageError
    (damaged, never written, or dropped).
    """
    rows_path, arrays_path = _paths(folder, name)
    _check_kept(rows_path, arrays_path, _read_footer(rows_path, config_hash))
    _note(log, arrays_path)
    with open_array_file(arrays_path) as reader:
        yield reader


def verify_arrays(folder: Path, name: str) -> None:
    """Read every byte of a shard's arrays and compare with the digest. Raises as `open_arrays` does."""
    rows_path, arrays_path = _paths(folder, name)
    _check_kept(rows_path, arrays_path, _read_footer(rows_path, None))
    if not content_matches_digest(arrays_path):
        raise _damaged(arrays_path, rows_path, "its content has another sha256 than when it was written")


def drop_arrays(folder: Path, name: str) -> None:
    """Delete the arrays of a complete shard and keep its rows; safe to repeat, also after a kill half-way.

    Raises FileNotFoundError (not complete), StorageError (damaged rows, disk).
    """
    rows_path, arrays_path = _paths(folder, name)
    footer = _read_footer(rows_path, None)
    if footer.arrays is None:
        return
    if not footer.arrays["dropped"]:
        marked = _Footer(footer.rows, footer.config_hash, {**footer.arrays, "dropped": True})
        _write_rows(rows_path, read_rows(folder, name), marked)
    _delete(arrays_path)


def list_shards(folder: Path) -> list[str]:
    """Names of the complete shards in a folder, sorted; [] for a missing folder."""
    if not folder.is_dir():
        return []
    return sorted(path.stem for path in folder.glob("*.parquet") if not path.name.startswith("."))


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is no name for a shard: it must be a plain file name without folders")
    return folder / f"{name}.parquet", folder / f"{name}.safetensors"


def _table(rows: list[dict[str, Any]] | pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    if isinstance(rows, pa.Table):
        if not rows.schema.equals(schema):
            raise ValueError(f"shard {name}: the table has schema\n{rows.schema}\nand not\n{schema}")
        return rows
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:  # from_pylist would drop them silently
        raise ValueError(f"shard {name}: columns {unknown} are not in the schema {schema.names}")
    return pa.Table.from_pylist(rows, schema=schema)


def _write_rows(path: Path, table: pa.Table, footer: _Footer) -> None:
    own = {
        "version": str(VERSION),
        "rows": str(footer.rows),
        "config": footer.config_hash,
        "arrays": json.dumps(footer.arrays),
    }
    metadata = {**(table.schema.metadata or {}), **{_PREFIX + key: value for key, value in own.items()}}
    with replace_atomic(path) as temp:
        pq.write_table(table.replace_schema_metadata(metadata), temp, compression="zstd", write_page_checksum=True)


def _foreign_metadata(schema: pa.Schema) -> dict[bytes, bytes] | None:
    """The schema's metadata without ours: it speaks of this file, not of the table in memory."""
    metadata = schema.metadata or {}
    return {key: metadata[key] for key in metadata if not key.startswith(_PREFIX.encode())} or None


def _read_footer(path: Path, config_hash: str | None) -> _Footer:
    with _damage_errors(path, path):
        parquet = pq.read_metadata(path)
    stored = {key.decode(): value.decode() for key, value in (parquet.metadata or {}).items()}
    version = stored.get(_PREFIX + "version")
    if version is None:
        raise _damaged(path, path, "it was not written by persona-axis")
    if version != str(VERSION):
        raise StorageError(
            f"{path} has shard format {version}, this version of persona-axis reads {VERSION}. "
            "Use the version that wrote it."
        )
    footer = _Footer(int(stored[_PREFIX + "rows"]), stored[_PREFIX + "config"], json.loads(stored[_PREFIX + "arrays"]))
    if parquet.num_rows != footer.rows:
        raise _damaged(path, path, f"{parquet.num_rows} rows instead of {footer.rows}")
    if config_hash is not None and footer.config_hash != config_hash:
        raise RunConflict(
            f"{path} belongs to another configuration: it holds config {footer.config_hash}, "
            f"this run is {config_hash}. Use another run folder, or the options of that run."
        )
    return footer


def _check_kept(rows_path: Path, arrays_path: Path, footer: _Footer) -> None:
    if footer.arrays is None:
        raise StorageError(f"{rows_path} was written without arrays.")
    if footer.arrays["dropped"]:
        raise StorageError(
            f"The arrays of {rows_path} were dropped once they were folded into sums. "
            "Collect again with another --keep to have them."
        )
    _check_pair(rows_path, arrays_path, footer.arrays)


def _check_pair(rows_path: Path, arrays_path: Path, info: dict[str, Any]) -> None:
    """Raise StorageError unless the arrays are there and come from the same write as the rows."""
    if not arrays_path.exists():
        raise _damaged(arrays_path, rows_path, "it is missing")
    size_bytes = arrays_path.stat().st_size
    if size_bytes != info["size_bytes"]:
        raise _damaged(arrays_path, rows_path, f"{size_bytes} bytes instead of {info['size_bytes']}")
    with _damage_errors(arrays_path, rows_path):
        sha256 = read_digest(arrays_path)
    if sha256 != info["sha256"]:
        raise _damaged(arrays_path, rows_path, f"it belongs to other rows than those of {rows_path.name}")


@contextmanager
def _damage_errors(path: Path, to_delete: Path) -> Iterator[None]:
    """Turn what a reader says about a malformed file into a `StorageError` that says what to delete."""
    with storage_errors(path):
        try:
            yield
        except (StorageError, MemoryError):  # MemoryError: pyarrow's is an ArrowException too
            raise
        except (pa.ArrowException, SafetensorError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system spoke, not the parser
                raise
            raise _damaged(path, to_delete, str(error)) from error


def _damaged(path: Path, to_delete: Path, reason: str) -> StorageError:
    return StorageError(
        f"{path} is damaged ({reason}). Delete {to_delete} and run the same command again: "
        "only this shard is made anew."
    )


def _delete(path: Path) -> None:
    if path.exists():
        with storage_errors(path):
            path.unlink(missing_ok=True)
            sync_folder(path.parent)


def _note(log: ReadLog | None, path: Path) -> None:
    if log is not None:
        log.counts[path] += 1
