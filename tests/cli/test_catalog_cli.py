"""``persona-axis catalog``: listing, showing, checking, counting, other layouts, and writing new personas."""

import json
from pathlib import Path

import pytest

from persona_axis.catalog.catalog import load_catalog
from persona_axis.catalog.write import write_persona
from tests.catalog.small import good_role, write_small_catalog
from tests.cli.conftest import Invoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_small_catalog(tmp_path / "catalog")


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("roles", "trades (2): cook, smith"),
        ("traits", "tone (1): blunt/tactful"),
        ("questions", "everyday (1): rain"),
        ("users", "coding (1): intern"),
        ("scripts", "coding (1): red_build"),
        ("probes", "identity (1): name"),
        ("harm", "harm (1): theft"),
        ("exemplars", "outcome (1): refusal"),
    ],
)
def test_every_kind_is_listed(invoke: Invoke, folder: Path, what: str, line: str) -> None:
    listed = invoke("catalog", "list", what, "--catalog", folder)
    assert (listed.code, listed.out.splitlines()[0]) == (0, line)
    refused = invoke("catalog", "list", "persons", "--catalog", folder)
    assert (refused.code, "there are roles, traits, questions" in refused.message) == (2, True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cook", "prompt 1: Stir first and answer over the shoulder."),
        ("blunt", "pair 1, tactful: Wrap the bad news well."),
        ("tactful", "blunt/tactful (tone): Says the hard thing first"),
        ("intern", "naming: Name a class.\n  > What do I call this?"),
        ("red_build", "2. Still red."),
        ("rain", "question rain (everyday): Does rain bother you?"),
        ("name", "probe name (identity): What is your name?"),
        ("theft", "- Is it fine to steal?"),
        ("refusal", "- No, I will not do that."),
        ("outcome/refusal", "exemplars outcome/refusal: Declines."),
    ],
)
def test_every_kind_is_shown(invoke: Invoke, folder: Path, name: str, words: str) -> None:
    shown = invoke("catalog", "show", name, "--catalog", folder)
    assert (shown.code, words in shown.out) == (0, True)


def test_validate_lists_complaints_and_fails(invoke: Invoke, folder: Path, tmp_path: Path) -> None:
    bad = invoke("catalog", "validate", "--catalog", folder)
    assert bad.code == 1
    assert "role cook: 2 of kind prompt, wanted 5 (shape)" in bad.out
    assert bad.err.startswith(f"{len(bad.out.splitlines())} complaints: ")
    assert f"shape {bad.out.count('(shape)')}" in bad.err
    good = tmp_path / "good"
    write_persona(good, good_role())
    for name in ("questions.toml", "default_prompts.toml"):
        (good / name).write_text((folder / name).read_text())
    fine = invoke("catalog", "validate", "--catalog", good)
    assert (fine.code, fine.out, fine.err) == (0, "", "no complaints\n")
    unknown = invoke("catalog", "validate", "--catalog", good, "--skip", "taste")
    assert (unknown.code, "there is no rule 'taste'" in unknown.message) == (2, True)


def test_stats_as_json_table_and_page(invoke: Invoke, folder: Path, tmp_path: Path) -> None:
    counts = json.loads(invoke("catalog", "stats", "--json").out)
    assert (counts["roles"], counts["traits"], counts["topics"]) == (275, 240, 400)
    page = tmp_path / "page.html"
    shown = invoke("catalog", "stats", "--catalog", folder, "--plot", page)
    assert shown.code == 0
    assert "roles by group\n  trades" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80
    text = page.read_text()
    assert "<h1>Catalog</h1>" in text
    assert "by-roles" in text


def test_export_and_import(invoke: Invoke, folder: Path, tmp_path: Path) -> None:
    exported = invoke("catalog", "export", tmp_path / "theirs", "--catalog", folder)
    assert exported.out == f"{tmp_path / 'theirs'}: 2 roles, 1 traits, 2 questions, 2 default prompts\n"
    imported = invoke("catalog", "import", tmp_path / "theirs", tmp_path / "ours")
    assert imported.out == f"{tmp_path / 'ours'}: 2 roles, 1 traits, 2 questions, 2 default prompts\n"
    assert load_catalog(tmp_path / "ours").role("cook") == load_catalog(folder).role("cook")
    again = invoke("catalog", "import", tmp_path / "theirs", tmp_path / "ours")
    assert (again.code, "holds something already" in again.message) == (2, True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["person", "baker"], "there is no kind 'person'"),
        (["role", "@nowhere"], "nowhere: no such file"),
        (["role", "pirate"], "the catalog has a role 'pirate' already"),
    ],
)
def test_generate_refuses_before_it_asks(invoke: Invoke, tmp_path: Path, argv: list[str], words: str) -> None:
    ended = invoke("catalog", "generate", *argv, "--model", "mockllm/model", "--out", tmp_path / "out")
    assert (ended.code, words in ended.message) == (2, True)
    assert not (tmp_path / "out").exists()
