"""What was appended comes back; a torn tail is cut at any byte; damage and other configs are refused."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from persona_axis.errors import NonFiniteError, RunConflict, StorageError
from persona_axis.files.journal import Journal, Record

CONFIG = "c0ffee"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
arrays = hnp.arrays(
    dtype=st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_]),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
records = st.tuples(st.dictionaries(st.text(), json_values, max_size=3), st.dictionaries(st.text(), arrays, max_size=3))


def record(number: int) -> Record:
    return {"number": number}, {"activation": np.full((2, 3), number, np.float32)}


def write(path: Path, count: int) -> list[int]:
    """Append records 0 to count - 1; the file's size after each."""
    sizes = []
    with Journal(path, CONFIG) as journal:
        for number in range(count):
            journal.append(*record(number))
            sizes.append(path.stat().st_size)
    return sizes


def numbers(path: Path) -> list[int]:
    found = Journal(path, CONFIG).read()
    for header, content in found:
        expected = record(header["number"])[1]["activation"]
        np.testing.assert_array_equal(content["activation"], expected)
    return [header["number"] for header, _ in found]


def assert_same(found: list[Record], expected: list[Record]) -> None:
    assert [header for header, _ in found] == [header for header, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].shape == theirs[name].shape
            assert ours[name].tobytes() == theirs[name].tobytes()  # NaN payloads included
            assert ours[name].flags.writeable


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(records, max_size=4), reopen_after=st.integers(0, 4))
def test_round_trip(tmp_path: Path, content: list[Record], reopen_after: int) -> None:
    journal = Journal(tmp_path / "shard.journal", CONFIG)
    journal.delete()
    for index, (header, named) in enumerate(content):
        if index == reopen_after:
            journal.close()
        journal.append(header, named)
    assert_same(journal.read(), content)
    journal.close()
    assert_same(Journal(journal.path, CONFIG).read(), content)


def test_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    named = {"t": base.T, "step": base[:, ::2], "big": base.astype(">f4")}
    with Journal(tmp_path / "j", CONFIG) as journal:
        journal.append({}, named)
        (_, found), *_ = journal.read()
    for name, array in named.items():
        np.testing.assert_array_equal(found[name], array)


def test_absent_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "absent", CONFIG)
    assert journal.read() == []
    journal.delete()
    assert list(tmp_path.iterdir()) == []


def test_delete_then_start_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j"
    write(path, 2)
    with Journal(path, CONFIG) as journal:
        journal.append(*record(7))
        journal.delete()
        assert not path.exists()
        journal.append(*record(8))
    assert numbers(path) == [8]


def test_tail_torn_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "j"
    sizes = write(path, 3)
    whole = path.read_bytes()
    for size in range(sizes[1], sizes[2]):
        path.write_bytes(whole[:size])
        assert numbers(path) == [0, 1]
        assert path.stat().st_size == sizes[1]


def test_append_to_a_tail_torn_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "j"
    sizes = write(path, 2)
    whole = path.read_bytes()
    for size in range(sizes[0], sizes[1]):
        path.write_bytes(whole[:size])
        with Journal(path, CONFIG) as journal:
            journal.append(*record(5))
        assert numbers(path) == [0, 5]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(records, min_size=1, max_size=3), data=st.data())
def test_any_truncation_keeps_the_records_before_it(tmp_path: Path, content: list[Record], data: Any) -> None:
    journal = Journal(tmp_path / "j", CONFIG)
    journal.delete()
    sizes = []
    for header, named in content:
        journal.append(header, named)
        sizes.append(journal.path.stat().st_size)
    journal.close()
    first = len(_preamble(tmp_path))
    cut = data.draw(st.integers(first, sizes[-1]))
    os.truncate(journal.path, cut)
    assert_same(journal.read(), content[: sum(size <= cut for size in sizes)])


def _preamble(folder: Path) -> bytes:
    with Journal(folder / "first", CONFIG) as journal:
        journal.append({}, {})
        journal.append({}, {})
    data = (folder / "first").read_bytes()
    (folder / "first").unlink()
    marker = data[:8]
    return data[: data.index(marker, 1)]


def test_zeros_after_a_power_cut_are_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "j"
    sizes = write(path, 3)
    whole = path.read_bytes()
    for start in range(sizes[1], sizes[2], 7):
        path.write_bytes(whole[:start] + bytes(len(whole) - start + 100))
        assert numbers(path) == [0, 1]


def test_every_flipped_byte_in_the_middle_is_refused_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "j"
    sizes = write(path, 3)
    whole = path.read_bytes()
    for position in range(sizes[0], sizes[1]):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=f"damaged at byte offset {sizes[0]}, .* Delete that file"):
            Journal(path, CONFIG).read()
        assert path.read_bytes() == damaged, "damage is for the user to see, never cut off"
        with pytest.raises(StorageError):
            Journal(path, CONFIG).append(*record(9))


def test_other_config_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, 2)
    before = path.read_bytes()
    other = Journal(path, "beef")
    for action in (other.read, lambda: other.append(*record(0))):
        with pytest.raises(RunConflict, match=r"another configuration: it holds config c0ffee, this run is beef"):
            action()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(500)])
def test_a_file_that_is_no_journal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="is not a journal"):
        Journal(path, CONFIG).read()
    assert path.read_bytes() == content


def test_second_writer_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, CONFIG) as ours, Journal(path, CONFIG) as theirs:
        ours.append(*record(0))
        theirs.append(*record(1))
        with pytest.raises(StorageError, match="running twice"):
            ours.append(*record(2))
    assert numbers(path) == [0, 1]


def test_programming_errors_write_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", CONFIG) as journal:
        journal.append(*record(0))
        with pytest.raises(NonFiniteError, match=r"\$\.header\.loss"):
            journal.append({"loss": float("nan")}, {})
        with pytest.raises(TypeError, match="'names' has dtype"):
            journal.append({}, {"names": np.array(["a"])})
    assert numbers(tmp_path / "j") == [0]


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(descriptor)
        fsync(descriptor)

    with Journal(tmp_path / "j", CONFIG) as journal:
        journal.append(*record(0))
        monkeypatch.setattr(os, "fsync", spy)
        journal.append(*record(1))
        assert synced == []
        journal.append(*record(2), sync=True)
        assert len(synced) == 1
        journal.sync()
        assert len(synced) == 2


def test_record_that_does_not_fit_is_recovered_from(
    tmp_path: Path, file_size_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "j"
    (size,) = write(path, 1)
    with Journal(path, CONFIG) as journal:
        journal.append(*record(1))
        with file_size_limit(size + 150), pytest.raises(StorageError, match="File too large"):
            journal.append({"number": 2}, {"activation": np.zeros(1000, np.float32)})
        journal.append(*record(3))
    assert numbers(path) == [0, 1, 3]


def test_full_disk(tiny_disk: Path) -> None:
    path = tiny_disk / "j"
    filler = tiny_disk / "filler"
    filler.write_bytes(bytes(40_000))
    with Journal(path, CONFIG) as journal:
        journal.append(*record(0), sync=True)
        with pytest.raises(StorageError, match=r"No space left on device\. Free space on"):
            journal.append({}, {"activation": np.zeros(20_000, np.float32)}, sync=True)
        filler.unlink()
        journal.append(*record(1), sync=True)
    assert numbers(path) == [0, 1]


KILLED_WRITER = """
import sys
from pathlib import Path
import numpy as np
from persona_axis.files.journal import Journal
journal = Journal(Path(sys.argv[1]) / "j", "c0ffee")
start = len(journal.read())
for number in range(start, start + 1_000_000):
    journal.append({"number": number}, {"x": np.full(200_000, number, np.float32)}, sync=number % 3 == 0)
    print("done", number, flush=True)
"""


def test_killed_writer_loses_nothing_that_was_appended(tmp_path: Path, run_and_kill: Callable[..., int]) -> None:
    path = tmp_path / "j"
    for seed in range(5):
        done = run_and_kill(KILLED_WRITER, tmp_path, seed)
        found = Journal(path, CONFIG).read()
        assert [header["number"] for header, _ in found] == list(range(len(found)))
        assert len(found) in (done + 1, done + 2)
        for header, named in found:
            assert (named["x"] == header["number"]).all()
