"""Pushing: which files go, as one commit, to whom; what is refused."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from artifacts import AXIS_FILES, POLICY_FILES, SECRET, contents, make_run
from fake_hub import READ, Blob, FakeHub, Repository

from persona_axis.errors import StorageError, UsageError
from persona_axis.hub.push import plan_push, push

REPO = "me/axis"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own call


def test_a_run_is_one_commit_of_the_listed_files_bit_for_bit(hub: FakeHub, run_folder: Path) -> None:
    done = push(run_folder, REPO)
    assert len(hub.commit_lines) == 1
    head = hub.repos[REPO].head
    assert (done.commit, done.url) == (head.oid, f"{hub.url}/{REPO}/commit/{head.oid}")
    assert done.changed
    there = {name: blob.data for name, blob in head.files.items() if name != ".gitattributes"}
    here = contents(run_folder)
    assert sorted(there) == sorted([*AXIS_FILES, *POLICY_FILES, "README.md"])
    assert all(there[name] == here[name] for name in there if name != "README.md")
    assert done.sizes == {name: len(data) for name, data in there.items()}
    assert all(blob.large == name.endswith(".safetensors") for name, blob in head.files.items())


def test_no_text_leaves_the_machine(hub: FakeHub, run_folder: Path) -> None:
    push(run_folder, REPO)
    sent = b"".join(blob.data for blob in hub.repos[REPO].head.files.values())
    assert SECRET.encode() not in sent
    assert b"/home/me" not in sent


def test_the_plan_is_what_is_sent_and_asks_nothing(hub: FakeHub, run_folder: Path) -> None:
    plan = plan_push(run_folder, REPO)
    assert hub.requests == []
    done = push(run_folder, REPO)
    assert plan.sizes == done.sizes
    assert hub.repos[REPO].head.files["README.md"].data == plan.card.encode()


def test_the_same_again_makes_no_commit(hub: FakeHub, run_folder: Path) -> None:
    first = push(run_folder, REPO)
    again = push(run_folder, REPO)
    assert not again.changed
    assert again.commit == first.commit
    assert len(hub.commit_lines) == 1


def test_a_file_that_the_folder_lost_goes_and_others_stay(hub: FakeHub, run_folder: Path, tmp_path: Path) -> None:
    push(run_folder, REPO)
    repo = hub.repos[REPO]
    repo.commit({**repo.head.files, "notes.txt": Blob(b"mine", False)}, "notes")
    done = push(make_run(tmp_path / "other", policy=False, seed=1), REPO)
    files = hub.repos[REPO].head.files
    assert sorted(files) == sorted([*AXIS_FILES, "README.md", ".gitattributes", "notes.txt"])
    assert done.changed


@pytest.mark.parametrize("inside", ["calibration/policy", "calibration"])
def test_a_policy_alone_is_laid_out_as_in_a_run(hub: FakeHub, run_folder: Path, inside: str) -> None:
    done = push(run_folder / inside, REPO)
    assert set(done.sizes) == {*POLICY_FILES[1:], "README.md"}


def test_a_private_repository_is_made_private(hub: FakeHub, run_folder: Path) -> None:
    push(run_folder, REPO, private=True)
    assert hub.repos[REPO].private
    push(run_folder, "me/open")
    assert not hub.repos["me/open"].private
    push(run_folder, REPO)  # stays so
    assert hub.repos[REPO].private


def test_private_is_never_a_promise_about_a_public_repository(hub: FakeHub, run_folder: Path) -> None:
    push(run_folder, REPO)
    shutil.rmtree(run_folder / "calibration")
    with pytest.raises(UsageError, match="is public"):
        push(run_folder, REPO, private=True)
    assert len(hub.commit_lines) == 1


def test_a_branch(hub: FakeHub, run_folder: Path, tmp_path: Path) -> None:
    push(run_folder, REPO)
    repo = hub.repos[REPO]
    repo.branches["next"] = main = repo.head.oid
    other = make_run(tmp_path / "other", seed=1)
    done = push(other, REPO, revision="next", message="A better axis")
    assert repo.branches == {"main": main, "next": done.commit}
    assert repo.commits[-1].message == "A better axis"
    with pytest.raises(UsageError, match="no revision 'nextt'"):
        push(other, REPO, revision="nextt")
    with pytest.raises(UsageError, match="does not exist yet"):
        push(other, "me/other", revision="next")
    assert "me/other" not in hub.repos


def test_a_commit_in_between_is_not_overwritten(hub: FakeHub, run_folder: Path, tmp_path: Path) -> None:
    push(run_folder, REPO)
    repo = hub.repos[REPO]

    def someone_else(method: str, path: str) -> None:
        if "/commit/" in path:
            repo.commit({**repo.head.files, "theirs.txt": Blob(b"new", False)}, "theirs")

    hub.before = someone_else
    with pytest.raises(StorageError, match=r"changed at the same time.*run the same command again"):
        push(make_run(tmp_path / "other", seed=1), REPO)
    assert repo.commits[-1].message == "theirs"


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_a_folder_without_axis_and_policy(hub: FakeHub, run_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_folder / "fit")
    shutil.rmtree(run_folder / "calibration")
    with pytest.raises(UsageError, match="holds neither an axis"):
        push(run_folder, REPO)
    with pytest.raises(UsageError, match="is not a folder"):
        push(tmp_path / "nothing", REPO)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["fit/axis.safetensors", "fit/fit.json", "calibration/policy/policy.safetensors"])
def test_a_damaged_file_is_not_shared(hub: FakeHub, run_folder: Path, name: str) -> None:
    file = run_folder / name
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(StorageError, match=Path(name).name):
        push(run_folder, REPO)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["axis", "me/axis/again", "me/", "", "me/an axis"])
def test_names_of_repositories(hub: FakeHub, run_folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        push(run_folder, name)


def test_without_a_token(hub: FakeHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="HF_TOKEN, or run: hf auth login"):
        push(run_folder, REPO)
    assert hub.requests == []


def test_a_token_that_is_unknown_or_may_not_write(hub: FakeHub, run_folder: Path) -> None:
    with pytest.raises(UsageError, match="refuses the token"):
        push(run_folder, REPO, token="hf_wrong")
    with pytest.raises(UsageError, match="may not do this to me/axis"):
        push(run_folder, REPO, token=READ)
    hub.repos[REPO] = Repository()
    hub.repos[REPO].commit({}, "initial commit")
    with pytest.raises(UsageError, match="may not do this to me/axis"):
        push(run_folder, REPO, token=READ)
    assert hub.repos[REPO].head.files == {}


def test_an_upload_that_fails_leaves_no_commit(hub: FakeHub, run_folder: Path) -> None:
    hub.status["/info/lfs"] = 418
    with pytest.raises(StorageError, match=r"refuses \(HTTP 418\)"):
        push(run_folder, REPO)
    assert hub.commit_lines == []


def test_no_network(hub: FakeHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(StorageError, match=f"Cannot reach {nowhere}"):
        push(run_folder, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        push(run_folder, REPO)


def test_a_bug_keeps_its_traceback(hub: FakeHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(HfApi, "create_commit", broken)
    with pytest.raises(ZeroDivisionError):
        push(run_folder, REPO)
