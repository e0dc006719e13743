"""The entry point: vLLM only logs what fails to import, so importing cannot fail, and calling can."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from persona_axis.errors import UsageError
from persona_axis.serve.vllm import install, plugin

IMPORTED = """
import sys
before = set(sys.modules)
import persona_axis.serve.vllm.plugin
{more}
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
print(*sorted(name for name in sys.modules if name.startswith("persona_axis.")))
"""


def fresh(more: str = "", **environment: str) -> tuple[set[str], set[str]]:
    """Packages that a fresh interpreter has imported for the entry point, and modules of ours."""
    code = IMPORTED.format(more=more)
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    packages, ours = ended.stdout.splitlines()
    return set(packages.split()), set(ours.split())


def test_importing_it_imports_nothing_that_can_be_missing() -> None:
    packages, ours = fresh()
    assert packages - {"persona_axis"} <= sys.stdlib_module_names
    assert ours == {"persona_axis.serve", "persona_axis.serve.vllm", "persona_axis.serve.vllm.plugin"}


def test_a_plugin_that_is_disabled_does_nothing() -> None:
    disabled = {"PERSONA_AXIS_DISABLE": "1", "PERSONA_AXIS_MISSPELT": "x"}
    assert fresh("persona_axis.serve.vllm.plugin.register()", **disabled) == fresh()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the plugin was put into this process, which it is not here."""
    calls: list[int] = []
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(install, "install", lambda: calls.append(1))
    return calls


def test_registering_again_is_nothing(installed: list[int]) -> None:
    """vLLM calls it in every process, and in some of them twice."""
    plugin.register()
    plugin.register()
    assert installed == [1]


def test_a_registration_that_failed_is_tried_again(installed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise UsageError("no")

    with monkeypatch.context() as broken:
        broken.setattr(install, "install", fails)
        with pytest.raises(UsageError):
            plugin.register()
    plugin.register()
    assert installed == [1]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PERSONA_AXIS_POLICY", "x", "Unknown variable PERSONA_AXIS_POLICY"),
        ("PERSONA_AXIS_POLICIES", "/nowhere", "is not a folder"),
        ("PERSONA_AXIS_MAX_POLICIES", "0", "at least 1"),
        ("PERSONA_AXIS_DISABLE", "yes", "expected 0 or 1"),
    ],
)
def test_a_wrong_environment_ends_the_process_that_registers(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says):
        plugin.register()
    assert not plugin._registered


def test_a_vllm_that_the_plugin_does_not_know_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"is not one that the persona-axis plugin knows.*PERSONA_AXIS_DISABLE=1"):
        plugin.register()


def test_vllm_finds_it_by_its_entry_point() -> None:
    (found,) = [point for point in entry_points(group="vllm.general_plugins") if point.dist.name == "persona-axis"]
    assert found.name == "persona_axis"
    assert found.load() is plugin.register


def test_the_package_offers_its_names_when_they_are_used() -> None:
    import persona_axis.serve.vllm as package
    from persona_axis.serve.vllm import frontend, launch

    assert (package.verify, package.serve, package.report_of) == (launch.verify, launch.serve, frontend.report_of)
    with pytest.raises(AttributeError, match="nobody"):
        package.nobody  # noqa: B018


def test_the_extra_asks_for_the_vllm_that_is_tested() -> None:
    import tomllib

    project: dict[str, Any] = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["vllm"] == [f"vllm>={install.TESTED},<0.33"]
