"""``push`` and ``pull``: exit codes, one message that says what to do, results on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from artifacts import AXIS_FILES, POLICY_FILES, SECRET
from fake_hub import FakeHub
from hub_fixtures import environment, hub, run_folder

__all__ = ["environment", "hub", "run_folder"]

REPO = "me/axis"
Invoke = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own call of httpx


def test_push_then_pull(invoke: Invoke, hub: FakeHub, run_folder: Path, tmp_path: Path) -> None:
    pushed = invoke("push", run_folder, REPO, "--private", "--message", "Our axis")
    head = hub.repos[REPO].head
    assert (pushed.code, pushed.out) == (0, f"{hub.url}/{REPO}/commit/{head.oid}\n")
    assert head.message == "Our axis"
    assert hub.repos[REPO].private
    for name in (*AXIS_FILES, *POLICY_FILES, "README.md"):
        assert f"{len(head.files[name].data):,} bytes  {name}" in pushed.err
    out = tmp_path / "pulled"
    pulled = invoke("pull", REPO, "--out", out)
    assert (pulled.code, pulled.out) == (0, f"{out}\n")
    assert f"{REPO} at commit {head.oid}: " in pulled.err
    assert "no commit was made" in invoke("push", out, REPO).err or len(hub.commit_lines) == 2


def test_a_dry_run_prints_files_and_card(
    invoke: Invoke, hub: FakeHub, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    ended = invoke("push", run_folder, REPO, "--dry-run")
    assert ended.code == 0
    assert hub.requests == []
    for name in (*AXIS_FILES, *POLICY_FILES, "README.md"):
        assert f" bytes  {name}\n" in ended.out
    assert "\n\n---\nlibrary_name: persona-axis\n" in ended.out
    assert SECRET not in ended.out


@pytest.mark.parametrize("dry", [False, True])
def test_nothing_to_share(invoke: Invoke, tmp_path: Path, dry: bool) -> None:
    (tmp_path / "empty").mkdir()
    ended = invoke("push", tmp_path / "empty", REPO, *["--dry-run"] * dry)
    assert ended.code == 2
    assert "holds neither an axis" in ended.message


def test_mistakes(
    invoke: Invoke, hub: FakeHub, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = invoke("pull", "me/none", "--out", tmp_path / "new")
    assert (missing.code, missing.out) == (2, "")
    assert "me/none is not on" in missing.message
    taken = invoke("pull", REPO, "--out", run_folder)
    assert taken.code == 2
    assert "was not pulled" in taken.message
    hub.status["/api/models"] = 503
    down = invoke("pull", REPO, "--out", tmp_path / "new")
    assert down.code == 1
    assert "in trouble" in down.message
    monkeypatch.delenv("HF_TOKEN")
    nobody = invoke("push", run_folder, REPO)
    assert nobody.code == 2
    assert "hf auth login" in nobody.message
    assert not (tmp_path / "new").exists()


def test_a_token_is_no_option(invoke: Invoke, run_folder: Path) -> None:
    assert invoke("push", run_folder, REPO, "--token", "hf_x").code == 2


def test_a_changed_revision(invoke: Invoke, hub: FakeHub, run_folder: Path, tmp_path: Path) -> None:
    invoke("push", run_folder, REPO)
    old = hub.repos[REPO].head.oid
    (run_folder / "summary.json").unlink()
    invoke("push", run_folder, REPO)
    out = tmp_path / "pulled"
    assert invoke("pull", REPO, "--out", out, "--revision", old).code == 0
    newer = invoke("pull", REPO, "--out", out)
    assert newer.code == 2
    assert f"holds {REPO} at commit {old}" in newer.message
