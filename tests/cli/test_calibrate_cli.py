"""``calibrate``: what it prints and how it ends, what it refuses, and a process killed in the middle of it."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forkserver import Forkserver
from tiny_runs import open_run

from persona_axis.cli.calibrate import parse_numbers
from persona_axis.errors import UsageError
from persona_axis.files.journal import Journal
from persona_axis.steering import calibration
from persona_axis.steering.policy import Policy
from persona_axis.study.ledger import PLAIN
from tests.cli.conftest import Invoke

SMALL = ["--layers", "0-3", "--widths", "2", "--percentiles", "25,75", "--prompts", "20"]
SMALL += ["--neutral-replies", "9", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on two threads of a busy machine wait longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(halvable_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halvable_run, tmp_path / "run"))


# ---- what it prints ----------------------------------------------------------------------------------------------


def test_layers_that_were_not_captured(invoke: Invoke, run: Path) -> None:
    ended = invoke("calibrate", run, "--layers", "0-9")
    assert ended.code == 2
    assert ended.message == "This axis has no layer 4; it has 0, 1, 2, 3."


def test_a_choice(invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        calibration, "NEUTRAL_PERPLEXITY", 1e6
    )  # a random model's replies are hardly ever likely without their prompts
    ended = invoke("calibrate", run, *SMALL)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("chosen      layers ")
    assert "toward the Assistant (the paper's p0." in ended.out
    assert "4 of 6 candidates met every prompt" in ended.out
    assert str(run / "calibration" / "policy") in ended.out
    assert max(map(len, ended.out.splitlines())) <= max(100, len(str(run)) + 40)
    assert (run / "calibration" / "calibration.html").stat().st_size > 10_000
    again = invoke("calibrate", run, *SMALL, "--json")
    record = json.loads(again.out)
    assert record == json.loads((run / "calibration" / "calibration.json").read_text())
    assert Policy.load(run).content_hash == record["chosen"]["policy_hash"]
    # What was chosen is what holds the model.
    held = invoke("cap", run, "--device", "cpu", "--max-tokens", "4", "--json", "Who are you?")
    assert held.code == 0, held.err
    assert json.loads(held.out.splitlines()[1])["intervention"]["policy"] == record["chosen"]["policy_hash"]


def test_nothing_fluent_is_partial(invoke: Invoke, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "EMPTY_POINTS", -2)  # every reply would be too empty
    ended = invoke("calibrate", run, *SMALL)
    assert ended.code == 3
    assert ended.message.startswith("No candidate of the last round writes fluent replies")
    assert ended.out.startswith("chosen      nothing: no candidate")
    assert json.loads((run / "calibration" / "calibration.json").read_text())["chosen"] is None
    assert (run / "calibration" / "calibration.html").exists()
    assert not (run / "calibration" / "policy").exists()


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--percentiles", "0,50"], "--percentiles: percentiles lie between 0 and 100"),
        (["--percentiles", "100"], "--percentiles: percentiles lie between"),
        (["--percentiles", "nan"], "--percentiles: percentiles lie between"),
        (["--percentiles", "p25"], "--percentiles 'p25': expected numbers, like 50,75."),
        (["--percentiles", ""], "--percentiles '': expected numbers"),
        (["--widths", "four"], "--widths 'four': expected numbers and ranges"),
        (["--widths", "0"], "--widths: a window has at least one layer"),
        (["--stride", "0"], "--stride: "),
        (["--positions", "some"], "--positions: "),
        (["--prompts", "3"], "--prompts: "),
        (["--neutral-replies", "1"], "--neutral-replies: "),
        (["--max-perplexity", "1"], "--max-perplexity: "),
        (["--max-perplexity", "nan"], "--max-perplexity: "),
        (["--max-perplexity", "inf"], "--max-perplexity: "),
    ],
)
def test_an_option_that_cannot_be(invoke: Invoke, tmp_path: Path, words: list[str], said: str) -> None:
    """Before anything is read."""
    ended = invoke("calibrate", tmp_path, *words)
    assert ended.code == 2
    assert ended.message.startswith(said)
    assert "\n" not in ended.message


def test_numbers() -> None:
    assert parse_numbers("--percentiles", "50, 62.5") == (50.0, 62.5)
    with pytest.raises(UsageError, match="--percentiles '5,,6'"):
        parse_numbers("--percentiles", "5,,6")


def test_a_folder_without_a_run(invoke: Invoke, tmp_path: Path) -> None:
    ended = invoke("calibrate", tmp_path / "none")
    assert ended.code == 2
    assert "holds no run (no run.json)" in ended.message
    assert not (tmp_path / "none").exists()


def test_a_run_that_is_not_finished(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    open_run(tmp_path / "planned")
    ended = invoke("calibrate", tmp_path / "planned")
    assert (ended.code, "is not finished: it has no axis yet" in ended.message) == (2, True)
    shutil.rmtree(run / "judge")
    ended = invoke("calibrate", run)
    assert (ended.code, "154 rollouts have no verdict" in ended.message) == (2, True)
    assert not (run / "calibration").exists()


def test_another_model_in_its_folder(invoke: Invoke, run: Path) -> None:
    facts = json.loads((run / "facts" / "model.json").read_text())
    (run / "facts" / "model.json").write_text(json.dumps({**facts, "revision": "another"}))
    ended = invoke("calibrate", run)
    assert ended.code == 1
    assert "at revision another" in ended.message


def test_traffic_that_is_not_there(invoke: Invoke, run: Path) -> None:
    ended = invoke("calibrate", run, *SMALL, "--neutral", run / "none.jsonl")
    assert ended.code == 2
    assert "no such file or folder" in ended.message


# ---- killed ------------------------------------------------------------------------------------------------------


def journalled(run: Path) -> Counter[str]:
    """Figures of held models that are on disk: replies and neutral ones, read as a resume would."""
    found: Counter[str] = Counter()
    for file in (run / "calibration").glob("measured-*.journal"):
        copy = Path(shutil.copy(file, run.with_name("journal.copy")))  # reading cuts a torn tail off
        data, start = copy.read_bytes(), file.stem.split("-")[-1].encode()  # the file's name ends as its hash begins
        identity = data[data.index(start) :][:64].decode()
        for record, _ in Journal(copy, identity).read():
            if record["policy"] != PLAIN:
                found["replies"] += len(record["replies"])
                found["neutral"] += len(record["neutral"])
    return found


def replies_of(trace: Path) -> list[str]:
    lines = trace.read_text().split("\n")[:-1] if trace.exists() else []
    return [line for line in lines if line.startswith("reply ") and not line.startswith("reply check-")]


def test_killed_and_gone_on(processes: Forkserver, run: Path, tmp_path: Path) -> None:
    """Three times at any moment: nothing that is on disk is measured again, and the end is the same byte for byte."""
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    process = processes.start("calibrate", whole, *SMALL, trace=tmp_path / "trace")
    code = process.wait()
    assert code in (0, 3), process.err  # whether anything is fluent is another test's business
    needed = len(replies_of(tmp_path / "trace"))
    assert needed == journalled(whole)["replies"]
    moments, there = random.Random(0), journalled(run)
    for n in range(3):
        process = processes.start("calibrate", run, *SMALL, pause=0.05, trace=tmp_path / f"trace{n}")
        process.wait_for(lambda there=there: journalled(run).total() > there.total())
        time.sleep(moments.uniform(0, 0.3))
        assert process.kill() == -signal.SIGKILL
        now, made = journalled(run), len(replies_of(tmp_path / f"trace{n}"))
        assert there <= now
        assert 0 <= made - (now - there)["replies"] <= 20  # lost: of one candidate in one round
        there = now
    assert 0 < there["replies"] < needed
    process = processes.start("calibrate", run, *SMALL, trace=tmp_path / "last")
    assert process.wait() == code, process.err
    assert len(replies_of(tmp_path / "last")) == needed - there["replies"]
    assert journalled(run) == journalled(whole)
    mine, other = ((folder / "calibration" / "calibration.json").read_bytes() for folder in (run, whole))
    assert mine == other
    assert not list(run.rglob("*.tmp"))
