"""The environment of a server: each variable read, everything else refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_policies import made

from persona_axis.errors import UsageError
from persona_axis.serve.vllm.options import Options, checked_name


def options(**given: object) -> Options:
    """Of an environment that has these variables, without their prefix, and somebody else's."""
    ours = {f"PERSONA_AXIS_{name}": str(value) for name, value in given.items()}
    return Options.from_environment({"HOME": "/root", "VLLM_PLUGINS": "x", "OTHER_PERSONA_AXIS_X": "1", **ours})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of two policies, a folder without one, and a file."""
    made(1).save(tmp_path / "policies/calm")
    made(2).save(tmp_path / "policies/Brave-2.1_b")
    (tmp_path / "policies/notes").mkdir()
    (tmp_path / "policies/README").write_text("about them")
    return tmp_path / "policies"


# ---- variables ------------------------------------------------------------------------------------------------------


def test_without_variables_nothing_is_held() -> None:
    assert options() == Options(None, None, 8, 1, 64, None, None)
    assert options().policy_folders() == {}


def test_every_variable_is_read(folder: Path) -> None:
    assert options(
        POLICIES=folder,
        DEFAULT="calm",
        MAX_POLICIES=3,
        MAX_DIRECTIONS=2,
        MAX_CAPTURES=0,
        ALLOW_MODEL="org/other",
        MODEL_NAME="org/model",
    ) == Options(folder, "calm", 3, 2, 0, "org/other", "org/model")


def test_a_home_folder_is_expanded() -> None:
    assert options(POLICIES="~/policies").policies == Path("~/policies").expanduser() != Path("~/policies")


@pytest.mark.parametrize("name", ["POLICY", "MAX_POLICY", "DEFAULTS", "policies", "POLICIES_", "CACHE_DIR", ""])
def test_a_misspelt_variable_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=rf"PERSONA_AXIS_{name}\. .*PERSONA_AXIS_POLICIES.*PERSONA_AXIS_DISABLE"):
        options(**{name: "x"})


def test_variables_of_the_package_itself_are_left_alone() -> None:
    assert options(CACHE="/somewhere") == Options()


def test_an_empty_variable_is_none(folder: Path) -> None:
    assert options(POLICIES="", DEFAULT="", MAX_POLICIES="", POLICY="") == Options()


@pytest.mark.parametrize("name", ["MAX_POLICIES", "MAX_DIRECTIONS", "MAX_CAPTURES"])
@pytest.mark.parametrize("value", ["many", "1.5", "-1", "1e3", "0x10"])
def test_counts_are_whole_numbers(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"PERSONA_AXIS_{name}='{value}'"):
        options(**{name: value})


@pytest.mark.parametrize("name", ["MAX_POLICIES", "MAX_DIRECTIONS"])
def test_a_bank_without_room_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"PERSONA_AXIS_{name} must be at least 1"):
        options(**{name: 0})


@pytest.mark.parametrize("value", ["yes", "true", "2"])
def test_disable_is_0_or_1(value: str) -> None:
    assert options(DISABLE="0") == options(DISABLE="1") == Options()
    with pytest.raises(UsageError, match="PERSONA_AXIS_DISABLE"):
        options(DISABLE=value)


def test_a_default_without_policies_is_refused() -> None:
    with pytest.raises(UsageError, match=r"PERSONA_AXIS_DEFAULT=calm.*PERSONA_AXIS_POLICIES"):
        options(DEFAULT="calm")


def test_the_default_off_is_none(folder: Path) -> None:
    assert options(DEFAULT="off") == Options()
    assert options(POLICIES=folder, DEFAULT="off").policy_folders().keys() == {"Brave-2.1_b", "calm"}


# ---- folders --------------------------------------------------------------------------------------------------------


def test_policies_are_named_after_their_folders(folder: Path) -> None:
    found = options(POLICIES=folder).policy_folders()
    assert found == {"Brave-2.1_b": folder / "Brave-2.1_b", "calm": folder / "calm"}
    assert list(found) == sorted(found)


def test_a_folder_may_be_a_policy_itself(folder: Path) -> None:
    assert options(POLICIES=folder / "calm").policy_folders() == {"calm": folder / "calm"}


def test_a_run_folder_stands_for_its_policy(tmp_path: Path) -> None:
    made().save(tmp_path / "run-1/calibration/policy")
    assert options(POLICIES=tmp_path / "run-1").policy_folders() == {"run-1": tmp_path / "run-1"}
    assert options(POLICIES=tmp_path).policy_folders() == {"run-1": tmp_path / "run-1"}


def test_a_folder_given_relative_to_the_present_one_has_its_own_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "calm")
    assert options(POLICIES=".").policy_folders() == {"calm": folder / "calm"}


def test_a_default_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"PERSONA_AXIS_DEFAULT=clam.*Brave-2\.1_b, calm"):
        options(POLICIES=folder, DEFAULT="clam").policy_folders()


@pytest.mark.parametrize("what", ["missing", "policies/README", "policies/notes"])
def test_policies_that_are_not_there_are_refused(folder: Path, tmp_path: Path, what: str) -> None:
    with pytest.raises(UsageError, match=f"PERSONA_AXIS_POLICIES={tmp_path / what}"):
        options(POLICIES=tmp_path / what).policy_folders()


@pytest.mark.parametrize("name", ["off", "two words", "naïve", ".hidden", "-x", "a=b"])
def test_a_policy_whose_name_no_request_could_say_is_refused(folder: Path, name: str) -> None:
    made().save(folder / name)
    with pytest.raises(UsageError, match="cannot be served as"):
        options(POLICIES=folder).policy_folders()


@pytest.mark.parametrize("name", ["", "a/b", "a\n", "..", "a b"])
def test_names_that_are_no_folders_are_refused_too(name: str) -> None:
    with pytest.raises(UsageError):
        checked_name(name)
    assert checked_name("v1.2_final-3") == "v1.2_final-3"
