"""A shard is complete or it is not; reads are partial and exact; damage names the one file to delete."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from persona_axis.errors import RunConflict, StorageError
from persona_axis.files import arrays as array_files
from persona_axis.files import shards
from persona_axis.files.shards import (
    ReadLog,
    drop_arrays,
    is_complete,
    list_shards,
    open_arrays,
    read_rows,
    verify_arrays,
    write_shard,
)

CONFIG = "c0ffee"
SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("score", pa.int8())])
ROWS: list[dict[str, Any]] = [{"key": "a", "score": 3}, {"key": "b"}]
ACTIVATIONS = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)  # [n, n_layers, d_model]


def make(folder: Path, name: str = "s", arrays: dict[str, np.ndarray] | None = None) -> None:
    named = {"activations": ACTIVATIONS} if arrays is None else arrays
    write_shard(folder, name, ROWS, SCHEMA, named, CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path)
    return tmp_path


def test_rows_come_back(folder: Path) -> None:
    table = read_rows(folder, "s", config_hash=CONFIG)
    assert table.schema == SCHEMA
    assert table.schema.metadata is None
    assert table.to_pylist() == [{"key": "a", "score": 3}, {"key": "b", "score": None}]
    assert read_rows(folder, "s", ["score"]).column_names == ["score"]
    assert is_complete(folder, "s", CONFIG)


def test_tables_and_no_rows_are_fine(tmp_path: Path) -> None:
    schema = SCHEMA.with_metadata({"mine": "kept"})
    write_shard(tmp_path / "new", "s", pa.Table.from_pylist(ROWS, schema=schema), schema, {}, CONFIG)
    assert read_rows(tmp_path / "new", "s").schema.metadata == {b"mine": b"kept"}
    write_shard(tmp_path, "empty", [], SCHEMA, {}, CONFIG)
    assert is_complete(tmp_path, "empty", CONFIG)
    assert read_rows(tmp_path, "empty").num_rows == 0


def test_footer_metadata_is_the_contract(folder: Path) -> None:
    metadata = pq.read_metadata(folder / "s.parquet").metadata
    assert metadata[b"persona_axis.rows"] == b"2"
    assert metadata[b"persona_axis.config"] == CONFIG.encode()
    assert metadata[b"persona_axis.version"] == b"1"
    assert b'"activations"' in metadata[b"persona_axis.arrays"]


def test_wrong_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns \['skore'\]"):
        write_shard(tmp_path, "s", [{"key": "a", "skore": 1}], SCHEMA, {}, CONFIG)
    with pytest.raises(ValueError, match="schema"):
        write_shard(tmp_path, "s", pa.table({"key": ["a"]}), SCHEMA, {}, CONFIG)
    with pytest.raises(TypeError, match="'names'"):
        make(tmp_path, arrays={"names": np.array(["a"])})
    with pytest.raises(ValueError, match="plain file name"):
        make(tmp_path, name="../s")
    assert list(tmp_path.iterdir()) == []


def test_unknown_column_or_array_names_those_there_are(folder: Path) -> None:
    with pytest.raises(KeyError, match=r"it has \['key', 'score'\]"):
        read_rows(folder, "s", ["nope"])
    with open_arrays(folder, "s") as reader, pytest.raises(KeyError, match="it has activations"):
        reader.read("nope")


def test_other_safetensors_readers_agree(tmp_path: Path) -> None:
    named: dict[str, np.ndarray] = {
        "activations": ACTIVATIONS,
        "turned": ACTIVATIONS.T,
        "stepped": ACTIVATIONS[::2, :, ::-1],
        "counts": np.arange(3, dtype=np.int64),
        "flags": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 7, 3), np.float32),
        "big": np.arange(4, dtype=">i4"),
    }
    make(tmp_path, arrays=named)
    theirs = load_file(tmp_path / "s.safetensors")
    assert sorted(theirs) == sorted(named)
    with open_arrays(tmp_path, "s") as reader:
        assert reader.names == sorted(named)
        for name, array in named.items():
            ours = reader.read(name)
            assert reader.shape(name) == ours.shape == array.shape
            assert ours.dtype == theirs[name].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(ours, array)
            np.testing.assert_array_equal(theirs[name], array)
    verify_arrays(tmp_path, "s")


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for run in ("one", "two"):
        make(tmp_path / run)
    for name in ("s.parquet", "s.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


bounds = st.none() | st.integers(-9, 9)
slices = st.builds(slice, bounds, bounds)


@settings(max_examples=150, deadline=None)
@given(first=slices, second=slices)
def test_partial_reads_equal_full_reads(tmp_path_factory: pytest.TempPathFactory, first: slice, second: slice) -> None:
    folder = tmp_path_factory.getbasetemp() / "partial"
    if not folder.exists():
        make(folder)
    with open_arrays(folder, "s") as reader:
        part = reader.read("activations", first, second)
    expected = ACTIVATIONS[first, second]
    assert part.dtype == expected.dtype
    assert part.shape == expected.shape
    np.testing.assert_array_equal(part, expected)
    part[...] = 0  # ours to change


def test_slices_that_make_no_sense(tmp_path: Path) -> None:
    make(tmp_path, arrays={"flat": np.arange(4.0)})
    with open_arrays(tmp_path, "s") as reader:
        np.testing.assert_array_equal(reader.read("flat", slice(1, 3)), [1.0, 2.0])
        with pytest.raises(ValueError, match="dimension"):
            reader.read("flat", slice(None), slice(0, 1))
        with pytest.raises(ValueError, match="step"):
            reader.read("flat", slice(0, 4, 2))


def test_missing_shard(tmp_path: Path) -> None:
    assert not is_complete(tmp_path, "s", CONFIG)
    assert not is_complete(tmp_path / "absent", "s", CONFIG)
    assert list_shards(tmp_path / "absent") == []
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path, "s")
    with pytest.raises(FileNotFoundError), open_arrays(tmp_path, "s"):
        pass


def test_other_config_is_refused(folder: Path) -> None:
    message = "another configuration: it holds config c0ffee, this run is beef"
    with pytest.raises(RunConflict, match=message):
        is_complete(folder, "s", "beef")
    with pytest.raises(RunConflict, match=message):
        read_rows(folder, "s", config_hash="beef")
    with pytest.raises(RunConflict, match=message), open_arrays(folder, "s", config_hash="beef"):
        pass


def test_list_shards(folder: Path) -> None:
    make(folder, "r", {})
    (folder / ".s.parquet.0a1b2c3d.tmp").touch()
    (folder / ".hidden.parquet").touch()
    (folder / "unfinished.safetensors").touch()
    assert list_shards(folder) == ["r", "s"]


def assert_damaged(folder: Path, damaged: str) -> None:
    with pytest.raises(StorageError) as caught:
        is_complete(folder, "s", CONFIG)
    assert f"{folder / damaged} is damaged" in str(caught.value)
    assert f"Delete {folder / 's.parquet'} and run the same command again" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -8])
def test_truncated_rows(folder: Path, keep: int) -> None:
    path = folder / "s.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    assert_damaged(folder, "s.parquet")


def test_rows_of_somebody_else(folder: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), folder / "s.parquet")
    assert_damaged(folder, "s.parquet")


def test_flipped_byte_in_a_page_is_found_by_reading(tmp_path: Path) -> None:
    write_shard(tmp_path, "s", [{"key": f"{i}" * 50} for i in range(500)], SCHEMA, {}, CONFIG)
    path = tmp_path / "s.parquet"
    data = bytearray(path.read_bytes())
    data[200] ^= 0x10
    path.write_bytes(data)
    assert is_complete(tmp_path, "s", CONFIG)  # the footer is whole
    with pytest.raises(StorageError, match=r"Delete .*s\.parquet and run"):
        read_rows(tmp_path, "s")


@pytest.mark.parametrize("damage", ["missing", "short", "header", "foreign"])
def test_damaged_arrays(folder: Path, damage: str) -> None:
    path = folder / "s.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "header":
        path.write_bytes(data[:8] + b"x" * 20 + data[28:])
    else:  # the arrays of another write, same size
        make(folder / "other", arrays={"activations": ACTIVATIONS + 1})
        path.write_bytes((folder / "other" / "s.safetensors").read_bytes())
    assert_damaged(folder, "s.safetensors")
    with pytest.raises(StorageError), open_arrays(folder, "s"):
        pass
    (folder / "s.parquet").unlink()  # what the message says
    make(folder)
    assert is_complete(folder, "s", CONFIG)


def test_verify_arrays_reads_every_byte(folder: Path) -> None:
    path = folder / "s.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert is_complete(folder, "s", CONFIG)
    with pytest.raises(StorageError, match="sha256"):
        verify_arrays(folder, "s")


def test_arrays_are_written_once_and_rows_can_be_replaced(folder: Path) -> None:
    with pytest.raises(RunConflict, match="written once"):
        make(folder)
    with pytest.raises(RunConflict, match="written once"):
        make(folder, arrays={})
    make(folder, "verdicts", {})
    write_shard(folder, "verdicts", ROWS[:1], SCHEMA, {}, CONFIG)
    assert read_rows(folder, "verdicts").num_rows == 1


def test_arrays_without_rows_are_overwritten_or_removed(folder: Path) -> None:
    (folder / "s.parquet").unlink()
    assert not is_complete(folder, "s", CONFIG)
    make(folder, arrays={"other": np.zeros(2)})
    with open_arrays(folder, "s") as reader:
        assert reader.names == ["other"]
    (folder / "s.parquet").unlink()
    make(folder, arrays={})
    assert sorted(os.listdir(folder)) == ["s.parquet"]


def test_drop_arrays_keeps_the_rows(folder: Path) -> None:
    before = read_rows(folder, "s")
    for _ in range(2):
        drop_arrays(folder, "s")
    assert sorted(os.listdir(folder)) == ["s.parquet"]
    assert is_complete(folder, "s", CONFIG)
    assert read_rows(folder, "s", config_hash=CONFIG) == before
    with pytest.raises(StorageError, match="dropped"), open_arrays(folder, "s"):
        pass


def test_drop_interrupted_before_the_delete_is_finished_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_delete", killed)
        with pytest.raises(KeyboardInterrupt):
            drop_arrays(folder, "s")
    assert (folder / "s.safetensors").exists()
    assert is_complete(folder, "s", CONFIG)
    drop_arrays(folder, "s")
    assert not (folder / "s.safetensors").exists()


def test_shard_without_arrays_has_nothing_to_open_or_drop(tmp_path: Path) -> None:
    make(tmp_path, arrays={})
    drop_arrays(tmp_path, "s")
    with pytest.raises(StorageError, match="without arrays"), open_arrays(tmp_path, "s"):
        pass


def test_arrays_come_before_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace

    def spy(source: Path, target: Path) -> None:
        order.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    make(tmp_path)
    assert order == ["s.safetensors", "s.parquet"]


@pytest.mark.parametrize("arrays_fit", [False, True])
def test_full_disk_leaves_an_incomplete_shard(tiny_disk: Path, arrays_fit: bool) -> None:
    many = [{"key": os.urandom(500).hex()} for _ in range(200)]
    named = {"x": np.zeros(10 if arrays_fit else 100_000, np.float32)}
    with pytest.raises(StorageError, match=r"No space left on device\. Free space on"):
        write_shard(tiny_disk, "s", many, SCHEMA, named, CONFIG)
    assert not is_complete(tiny_disk, "s", CONFIG)
    assert not [name for name in os.listdir(tiny_disk) if name.endswith(".tmp")]
    make(tiny_disk)
    assert is_complete(tiny_disk, "s", CONFIG)


def test_file_size_limit_leaves_an_incomplete_shard(
    tmp_path: Path, file_size_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    with file_size_limit(1000), pytest.raises(StorageError, match="File too large"):
        make(tmp_path, arrays={"x": np.zeros(1000)})
    with file_size_limit(500), pytest.raises(StorageError, match=r"s\.parquet: File too large"):
        make(tmp_path, arrays={"x": np.zeros(10)})
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert not is_complete(tmp_path, "s", CONFIG)


KILLED_WRITER = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from persona_axis.files.shards import is_complete, write_shard
folder = Path(sys.argv[1])
schema = pa.schema([("number", pa.int64())])
for number in range(1_000_000):
    if not is_complete(folder, f"s{number}", "c0ffee"):
        x = np.full((50, 1000), number, np.float32)
        write_shard(folder, f"s{number}", [{"number": number}] * 50, schema, {"x": x}, "c0ffee")
        print("done", number, flush=True)
"""


def test_killed_writer_leaves_whole_shards(tmp_path: Path, run_and_kill: Callable[..., int]) -> None:
    for seed in range(5):
        done = run_and_kill(KILLED_WRITER, tmp_path, seed)
        complete = [number for number in range(done + 3) if is_complete(tmp_path, f"s{number}", CONFIG)]
        assert complete in (list(range(done + 1)), list(range(done + 2)))
        assert len(list_shards(tmp_path)) == len(complete)
    for number in complete:
        verify_arrays(tmp_path, f"s{number}")
        assert read_rows(tmp_path, f"s{number}")["number"].to_pylist() == [number] * 50
        with open_arrays(tmp_path, f"s{number}") as reader:
            assert (reader.read("x") == number).all()


def test_read_log_counts_contents_and_not_footers(folder: Path) -> None:
    log = ReadLog()
    is_complete(folder, "s", CONFIG)
    assert not log.counts
    read_rows(folder, "s", log=log)
    with open_arrays(folder, "s", log=log) as reader:
        reader.read("activations")
    assert log.counts == {folder / "s.parquet": 1, folder / "s.safetensors": 1}


def test_array_files_stand_alone(tmp_path: Path) -> None:
    written = array_files.write_arrays(tmp_path / "axis.safetensors", {"axis": ACTIVATIONS[0]})
    assert written.size_bytes == (tmp_path / "axis.safetensors").stat().st_size
    (tmp_path / "axis.safetensors").write_bytes(b"x")
    with (
        pytest.raises(StorageError, match="damaged"),
        array_files.open_array_file(tmp_path / "axis.safetensors"),
    ):
        pass
