"""``persona-axis vllm``: its options become the environment of vLLM's processes, every other one is vLLM's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small_policies import made

from persona_axis.serve.vllm import launch

Served = list[tuple[list[str], dict[str, str]]]  # arguments, and our variables
Invoke = Callable[..., tuple[int, str]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    calls: Served = []

    def serve(arguments: list[str]) -> None:
        ours = {name: value for name, value in os.environ.items() if name.startswith("PERSONA_AXIS_")}
        calls.append((list(arguments), ours))

    monkeypatch.setattr(launch, "serve", serve)
    return calls


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """``invoke("org/model", ...)``: exit code, and what was said to the user."""
    from persona_axis.cli.app import main

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["persona-axis", "vllm", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    made(1).save(tmp_path / "policies/calm")
    made(2).save(tmp_path / "policies/warm")
    return tmp_path / "policies"


def test_without_options_of_ours_the_model_is_served_without_policies(served: Served, invoke: Invoke) -> None:
    assert invoke("org/model") == (0, "")
    assert served == [(["org/model"], {"PERSONA_AXIS_MODEL_NAME": "org/model"})]


def test_our_options_are_variables_and_all_others_vllms(served: Served, invoke: Invoke, policies: Path) -> None:
    ours = ["--policies", policies, "--default", "calm", "--max-policies", 3, "--max-directions", 2]
    ours += ["--max-captures", 0, "--allow-model", "org/model"]
    others = ["--port", "8000", "-tp", "2", "--enforce-eager", "--max-model-len=512", "--no-enable-prefix-caching"]
    assert invoke("org/model", *others[:4], *ours, *others[4:]) == (0, "")
    variables = {
        "POLICIES": str(policies),
        "DEFAULT": "calm",
        "MAX_POLICIES": "3",
        "MAX_DIRECTIONS": "2",
        "MAX_CAPTURES": "0",
        "ALLOW_MODEL": "org/model",
        "MODEL_NAME": "org/model",
    }
    wanted = {f"PERSONA_AXIS_{name}": value for name, value in variables.items()}
    assert served == [(["org/model", *others], wanted)]


def test_what_the_environment_says_counts_unless_an_option_says_otherwise(
    served: Served, invoke: Invoke, policies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSONA_AXIS_POLICIES", str(policies))
    monkeypatch.setenv("PERSONA_AXIS_DEFAULT", "calm")
    monkeypatch.setenv("PERSONA_AXIS_MODEL_NAME", "org/base")
    assert invoke("org/model", "--default", "warm") == (0, "")
    assert served[0][1] == {
        "PERSONA_AXIS_POLICIES": str(policies),
        "PERSONA_AXIS_DEFAULT": "warm",
        "PERSONA_AXIS_MODEL_NAME": "org/base",
    }


def test_a_model_folder_is_called_as_it_is(served: Served, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    assert invoke(tmp_path / "mine") == (0, "")
    assert served == [([str(tmp_path / "mine")], {"PERSONA_AXIS_MODEL_NAME": "mine"})]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--policies", "nowhere"], "PERSONA_AXIS_POLICIES=nowhere is not a folder."),
        (["--policies", "."], "PERSONA_AXIS_POLICIES=.: no policy there, nor in a folder below it."),
        (["--policies", "policies", "--default", "clam"], "PERSONA_AXIS_DEFAULT=clam: there is no such policy"),
        (["--default", "calm"], "PERSONA_AXIS_DEFAULT=calm names a policy, but PERSONA_AXIS_POLICIES"),
        (["--max-policies", 0], "PERSONA_AXIS_MAX_POLICIES must be at least 1"),
        (["--max-captures", -1], "PERSONA_AXIS_MAX_CAPTURES='-1'"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(
    words: list[object],
    says: str,
    served: Served,
    invoke: Invoke,
    policies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if words[-1] == "." else tmp_path)
    code, said = invoke("org/model", *words)
    assert code == 2
    assert said.startswith(f"persona-axis: {says}")
    assert said.count("\n") == 1
    assert served == []


def test_a_misspelt_variable_is_refused(served: Served, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_AXIS_POLICY", "x")
    code, said = invoke("org/model")
    assert (code, served) == (2, [])
    assert "Unknown variable PERSONA_AXIS_POLICY." in said


@pytest.mark.parametrize(("words", "code"), [([], 2), (["org/model", "--max-policies", "many"], 2), (["./none"], 1)])
def test_wrong_words(words: list[str], code: int, served: Served, invoke: Invoke) -> None:
    assert invoke(*words)[0] == code
    assert served == []


def test_without_vllm_it_says_what_to_install(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, said = invoke("org/model")
    assert code == 1
    assert said.startswith("persona-axis: Serving needs vLLM")
    assert "pip install 'persona-axis[vllm]'" in said
