"""A reader sees the old content or the new one; errors say what to do; nothing is left lying about."""

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from persona_axis.errors import NonFiniteError, StorageError
from persona_axis.files.atomic import (
    read_json,
    remove_stale_temps,
    replace_atomic,
    write_atomic,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.bin"]


def test_result_has_the_mode_of_an_ordinary_file(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    write_atomic(tmp_path / "ours", b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_syncs_file_before_rename_and_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomic(tmp_path / "file", b"x")
    assert steps == ["file", "rename", "folder"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.EMFILE, "many")])
def test_failed_block_keeps_the_old_content_and_its_exception(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def write_half() -> None:
        with replace_atomic(path) as temp:
            temp.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_disk_errors_name_path_reason_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(StorageError) as caught:
        write_atomic(path, b"new")
    message = str(caught.value)
    assert str(path) in message
    assert os.strerror(number) in message
    assert "run the same command again; nothing finished is lost" in message
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_full_disk(tiny_disk: Path) -> None:
    path = tiny_disk / "file"
    write_atomic(path, b"old")
    with pytest.raises(StorageError, match=rf"No space left on device\. Free space on {tiny_disk}"):
        write_atomic(path, b"x" * 200_000)
    assert path.read_bytes() == b"old"
    assert names(tiny_disk) == ["file"]


def test_file_over_the_size_limit(
    tmp_path: Path, file_size_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with file_size_limit(1000), pytest.raises(StorageError, match="ulimit"):
        write_atomic(path, b"x" * 2000)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


KILLED_WRITER = """
import sys
from pathlib import Path
from persona_axis.files.atomic import write_atomic
for number in range(1_000_000):
    write_atomic(Path(sys.argv[1]) / "file", number.to_bytes(4, "big") * 200_000)
    print("done", number, flush=True)
"""


def test_killed_writer_leaves_a_whole_file(tmp_path: Path, run_and_kill: Callable[..., int]) -> None:
    path = tmp_path / "file"
    for seed in range(5):
        done = run_and_kill(KILLED_WRITER, tmp_path, seed)
        data = path.read_bytes()
        number = int.from_bytes(data[:4], "big")
        assert data == data[:4] * 200_000
        assert number in (done, done + 1)
        remove_stale_temps(tmp_path)
        assert names(tmp_path) == ["file"]


def test_stale_temps_go_and_nothing_else(tmp_path: Path) -> None:
    stale = tmp_path / ".rows.parquet.0a1b2c3d.tmp"
    kept = ["rows.parquet", ".hidden", "mine.tmp", ".rows.parquet.tmp", "rows.0a1b2c3d.tmp"]
    for name in [stale.name, *kept]:
        (tmp_path / name).write_bytes(b"x")
    assert remove_stale_temps(tmp_path) == [stale]
    assert names(tmp_path) == sorted(kept)
    assert remove_stale_temps(tmp_path / "absent") == []


def test_temp_names_are_recognised(tmp_path: Path) -> None:
    with replace_atomic(tmp_path / "rows.parquet") as temp:
        assert temp.name.startswith(".rows.parquet.")
        assert remove_stale_temps(tmp_path) == [temp]
        temp.write_bytes(b"again")


def test_json_round_trip_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    content = {"role": "bardé", "layers": [1, 2.5, None], "deep": {"yes": True}}
    write_json(path, content)
    assert read_json(path) == content
    assert '  "role": "bardé",\n' in path.read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float64("nan")])
def test_json_refuses_nan_and_says_where(tmp_path: Path, value: float) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(NonFiniteError, match=r"run\.json: the value at \$\.layers\[1\]\.r is not finite"):
        write_json(path, {"layers": [{"r": 1.0}, {"r": value}]})
    assert not path.exists()


def test_json_reader_names_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for text in ['{"a": ', '{"a": NaN}', ""]:
        path.write_text(text)
        with pytest.raises(StorageError, match=r"run\.json is not valid JSON"):
            read_json(path)
    path.write_bytes(json.dumps("é", ensure_ascii=False).encode("latin-1"))
    with pytest.raises(StorageError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")
