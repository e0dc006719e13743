"""Real processes: interrupted and killed in every stage, then run to the end as if nothing had been."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_judge import JUDGE, FakeJudge
from forkserver import Forkserver, Process, wait_for
from tiny_runs import contents

from persona_axis.collect.judging import read_verdicts
from persona_axis.collect.rundir import RunDir, shard_name
from persona_axis.files.journal import Journal
from persona_axis.files.shards import open_arrays
from persona_axis.geometry.axis import Axis

ROLLOUTS = 56
SLOW = ["--batch-tokens", "480"]  # about so many sequences at a time

Start = Callable[..., Process]


@pytest.fixture(scope="session")
def whole(processes: Forkserver, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = processes.start("run", "--out", out, *options)
    assert process.wait() == 0, process.err
    return out


@pytest.fixture
def start(processes: Forkserver, options: list[str], tmp_path: Path) -> Start:
    def begin(*more: str, **extra: Any) -> Process:
        return processes.start("run", "--out", tmp_path / "run", *options, *more, **extra)

    return begin


def journalled(run: Path, stage: str) -> dict[str, str | None]:
    """Keys (and texts) in the journals of a stage, read as a resume would; the files are left as they are."""
    config = json.loads((run / "run.json").read_text())["config_hash"]
    found: dict[str, str | None] = {}
    for file in (run / stage).glob("*.journal"):
        copy = Path(shutil.copy(file, run.with_name("journal.copy")))  # reading cuts a torn tail off
        found.update({header["key"]: header.get("text") for header, _ in Journal(copy, config).read()})
    return found


def traced(file: Path, what: str) -> list[str]:
    """Keys of the replies or verdicts that a process made."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    keys = [line.removeprefix(what + " ") for line in lines if line.startswith(what)]
    return [key for key in keys if not key.startswith("check-")]  # the self-check's


def has_records(run: Path, stage: str) -> bool:
    return any(file.stat().st_size > 2000 for file in (run / stage).glob("*.journal"))


def same_rollouts(run: Path, whole: Path) -> None:
    assert contents(run) == contents(whole)
    with open_arrays(run / "rollouts", shard_name(0)) as mine, open_arrays(whole / "rollouts", shard_name(0)) as other:
        assert np.allclose(mine.read("activations"), other.read("activations"), atol=1e-4)


def same_end(run: Path, whole: Path) -> None:
    """The same summary but for times, and the same axis."""
    mine, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    for name in ("rollouts", "tokens", "roles_low", "filter", "judge", "dropped", "config_hash"):
        assert mine[name] == other[name], name
    assert torch.allclose(Axis.load(run).vectors, Axis.load(whole).vectors, atol=1e-4)
    assert (run / "report.html").stat().st_size > 100_000
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("*.journal"))


def copied(whole: Path, run: Path, *without: str) -> None:
    """A folder in which only the later stages are left to do."""
    shutil.copytree(whole, run)
    for name in without:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


# ---- killed ------------------------------------------------------------------------------------------------------


def test_killed_while_generating(start: Start, whole: Path, tmp_path: Path) -> None:
    run, moments = tmp_path / "run", random.Random(1)
    made: list[str] = []
    there: set[str] = set()
    lost = 0
    for n in range(3):
        process = start(*SLOW, pause=0.01, trace=tmp_path / f"trace{n}")
        process.wait_for(lambda n=n: len(traced(tmp_path / f"trace{n}", "reply")) > 1 + 4 * n)
        time.sleep(moments.uniform(0, 0.12))
        assert process.kill() == -signal.SIGKILL
        mine = traced(tmp_path / f"trace{n}", "reply")
        now = set(journalled(run, "rollouts"))
        assert there <= now  # nothing that was there is lost
        assert not there & set(mine)  # or made again
        assert len(set(mine) - now) <= 1  # the one being written
        lost += len(set(mine) - now)
        there, made = now, made + mine
    assert 3 <= len(there) < ROLLOUTS
    last = start(trace=tmp_path / "last")
    assert last.wait() == 0, last.err
    made += traced(tmp_path / "last", "reply")
    assert len(made) == ROLLOUTS + lost
    assert f"rollouts: {ROLLOUTS - len(there)}/" in last.err
    same_rollouts(run, whole)
    same_end(run, whole)


def test_killed_while_judging(start: Start, whole: Path, tmp_path: Path) -> None:
    run, moments = tmp_path / "run", random.Random(2)
    copied(whole, run, "judge", "fit", "summary.json", "report.html", "facts/null.json")
    there: set[str] = set()
    for n in range(2):
        process = start(pause=0.01, trace=tmp_path / f"trace{n}")
        process.wait_for(lambda n=n: len(traced(tmp_path / f"trace{n}", "verdict")) > 1 + 4 * n)
        time.sleep(moments.uniform(0, 0.15))
        assert process.kill() == -signal.SIGKILL
        mine, now = set(traced(tmp_path / f"trace{n}", "verdict")), set(journalled(run, "judge/likelihood"))
        assert there < now
        assert not there & mine
        assert len(mine - now) <= 1
        there = now
    assert len(there) < ROLLOUTS
    last = start(trace=tmp_path / "last")
    assert last.wait() == 0, last.err
    assert not set(traced(tmp_path / "last", "verdict")) & there
    assert "rollouts:" not in last.err
    mine, other = (read_verdicts(RunDir.load(folder), "likelihood", 0) for folder in (run, whole))
    assert [(v.key, v.status) for v in mine] == [(v.key, v.status) for v in other]
    assert [v.evidence for v in mine] == [pytest.approx(v.evidence, abs=1e-4) for v in other]
    same_end(run, whole)


def test_killed_while_fitting(start: Start, whole: Path, tmp_path: Path) -> None:
    run, moments = tmp_path / "run", random.Random(3)
    copied(whole, run, "fit", "summary.json", "report.html")
    before = contents(run)
    killed = 0
    for _ in range(4):
        process = start()
        time.sleep(moments.uniform(0.02, 0.6))
        killed += process.kill() == -signal.SIGKILL
        for file in run.rglob("*.json"):
            json.loads(file.read_text())  # whole or absent
    assert killed
    last = start()
    assert last.wait() == 0, last.err
    assert "load model" not in last.err
    assert contents(run) == before
    assert json.loads((run / "fit" / "fit.json").read_text()) == json.loads((whole / "fit" / "fit.json").read_text())
    same_end(run, whole)


def test_killed_while_activations_are_folded(start: Start, whole: Path, tmp_path: Path) -> None:
    run, moments = tmp_path / "run", random.Random(4)
    killed = 0
    for _ in range(4):
        process = start("--keep", "none", pause=0.004)
        process.wait_for(lambda: (run / "rollouts").is_dir())
        time.sleep(moments.uniform(0.1, 1.2))
        killed += process.kill() == -signal.SIGKILL
    assert killed
    last = start("--keep", "none")
    assert last.wait() == 0, last.err
    assert contents(run) == contents(whole)
    assert not list((run / "rollouts").glob("*.safetensors"))
    folded = json.loads((run / "summary.json").read_text())
    kept = json.loads((whole / "summary.json").read_text())
    assert (folded["judge"], folded["filter"]) == (kept["judge"], kept["filter"])
    for name in ("*.tmp", "*.journal"):
        assert not list(run.rglob(name))


# ---- interrupted -------------------------------------------------------------------------------------------------


def test_control_c_says_so_and_the_same_command_goes_on(start: Start, options: list[str], tmp_path: Path) -> None:
    # A process started from scratch, as a user's shell does.
    run, more = tmp_path / "run", ["--max-tokens", "40"]
    script = "from persona_axis.cli.app import main; main()"
    command = [sys.executable, "-c", script, "run", "--out", str(run), *options, *more, *SLOW]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: process.poll() is not None or has_records(run, "rollouts"), 90, lambda: "nothing was made")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "persona-axis: interrupted; finished work is kept, the same command goes on from here." in err
    assert "Traceback" not in err
    assert out == ""
    there = journalled(run, "rollouts")
    assert 0 < len(there) < ROLLOUTS
    resumed = start(*more)
    assert resumed.wait() == 0, resumed.err
    assert f"rollouts: {ROLLOUTS - len(there)}/" in resumed.err
    made = contents(run)
    assert len(made) == ROLLOUTS
    assert {key: made[key][2] for key in there} == there


def test_control_c_while_a_model_judges_keeps_the_verdicts(
    start: Start, whole: Path, tmp_path: Path, fake_judge: FakeJudge
) -> None:
    run = tmp_path / "run"
    copied(whole, run, "judge", "fit", "summary.json", "report.html")
    fake_judge.reply = lambda prompt: time.sleep(0.02) or "Score: 3"  # type: ignore[func-returns-value]
    judge = ["--judge", JUDGE]
    process = start(*judge, env=fake_judge.environment)
    process.wait_for(lambda: len(fake_judge.prompts) > 8)
    process.signal(signal.SIGINT)
    assert process.wait() == 130, process.err
    assert "Traceback" not in process.err
    there = set(journalled(run, "judge/openai-api-fake-judge"))
    assert there
    fake_judge.reply = lambda prompt: "Score: 3"
    fake_judge.prompts.clear()
    last = start(*judge, env=fake_judge.environment)
    assert last.wait() == 0, last.err
    roles = {key for key, (*_, text, _n) in contents(run).items() if not key.startswith("default/") and text}
    assert len(fake_judge.prompts) == len(roles - there)


def test_a_judge_that_fails_on_some_ends_partially(
    start: Start, whole: Path, tmp_path: Path, fake_judge: FakeJudge
) -> None:
    copied(whole, tmp_path / "run", "judge", "fit", "summary.json", "report.html")
    fake_judge.reply = lambda prompt: "Hm." if "Question 5" in prompt else "Score: 3"
    process = start("--judge", JUDGE, env=fake_judge.environment)
    assert process.wait() == 3
    failed = json.loads((tmp_path / "run" / "summary.json").read_text())["judge"]["failed"]
    assert failed > 0
    assert "Ranking at layer" in process.out  # the fit of the rest is shown
    assert "have no verdict because the judge failed on them" in process.err
    assert "Traceback" not in process.err


# ---- started from scratch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["catalog", "list"]])
def test_help_imports_no_torch(argv: list[str]) -> None:
    script = (
        "import sys\nfrom persona_axis.cli.app import main\n"
        f"sys.argv = ['persona-axis', *{argv!r}]\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'plotly', 'sklearn', 'inspect_ai'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout) > 200
