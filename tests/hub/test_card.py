"""The card: only figures that are in the files, and code that works."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from artifacts import MODEL, REVISION, RULE, make_axis, make_run
from fake_hub import FakeHub

from persona_axis.errors import StorageError
from persona_axis.geometry.axis import Axis
from persona_axis.hub.push import plan_push, push
from persona_axis.steering.policy import Policy

REPO = "me/axis"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own call


def card_of(folder: Path) -> str:
    return plan_push(folder, REPO).card


def header_of(card: str) -> dict[str, object]:
    _, header, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(header))


def test_the_header(run_folder: Path) -> None:
    header = header_of(card_of(run_folder))
    assert header["library_name"] == "persona-axis"
    assert (header["base_model"], header["base_model_relation"]) == (MODEL, "adapter")
    assert {"assistant-axis", "activation-capping"} <= set(header["tags"])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("model", "base", "loaded"),
    [
        ("my-model", None, "my-model"),  # a folder's name
        ("model.gguf", None, "model.gguf"),
        ("owner/of-it (embedded Q4_1)", "owner/of-it", "embedded"),
    ],
)
def test_models_that_are_not_on_the_hub(tmp_path: Path, model: str, base: str | None, loaded: str) -> None:
    card = card_of(make_run(tmp_path / "run", model=model))
    assert header_of(card).get("base_model") == base
    assert f'load_model("{loaded}")' in card
    assert f"--model {loaded}" in card


def test_how_the_axis_was_made(run_folder: Path) -> None:
    card = card_of(run_folder)
    for said in (
        f"**model**: {MODEL}, revision `{REVISION}` (4 layers, width 32, float32)",
        "**layers**: 0-3",
        "**roles**: 2 in the axis; 1 more left out",
        "**questions**: 6; the default persona answered under 2 neutral prompts",
        "**rollouts**: 9,876 (at most 321 tokens each, temperature 0.7)",
        "**judge**: likelihood; role rollouts: 1,234 kept, 56 dropped, 7 failed",
        "**filter**: expressed, at least 11 kept rollouts per role",
        "**estimator**: paired, seed 3",
        "**reliability**: 0.93",
        "**|cos(axis, PC1)|**: 0.81 [0.74, 0.86]",
        "https://arxiv.org/abs/2601.10387",
    ):
        assert said in card


HELD_OUT = (
    "**pressure toward roles reduced by**: 61 % [60 %, 63 %] (0.329 plain, 0.127 held, 288 role prompts)",
    "**perplexity, held over plain**: 1.0430 [1.0330, 1.0630] (96 neutral replies)",
    "**share of tokens with the same likeliest token**: 0.9670 [0.9570, 0.9870] (96 neutral replies)",
    f"**rule of the choice**: {RULE}",
)


def test_the_policy(run_folder: Path) -> None:
    card = card_of(run_folder)
    for said in (
        *HELD_OUT,
        "**layers**: 2, 3",
        "**floors**: percentile 75 toward the Assistant of the pool's projections. The paper calls it p0.25",
        "**pool**: 4,321 replies (4,000 of roles, 321 of the default persona), each projected on an axis fitted",
        "| 2 | 3.25 |\n| 3 | -4.75 |",
    ):
        assert said in card
    assert not {"ceiling", "88.8", "1.777", "KL"} & set(re.split(r"[\s*|]+", card))


def test_a_calibration_that_chose_another_policy_says_nothing_of_this_one(run_folder: Path) -> None:
    policy = Policy.load(run_folder)
    kept = {key: value for key, value in policy.provenance.items() if key != "calibration"}
    replace(policy, provenance=kept).save(run_folder / "calibration" / "policy")
    assert all(said in card_of(run_folder) for said in HELD_OUT)  # from calibration.json alone
    Policy.cap(make_axis(), {1: 9.5}, percentile_paper=25, percentile_assistant=75).save(
        run_folder / "calibration" / "policy"
    )
    card = card_of(run_folder)
    assert "| 1 | 9.50 |" in card
    assert not any(said in card for said in HELD_OUT)


def test_every_figure_is_in_the_files(run_folder: Path) -> None:
    """No number stands in the card that is neither in the files nor in the fixed text of a card without figures."""
    bare = run_folder.with_name("bare")
    make_axis().save(bare / "fit" / "axis.safetensors")
    Policy.load(run_folder).save(bare / "calibration" / "policy")
    fixed = numbers(card_of(bare))
    known = {
        *("9876", "1234", "56", "7", "321", "0.7", "6", "2", "1", "11", "3", "4", "32", "1000", "4000", "4321"),
        *("0.93", "0.81", "0.74", "0.86", "61", "60", "63", "0.329", "0.127", "288", "95", "12"),
        *("1.0430", "1.0330", "1.0630", "96", "0.9670", "0.9570", "0.9870"),
    }
    assert numbers(card_of(run_folder)) - fixed <= known


def numbers(card: str) -> set[str]:
    return {found.replace(",", "") for found in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)", card)}


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    axis = Axis(torch.ones(1, 4), (5,), 5)
    axis.save(tmp_path / "run" / "fit" / "axis.safetensors")
    card = card_of(tmp_path / "run")
    assert "base_model" not in header_of(card)
    assert "**layers**: 5" in card
    for absent in ("reliability", "judge**", "policy", "None", "nan", "n/a"):
        assert absent not in card


def test_a_policy_alone(run_folder: Path) -> None:
    card = card_of(run_folder / "calibration" / "policy")
    assert card.count("\n# ") == 1
    assert f"A persona policy for {MODEL}" in card
    assert "How the axis was made" not in card
    assert "persona-axis read" not in card


def test_a_calibration_of_another_form_is_no_error(run_folder: Path) -> None:
    (run_folder / "calibration" / "calibration.json").write_text('{"chosen": 7, "candidates": null, "pool": [1]}')
    assert "**pool**: 4,321 replies\n" in card_of(run_folder)


def test_a_fit_of_another_version(run_folder: Path) -> None:
    (run_folder / "fit" / "fit.json").write_text('{"layer": 2}')
    with pytest.raises(StorageError, match=r"fit\.json was written by another version.*persona-axis run"):
        card_of(run_folder)


def test_its_code_works(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny_runs import save_model

    model = save_model(tmp_path / "tiny-chat")
    run = make_run(tmp_path / "run", model=model.name, revision="")
    push(run, REPO)
    [code] = re.findall(r"```python\n(.*?)```", hub.repos[REPO].head.files["README.md"].data.decode(), re.S)
    shutil.rmtree(run)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # what was pulled stays good
        exec(compile(code, "card", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["user", "assistant"]
    assert Axis.load(tmp_path / "axis").layer == 2
