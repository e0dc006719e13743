"""The reference's layout: its real files where they are at hand, and our catalog through it and back."""

import json
from pathlib import Path

import pytest

from persona_axis.catalog.catalog import load_catalog
from persona_axis.catalog.reference import Counted, export_reference, import_reference
from persona_axis.catalog.texts import judge_prompt
from persona_axis.catalog.transcripts import read_transcript, to_json
from persona_axis.catalog.validate import validate
from persona_axis.collect.llm_judge import judge_prompt as llm_prompt
from persona_axis.collect.verdicts import Exchange
from persona_axis.errors import CatalogError, UsageError
from tests.catalog.small import write_small_catalog

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "assistant-axis"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference's files are not at hand")
EVAL = "Rate {question} and {answer} from 0 to 3."


def content(path: Path) -> object:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


@needs_reference
def test_every_real_file_is_imported_and_comes_back_the_same(tmp_path: Path):
    data = REFERENCE / "data"
    counted = import_reference(data, tmp_path / "catalog", model_name="{model_name}")
    assert counted == Counted(roles=275, traits=240, questions=240, default_prompts=5)
    catalog = load_catalog(tmp_path / "catalog")
    assert (len(catalog.select_roles()), len(catalog.select_traits()), len(catalog.questions)) == (275, 240, 240)
    assert {len(role.prompts) for role in catalog.select_roles()} == {5}
    assert {len(trait.questions) for trait in catalog.select_traits()} == {40}
    assert export_reference(catalog, tmp_path / "again") == counted
    files = sorted(path.relative_to(data) for path in data.rglob("*.json*"))
    assert len(files) == 275 + 1 + 240 + 3
    assert [file for file in files if content(data / file) != content(tmp_path / "again" / file)] == []


@needs_reference
@pytest.mark.parametrize("name", ["coding", "philosophy", "therapy", "writing"])
def test_real_transcripts_come_back_the_same(name: str):
    path = REFERENCE / "transcripts" / "persona_drift" / f"{name}.json"
    transcript = read_transcript(path)
    assert transcript.domain == name
    assert len(transcript.messages) >= 28
    assert to_json(transcript, "reference") == content(path)


def test_the_embedded_catalog_survives_the_way_there_and_back(tmp_path: Path):
    ours = load_catalog()
    export_reference(ours, tmp_path / "reference")
    import_reference(tmp_path / "reference", tmp_path / "catalog")
    back = load_catalog(tmp_path / "catalog")
    assert {role.name: role for role in back.select_roles()} == {role.name: role for role in ours.select_roles()}
    assert {t.name: t for t in back.select_traits()} == {t.name: t for t in ours.select_traits()}
    assert (back.questions, back.default_prompts) == (ours.questions, ours.default_prompts)


def test_exported_files_are_what_readers_of_that_layout_expect(tmp_path: Path):
    export_reference(load_catalog(write_small_catalog(tmp_path / "small")), tmp_path / "out")
    cook = content(tmp_path / "out/roles/instructions/cook.json")
    assert cook["instruction"][1] == {"pos": "Stir first and answer over the shoulder."}
    asked = cook["eval_prompt"].format(question="Q?", answer="A.")
    assert "Question: Q?\n\nAnswer: A." in asked
    assert "3: steam and salt" in asked
    blunt = content(tmp_path / "out/traits/instructions/blunt.json")
    assert blunt["instruction"][0] == {"pos": "You say the hard thing first.", "neg": "You find the kind way in."}
    assert "REFUSAL" in blunt["eval_prompt"].format(question="Q?", answer="A.")
    assert content(tmp_path / "out/roles/role_list.json")["cook"] == "Feeds a harbor town from one stove."
    lines = content(tmp_path / "out/extraction_questions.jsonl")
    assert [(line["id"], line["question"]) for line in lines] == [
        (0, "Does rain bother you?"),
        (1, "What does one owe a friend?"),
    ]


@pytest.mark.parametrize(("missing", "counted"), [("traits", Counted(2, 0, 2, 2)), ("roles", Counted(0, 1, 2, 2))])
def test_a_catalog_of_one_kind_is_exported(tmp_path: Path, missing: str, counted: Counted):
    folder = write_small_catalog(tmp_path / "small")
    (folder / missing).rename(tmp_path / missing)
    assert export_reference(load_catalog(folder), tmp_path / "out") == counted


def test_braces_in_a_rubric_are_not_placeholders(tmp_path: Path):
    folder = write_small_catalog(tmp_path / "small")
    path = folder / "roles/trades/cook.toml"
    path.write_text(path.read_text().replace("steam and salt", "steam {and} salt"))
    export_reference(load_catalog(folder), tmp_path / "out")
    prompt = content(tmp_path / "out/roles/instructions/cook.json")["eval_prompt"]
    assert "steam {and} salt" in prompt.format(question="", answer="")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One role of the reference's layout, written here."""
    root = tmp_path / "data"
    write(root / "roles/role_list.json", {"cook": "Feeds people."})
    role = {"instruction": [{"pos": "You cook."}, {"pos": "Stir."}], "questions": ["Salt?"], "eval_prompt": EVAL}
    write(root / "roles/instructions/cook.json", role)
    write(root / "roles/instructions/default.json", {"instruction": [{"pos": ""}, {"pos": "You are {model_name}."}]})
    return root


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_an_imported_eval_prompt_is_sent_to_the_judge_as_it_is(source: Path, tmp_path: Path):
    import_reference(source, tmp_path / "out", model_name="Robo")
    role = load_catalog(tmp_path / "out").role("cook")
    assert (role.rubric, role.group) == (EVAL, "imported")
    assert judge_prompt(role.rubric, "Q?", "A {x}.") == "Rate Q? and A {x}. from 0 to 3."
    prompt = llm_prompt(Exchange("k", "cook", role.rubric, "You cook.", "Q?", "A {x}."))
    assert (prompt.text, prompt.system) == ("Rate Q? and A {x}. from 0 to 3.", None)
    assert load_catalog(tmp_path / "out").default_prompts == ("", "You are Robo.")


def test_imported_eval_prompts_are_no_near_duplicates_of_each_other(source: Path, tmp_path: Path):
    cook = json.loads((source / "roles/instructions/cook.json").read_text())
    write(source / "roles/instructions/smith.json", {**cook, "instruction": [{"pos": "Iron."}], "questions": ["Hot?"]})
    write(source / "roles/role_list.json", {"cook": "Feeds people.", "smith": "Beats iron."})
    import_reference(source, tmp_path / "out", model_name="Robo")
    (tmp_path / "out/questions.toml").write_text('[[question]]\nid = "a"\ncategory = "b"\ntext = "Why is that so?"\n')
    found = validate(load_catalog(tmp_path / "out"))
    assert [finding for finding in found if finding.rule in ("duplicates", "placeholders")] == []


def test_a_model_name_is_asked_for_only_where_it_is_needed(source: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"default prompt holds \{model_name\}; name the model with --model-name"):
        import_reference(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "roles/instructions/default.json").unlink()
    assert import_reference(source, tmp_path / "out") == Counted(1, 0, 0, 0)


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("roles/instructions/cook.json", {"instruction": [{"pos": "a"}]}, "missing key"),
        (
            "roles/instructions/cook.json",
            {"instruction": [{"positive": "a"}], "questions": ["b"], "eval_prompt": EVAL},
            "instruction 0: missing key",
        ),
        (
            "roles/instructions/cook.json",
            {"instruction": [{"pos": "a"}], "questions": ["b"], "eval_prompt": "{answer} {mood}"},
            "do not format",
        ),
        ("roles/role_list.json", {"smith": "x"}, "'cook' has no line in role_list.json"),
        ("roles/role_list.json", [], "expected an object"),
        ("roles/instructions/default.json", {"instruction": []}, "must be a list of prompts"),
    ],
)
def test_broken_files_are_named_and_nothing_is_written(
    source: Path, tmp_path: Path, file: str, value: object, words: str
):
    write(source / file, value)
    with pytest.raises(CatalogError, match=words):
        import_reference(source, tmp_path / "out", model_name="Robo")
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_refused(source: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="holds no roles/instructions"):
        import_reference(tmp_path, tmp_path / "out")
    for refused in (lambda: import_reference(source, source), lambda: export_reference(load_catalog(), source)):
        with pytest.raises(UsageError, match="holds something already"):
            refused()
