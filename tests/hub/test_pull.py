"""Pulling: whole, checked, from one commit, or nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import contents_of_pull as pulled
from artifacts import leftovers, make_axis, make_run
from fake_hub import READ, Blob, FakeHub, Harm, Repository

from persona_axis.errors import RunConflict, StorageError, UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.hub import pull as pull_module
from persona_axis.hub.pull import Source, pull, read_source
from persona_axis.hub.push import push
from persona_axis.steering.policy import Policy

REPO = "me/axis"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own call


@pytest.fixture
def shared(hub: FakeHub, run_folder: Path) -> Repository:
    """The run, pushed."""
    push(run_folder, REPO)
    hub.requests.clear()
    return hub.repos[REPO]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pulled" / "axis"


# ---- what arrives ------------------------------------------------------------------------------------------------


def test_the_round_trip_is_bit_for_bit(shared: Repository, out: Path) -> None:
    assert pull(REPO, out) == out
    assert pulled(out) == {name: b.data for name, b in shared.head.files.items() if name != ".gitattributes"}
    assert leftovers(out) == []


def test_it_works_where_a_run_folder_does(shared: Repository, out: Path, run_folder: Path) -> None:
    pull(REPO, out)
    axis, policy = Axis.load(out), Policy.load(out)
    assert torch.equal(axis.vectors, make_axis().vectors)
    assert axis.metadata == make_axis().metadata
    assert policy.content_hash == Policy.load(run_folder).content_hash
    assert push(out, "me/mirror").sizes.keys() == pulled(out).keys()


def test_a_policy_alone(hub: FakeHub, run_folder: Path, out: Path) -> None:
    push(run_folder / "calibration" / "policy", REPO)
    pull(REPO, out)
    assert Policy.load(out).content_hash == Policy.load(run_folder).content_hash
    assert not (out / "fit").exists()


def test_where_it_came_from_is_recorded(hub: FakeHub, shared: Repository, out: Path) -> None:
    pull(REPO, out)
    source = read_source(out)
    digests = {name: blob.sha256 for name, blob in shared.head.files.items() if name != ".gitattributes"}
    assert source == Source(REPO, shared.head.oid, hub.url, digests)


def test_only_known_names_are_asked_for(hub: FakeHub, shared: Repository, out: Path) -> None:
    strange = {"../outside": b"x", "fit/evil.py": b"x", "source.json": b"{}", "report.html": b"<script>"}
    shared.commit({**shared.head.files, **{name: Blob(data, False) for name, data in strange.items()}}, "strange")
    pull(REPO, out)
    assert not set(strange) & set(pulled(out))
    assert not any(name in path for _, path in hub.requests for name in ("outside", "evil", "report"))


@pytest.mark.parametrize("by", ["branch", "commit"])
def test_a_revision(shared: Repository, out: Path, tmp_path: Path, by: str) -> None:
    old = shared.head
    shared.branches["old"] = old.oid
    push(make_run(tmp_path / "other", seed=1), REPO)
    pull(REPO, out, revision="old" if by == "branch" else old.oid)
    assert read_source(out).commit == old.oid
    assert torch.equal(Axis.load(out).vectors, make_axis().vectors)
    with pytest.raises(UsageError, match="no revision 'older'"):
        pull(REPO, tmp_path / "another", revision="older")


def test_everything_comes_from_one_commit(hub: FakeHub, shared: Repository, out: Path, tmp_path: Path) -> None:
    old, other = shared.head, make_run(tmp_path / "other", seed=1)
    changed = {name: Blob((other / name).read_bytes(), True) for name in old.files if name.endswith("axis.safetensors")}

    def meanwhile(method: str, path: str) -> None:
        if "/resolve/" in path and shared.head is old:
            shared.commit({**old.files, **changed}, "meanwhile")

    hub.before = meanwhile
    pull(REPO, out)
    assert shared.head is not old
    assert read_source(out).commit == old.oid
    assert torch.equal(Axis.load(out).vectors, make_axis().vectors)


# ---- the target --------------------------------------------------------------------------------------------------


def test_the_same_again_downloads_nothing(hub: FakeHub, shared: Repository, out: Path) -> None:
    pull(REPO, out)
    hub.requests.clear()
    assert pull(REPO, out) == out
    assert hub.count("GET", "/resolve/") == 0
    hub.requests.clear()
    pull(REPO, out, revision=shared.head.oid)  # a commit never changes
    assert hub.requests == []


def test_a_newer_commit_does_not_replace_what_is_there(shared: Repository, out: Path, tmp_path: Path) -> None:
    pull(REPO, out)
    before = pulled(out)
    push(make_run(tmp_path / "other", seed=1), REPO)
    with pytest.raises(RunConflict, match=f"is now {shared.head.oid}"):
        pull(REPO, out)
    assert pulled(out) == before


def test_other_content_stays(hub: FakeHub, shared: Repository, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(RunConflict, match=r"not empty and was not pulled \(it has mine.txt\)"):
        pull(REPO, out)
    assert hub.requests == []
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_file_that_was_changed_is_other_content(shared: Repository, out: Path) -> None:
    pull(REPO, out)
    (out / "fit" / "axis.safetensors").write_bytes(b"mine")
    with pytest.raises(RunConflict, match=r"axis\.safetensors is not what was pulled"):
        pull(REPO, out)
    with pytest.raises(RunConflict, match=f"holds {REPO} of"):
        pull("me/other", out)


def test_an_empty_folder_and_a_link_to_one_are_free(shared: Repository, out: Path, tmp_path: Path) -> None:
    out.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(out)
    pull(REPO, link)
    assert link.is_symlink()
    assert Axis.load(out).layer == 2


def test_places_that_cannot_be_renamed_to(
    shared: Repository, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out.mkdir(parents=True)
    monkeypatch.chdir(out)
    with pytest.raises(UsageError, match="the current folder"):
        pull(REPO, ".")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        pull(REPO, tmp_path / "file" / "below")


def test_a_target_that_fills_meanwhile_stays(hub: FakeHub, shared: Repository, out: Path) -> None:
    def meanwhile(method: str, path: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "mine.txt").write_text("mine")

    hub.before = meanwhile
    with pytest.raises(RunConflict, match="filled by something else"):
        pull(REPO, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert leftovers(out) == []


# ---- downloads that go wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("short", "broke off"),
        ("corrupt", "did not arrive as it is at commit"),
        ("unlisted", "lacks a file that it lists"),
    ],
)
@pytest.mark.parametrize("name", ["fit/axis.safetensors", "summary.json"])
def test_a_download_that_goes_wrong(
    hub: FakeHub, shared: Repository, out: Path, harm: Harm, said: str, name: str
) -> None:
    hub.harm[name] = harm
    with pytest.raises(StorageError, match=said):
        pull(REPO, out)
    assert not out.exists()
    assert leftovers(out) == []
    hub.harm.clear()
    pull(REPO, out)
    assert pulled(out)[name] == shared.head.files[name].data


def test_a_connection_that_breaks_is_taken_up_again(
    hub: FakeHub, shared: Repository, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.harm["fit/axis.safetensors"] = "torn once"
    pull(REPO, out)
    assert hub.count("GET", "resolve/" + shared.head.oid + "/fit/axis.safetensors") == 2
    assert torch.equal(Axis.load(out).vectors, make_axis().vectors)


@pytest.mark.parametrize("name", ["fit/axis.safetensors", "calibration/policy/policy.json", "fit/fit.json"])
def test_what_does_not_load_does_not_appear(shared: Repository, out: Path, name: str) -> None:
    blob = shared.head.files[name]
    shared.commit({**shared.head.files, name: Blob(b"{", blob.large)}, "broken")
    with pytest.raises(StorageError, match=f"{shared.head.oid} does not load: .*{Path(name).name}") as raised:
        pull(REPO, out)
    assert ".tmp" not in str(raised.value)
    assert not out.exists()
    assert leftovers(out) == []


def test_an_axis_of_a_strange_form_does_not_appear(shared: Repository, out: Path) -> None:
    from safetensors.torch import save

    header = {"persona_axis": json.dumps({"format": "persona-axis/axis/1"})}  # neither layers nor layer
    strange = save({"axis": torch.zeros(1, 2)}, header)
    shared.commit({"fit/axis.safetensors": Blob(strange, True)}, "strange")
    with pytest.raises(StorageError, match="does not load"):
        pull(REPO, out)
    assert not out.exists()


def test_a_full_disk(shared: Repository, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pull_module.os, "replace", full)
        with pytest.raises(StorageError, match=r"No space left.*Free space on"):
            pull(REPO, out)
    assert not out.exists()
    assert leftovers(out) == []
    pull(REPO, out)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_repositories_that_are_not_there_or_not_for_us(
    hub: FakeHub, shared: Repository, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"me/none is not on .* HF_TOKEN"):
        pull("me/none", out)
    with pytest.raises(UsageError, match="OWNER/NAME"):
        pull("axis", out)
    with pytest.raises(UsageError, match="refuses the token"):
        pull(REPO, out, token="hf_wrong")
    shared.gated = True
    with pytest.raises(UsageError, match=r"is gated\. Ask for access at"):
        pull(REPO, out, token=READ)
    shared.gated, shared.private = False, True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="HF_TOKEN, or run: hf auth login"):
        pull(REPO, out)
    assert not out.exists()
    pull(REPO, out, token=READ)


def test_a_repository_of_something_else(hub: FakeHub, out: Path) -> None:
    hub.repos["you/model"] = repo = Repository()
    repo.commit({"model.safetensors": Blob(b"weights", True), "README.md": Blob(b"A model", False)}, "all")
    with pytest.raises(UsageError, match=r"holds no axis .* and no policy"):
        pull("you/model", out)
    assert hub.count("GET", "/resolve/") == 0


@pytest.mark.parametrize(("status", "said"), [(503, "in trouble"), (429, "slow down"), (418, "refuses")])
def test_a_hub_in_trouble(hub: FakeHub, shared: Repository, out: Path, status: int, said: str) -> None:
    hub.status["/api/models"] = status
    with pytest.raises(StorageError, match=said):
        pull(REPO, out)


def test_an_endpoint_that_is_no_hub(hub: FakeHub, out: Path) -> None:
    hub.page = True
    with pytest.raises(StorageError, match=r"does not answer like the Hub .* Check HF_ENDPOINT"):
        pull(REPO, out)


def test_no_network(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    with pytest.raises(StorageError, match=f"Cannot reach {nowhere}"):
        pull(REPO, out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        pull(REPO, out)


# ---- kill --------------------------------------------------------------------------------------------------------


def start_pull(out: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    code = "import sys; from persona_axis.hub.pull import pull; pull(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, REPO, str(out)], env=environment)


@pytest.mark.parametrize("name", ["fit/axis.safetensors", "calibration/policy/policy.json"])
def test_a_killed_pull_leaves_nothing_that_looks_whole(
    hub: FakeHub, shared: Repository, out: Path, environment: dict[str, str], name: str
) -> None:
    shared.private = True  # the process honours HF_ENDPOINT and HF_TOKEN
    hub.harm[name] = "stalled"
    process = start_pull(out, environment)
    try:
        assert hub.stalled.wait(20)
        assert process.poll() is None
        hub.harm.clear()
        other = out.with_name("other")
        pull(REPO, other)  # a pull elsewhere, or to the same place, leaves a running one alone
        [hidden] = leftovers(out)
        assert pull_module._stale(out.resolve()) == []
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert not out.exists()
    assert not (hidden / "source.json").exists()
    assert pull_module._stale(out.resolve()) == [hidden]
    pull(REPO, out)
    assert leftovers(out) == []
    assert pulled(out) == pulled(other)


def test_an_interrupted_pull_cleans_up(
    hub: FakeHub, shared: Repository, out: Path, environment: dict[str, str]
) -> None:
    hub.harm["fit/axis.safetensors"] = "stalled"
    process = start_pull(out, environment)
    try:
        assert hub.stalled.wait(20)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    finally:
        process.kill()
    assert not out.exists()
    assert leftovers(out) == []
