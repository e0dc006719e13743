"""Loading and selecting: lazy, strict, deterministic; every error names its file and field."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_axis.catalog import fields
from persona_axis.catalog.catalog import (
    load_catalog,
    load_questions_file,
    load_roles_file,
    read_default_prompts,
)
from persona_axis.errors import CatalogError, UsageError

EMBEDDED = load_catalog()
ROLE = {
    "description": "A cook.",
    "prompts": ["You cook.", "Stir."],
    "questions": ["Salt?"],
    "rubric": "3: cooks.",
}
ROLE_TOML = "".join(f"{key} = {json.dumps(value)}\n" for key, value in ROLE.items())
QUESTION_TOML = '[[question]]\nid = "why"\ncategory = "values"\ntext = "Why?"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small catalog: trades (cook, smith), beasts (owl); no order.toml."""
    root = tmp_path / "catalog"
    for name in ("trades/cook", "trades/smith", "beasts/owl"):
        path = root / "roles" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROLE_TOML)
    (root / "questions.toml").write_text(QUESTION_TOML)
    (root / "default_prompts.toml").write_text('prompts = ["", "You help."]\n')
    return root


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def order_toml(**groups: list[str]) -> str:
    return "".join(
        f"[[group]]\nname = {json.dumps(group)}\nroles = {json.dumps(names)}\n" for group, names in groups.items()
    )


# Loading


def test_listing_parses_no_role_file(monkeypatch: pytest.MonkeyPatch):
    parsed: list[Path] = []
    real = fields.read_text
    monkeypatch.setattr(fields, "read_text", lambda path: parsed.append(path) or real(path))
    catalog = load_catalog(EMBEDDED.folder)
    assert len(catalog.role_names) == sum(len(names) for names in catalog.groups.values())
    assert [path.name for path in parsed] == ["order.toml"]
    assert catalog.role("pirate") is catalog.role("pirate")
    assert [path.name for path in parsed] == ["order.toml", "pirate.toml"]


def test_groups_without_order_file_are_alphabetical(folder: Path):
    catalog = load_catalog(folder)
    assert list(catalog.groups.items()) == [("beasts", ("owl",)), ("trades", ("cook", "smith"))]
    assert catalog.role_names == ("owl", "cook", "smith")


def test_order_file_orders_groups_and_picks_and_what_it_omits_follows(folder: Path):
    write(folder / "order.toml", order_toml(trades=["smith"]))
    catalog = load_catalog(str(folder))
    assert list(catalog.groups) == ["trades", "beasts"]
    assert catalog.groups["trades"] == ("cook", "smith")  # the listing stays alphabetical
    assert [role.name for role in catalog.select_roles(3)] == ["smith", "owl", "cook"]


def test_a_role_holds_the_values_of_its_file(folder: Path):
    role = load_catalog(folder).role("cook")
    assert (role.name, role.group, role.prompts) == ("cook", "trades", ("You cook.", "Stir."))
    assert (role.description, role.questions, role.rubric) == ("A cook.", ("Salt?",), "3: cooks.")


def test_a_broken_role_file_does_not_disturb_the_others(folder: Path):
    write(folder / "roles/trades/smith.toml", "prompts = [")
    catalog = load_catalog(folder)
    assert catalog.role("cook").name == "cook"
    with pytest.raises(CatalogError, match=r"smith\.toml: not valid TOML"):
        catalog.role("smith")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rubric": None}, "missing key.*rubric"),
        ({"promts": ["x"]}, "unknown key.*promts"),
        ({"prompts": []}, "'prompts' is an empty list"),
        ({"prompts": "You cook."}, "'prompts' must be a list of texts, found a text"),
        ({"prompts": ["You cook.", 3]}, r"'prompts\[1\]' must be a text, found a number"),
        ({"prompts": ["You cook.", " You cook. "]}, "'prompts' holds this text twice"),
        ({"prompts": [""]}, r"'prompts\[0\]' is empty"),
        ({"questions": []}, "'questions' is an empty list"),
        ({"rubric": " \n"}, "'rubric' is empty"),
        ({"description": ["a"]}, "'description' must be a text, found a list"),
    ],
)
def test_broken_role_names_file_and_field(folder: Path, changes: dict, message: str):
    fields = {key: value for key, value in {**ROLE, **changes}.items() if value is not None}
    path = folder / "roles/trades/cook.toml"
    write(path, "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items()))
    with pytest.raises(CatalogError, match=f"{re.escape(str(path))}: .*{message}"):
        load_catalog(folder).role("cook")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question = []", "one or more"),
        ("[question]\nid = 'a'", "one or more"),
        ("", "missing key.*question"),
        (QUESTION_TOML + QUESTION_TOML, "'id' 'why' is used twice"),
        (QUESTION_TOML.replace("category", "kind"), "question 1: missing key.*category"),
        (QUESTION_TOML.replace('"why"', "7"), "question 1: 'id' must be a text"),
        (QUESTION_TOML.replace('"why"', '"Why not"'), "question 1: 'id' is 'Why not'"),
    ],
)
def test_broken_questions_name_file_and_place(folder: Path, text: str, message: str):
    write(folder / "questions.toml", text)
    with pytest.raises(CatalogError, match=rf"questions\.toml.*{message}"):
        _ = load_catalog(folder).questions


@pytest.mark.parametrize("text", ["", "prompts = []", "prompts = 'x'", "prompts = ['a', 'a']", "prompts = [' ']"])
def test_broken_default_prompts_name_the_file(folder: Path, text: str):
    write(folder / "default_prompts.toml", text)
    with pytest.raises(CatalogError, match=r"default_prompts\.toml"):
        _ = load_catalog(folder).default_prompts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (order_toml(trades=["baker"]), "names 'baker', which is not in roles/trades"),
        (order_toml(fish=["cod"]), "names 'cod', which is not in roles/fish"),
        (order_toml(trades=["cook", "cook"]), "holds this text twice: 'cook'"),
        (order_toml(trades=["cook"]) + order_toml(trades=["smith"]), "'trades' is used twice"),
        ("group = 3", "one or more"),
    ],
)
def test_broken_order_file_is_refused(folder: Path, text: str, message: str):
    write(folder / "order.toml", text)
    with pytest.raises(CatalogError, match=rf"order\.toml.*{message}"):
        load_catalog(folder)


@pytest.mark.parametrize("name", ["roles/beasts/cook", "roles/trades/Baker", "roles/trades/default", "roles/baker"])
def test_names_that_cannot_be_keys_are_refused(folder: Path, name: str):
    path = write(folder / f"{name}.toml", ROLE_TOML)
    with pytest.raises(CatalogError, match=re.escape(path.stem)):
        load_catalog(folder)


def test_missing_folders_and_files(folder: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="no such catalog folder"):
        load_catalog(tmp_path / "nowhere")
    with pytest.raises(CatalogError, match="holds no role"):
        load_catalog(tmp_path)
    (folder / "questions.toml").unlink()
    with pytest.raises(CatalogError, match=r"questions\.toml: cannot be read"):
        _ = load_catalog(folder).questions


def test_hidden_files_are_not_roles_and_latin1_is_refused(folder: Path):
    write(folder / "roles/trades/._cook.toml", "")
    (folder / "roles/trades/cook.toml").write_bytes(ROLE_TOML.replace("cook", "caf\xe9").encode("latin-1"))
    catalog = load_catalog(folder)
    assert catalog.role_names == ("owl", "cook", "smith")
    with pytest.raises(CatalogError, match=r"cook\.toml: cannot be read"):
        catalog.role("cook")


# Content hash


def test_content_hash_ignores_layout_and_order_file(folder: Path):
    before = load_catalog(folder).content_hash()
    lines = [f"  {key}   = '''\n{ROLE[key]}\n'''" for key in ("rubric", "description")]
    lines += [f"{key} = [\n  {', '.join(map(json.dumps, ROLE[key]))},\n] # note" for key in ("questions", "prompts")]
    (folder / "roles/trades/cook.toml").write_bytes("\r\n".join(lines).encode())
    write(folder / "order.toml", order_toml(trades=["smith"]))
    assert load_catalog(folder).content_hash() == before
    assert re.fullmatch(r"[0-9a-f]{64}", before)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("roles/trades/cook.toml", "Salt?", "Salt"),
        ("roles/trades/cook.toml", '"You cook.", "Stir."', '"Stir.", "You cook."'),
        ("roles/trades/cook.toml", '"You cook.", "Stir."', '"You cook., Stir."'),
        ("roles/trades/smith.toml", "3: cooks.", "3: cooks"),
        ("questions.toml", "values", "advice"),
        ("questions.toml", "Why?", "Who?"),
        ("default_prompts.toml", '"", "You help."', '"You help.", ""'),
    ],
)
def test_content_hash_sees_every_text(folder: Path, file: str, old: str, new: str):
    before = load_catalog(folder).content_hash()
    text = (folder / file).read_text()
    assert old in text
    write(folder / file, text.replace(old, new, 1))
    assert load_catalog(folder).content_hash() != before


def test_content_hash_sees_a_renamed_role(folder: Path):
    before = load_catalog(folder).content_hash()
    (folder / "roles/trades/cook.toml").rename(folder / "roles/trades/baker.toml")
    assert load_catalog(folder).content_hash() != before


# Selecting roles


def test_all_roles_by_default():
    assert tuple(role.name for role in EMBEDDED.select_roles()) == EMBEDDED.role_names


@given(st.integers(1, len(EMBEDDED.role_names)), st.integers(1, len(EMBEDDED.role_names)))
def test_a_larger_pick_begins_with_every_smaller_one(a: int, b: int):
    small, large = sorted((a, b))
    assert EMBEDDED.select_roles(large)[:small] == EMBEDDED.select_roles(small)


@given(st.integers(1, len(EMBEDDED.role_names)))
def test_a_pick_spans_the_groups_evenly(number: int):
    picked = EMBEDDED.select_roles(number)
    assert len({role.name for role in picked}) == number
    counts = Counter(role.group for role in picked)
    most = max(counts.values())
    for group, names in EMBEDDED.groups.items():  # a group is behind by more than one only when used up
        assert counts[group] >= min(most - 1, len(names))


def test_number_may_be_digits_and_must_be_in_range():
    assert EMBEDDED.select_roles("12") == EMBEDDED.select_roles(12)
    for spec in (0, -1, "-1", len(EMBEDDED.role_names) + 1, "0"):
        with pytest.raises(UsageError, match="1 to"):
            EMBEDDED.select_roles(spec)
    with pytest.raises(UsageError):
        EMBEDDED.select_roles(True)


def test_names_in_the_order_asked_for():
    assert [role.name for role in EMBEDDED.select_roles(" pirate, bard,")] == ["pirate", "bard"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pirat", "no role 'pirat'; did you mean pirate"),
        ("Trickster God", "did you mean trickster_god"),
        ("bard,zzzzzz", "no role 'zzzzzz'; the catalog has .* such as teacher"),
        ("pirate,bard,pirate", "'pirate' is named twice"),
        (" , ", "no role is named"),
        ("@nowhere", "nowhere: no such file"),
        ("nowhere.txt", "no such file"),
        ("nowhere.jsonl", "no such file"),
    ],
)
def test_wrong_role_selections(spec: str, message: str):
    with pytest.raises(UsageError, match=message):
        EMBEDDED.select_roles(spec)


def test_unknown_role_is_a_usage_error_with_close_matches():
    with pytest.raises(UsageError, match="did you mean demon"):
        EMBEDDED.role("daemon")


def test_names_from_a_file(tmp_path: Path):
    path = write(tmp_path / "names.txt", "# mine\npirate\n\nbard  # sings\n")
    other = write(tmp_path / "names", "ghost\n")
    assert [role.name for role in EMBEDDED.select_roles(str(path))] == ["pirate", "bard"]
    assert EMBEDDED.select_roles(f"@{path}") == EMBEDDED.select_roles(str(path))
    assert [role.name for role in EMBEDDED.select_roles(f"@{other}")] == ["ghost"]
    write(path, "# nothing\n")
    with pytest.raises(UsageError, match=r"names\.txt: no role is named"):
        EMBEDDED.select_roles(str(path))
    write(path, "pirat\n")
    with pytest.raises(UsageError, match=r"names\.txt: .*did you mean pirate"):
        EMBEDDED.select_roles(str(path))


def test_own_roles_from_files(tmp_path: Path):
    single = write(tmp_path / "cook.toml", ROLE_TOML)
    items = [{"name": "cook", **ROLE}, {"name": "owl", "group": "beasts", **ROLE}]
    listed = write(tmp_path / "roles.json", json.dumps(items))
    lines = write(tmp_path / "roles.jsonl", "\n\n".join(json.dumps(item) for item in items) + "\n")
    assert [(role.name, role.group) for role in EMBEDDED.select_roles(str(single))] == [("cook", "own")]
    roles = EMBEDDED.select_roles(str(lines))
    assert [(role.name, role.group) for role in roles] == [("cook", "own"), ("owl", "beasts")]
    assert roles == load_roles_file(listed) == EMBEDDED.select_roles(f"@{listed}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", "{", r"line 1: not valid JSON"),
        ("r.jsonl", "\n" + json.dumps(ROLE), r"line 2: missing key.*name"),
        ("r.jsonl", json.dumps({"name": "default", **ROLE}), "line 1: .*reserved"),
        ("r.jsonl", 2 * (json.dumps({"name": "owl", **ROLE}) + "\n"), "'owl' is used twice"),
        (
            "r.jsonl",
            json.dumps({"name": "owl", **ROLE, "rubric": "\ud800"}),
            "'rubric' holds half a character",
        ),
        ("r.json", "{}", "expected a list, found a table"),
        ("r.json", "[", "not valid JSON"),
        ("r.json", "[3]", "item 1: expected a table"),
    ],
)
def test_broken_own_roles_name_the_place(tmp_path: Path, name: str, text: str, message: str):
    with pytest.raises(CatalogError, match=message):
        load_roles_file(write(tmp_path / name, text))


def test_own_roles_need_a_role_and_a_known_suffix(tmp_path: Path):
    with pytest.raises(UsageError, match="holds no role"):
        load_roles_file(write(tmp_path / "r.json", "[]"))
    with pytest.raises(UsageError, match=r"not from '\.csv'"):
        load_roles_file(write(tmp_path / "r.csv", "x"))


# Selecting questions


@given(st.integers(1, len(EMBEDDED.questions)))
def test_first_questions_are_balanced(number: int):
    picked = EMBEDDED.select_questions(number)
    assert picked == EMBEDDED.select_questions(str(number)) == list(EMBEDDED.questions[:number])
    counts = Counter(question.category for question in picked)
    categories = {question.category for question in EMBEDDED.questions}
    assert max(counts.values()) - min(counts[category] for category in categories) <= 1


def test_all_questions_by_default():
    assert EMBEDDED.select_questions() == list(EMBEDDED.questions)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (0, "1 to 240"),
        ("241", "1 to 240"),
        ("values", "neither a number"),
        ("nowhere.txt", "no such file"),
        ("q.csv", "neither a number"),
    ],
)
def test_wrong_question_selections(spec: str | int, message: str):
    with pytest.raises(UsageError, match=message):
        EMBEDDED.select_questions(spec)


def test_own_questions_from_text(tmp_path: Path):
    path = write(tmp_path / "q.txt", "# mine\nWhy?\n\n  Who? \n")
    questions = EMBEDDED.select_questions(str(path))
    assert [(q.id, q.category, q.text) for q in questions] == [
        ("own_001", "own", "Why?"),
        ("own_002", "own", "Who?"),
    ]


def test_own_questions_from_jsonl(tmp_path: Path):
    lines = [{"question": "Why?"}, {"text": "Who?\u2028Me?", "id": "who", "category": "values"}]
    path = write(tmp_path / "q.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert [(q.id, q.category, q.text) for q in load_questions_file(path)] == [
        ("own_001", "own", "Why?"),
        ("who", "values", "Who?\u2028Me?"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a", "text": "b"}', "line 1: needs exactly one of"),
        ('{"id": "a"}', "line 1: needs exactly one of"),
        ('{"question": "a", "prompt": "b"}', "line 1: unknown key.*prompt"),
        ('{"question": "a"}\n{"question": "a"}', "two questions have the text 'a'"),
        ('{"question": "a", "id": "x"}\n{"question": "b", "id": "x"}', "two questions have the id 'x'"),
        ('"a"', "line 1: expected a table of keys, found a text"),
        ('{"question": null}', "'question' must be a text, found null"),
    ],
)
def test_broken_own_questions_name_the_place(tmp_path: Path, text: str, message: str):
    with pytest.raises(CatalogError, match=message):
        load_questions_file(write(tmp_path / "q.jsonl", text))


@pytest.mark.parametrize("name", ["q.txt", "q.jsonl"])
def test_empty_questions_file_is_a_usage_error(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="holds no question"):
        EMBEDDED.select_questions(str(write(tmp_path / name, "\n\n")))


# Default prompts of the user


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.txt", "\ufeffYou help.\n\n# Rules\nBe kind.\n", ("You help.\n\n# Rules\nBe kind.",)),
        ("p.jsonl", '{"prompt": "You help."}\n\n"Be kind."\n""\n', ("You help.", "Be kind.", "")),
        ("p.json", '["", "You help."]', ("", "You help.")),
        ("p.toml", 'prompts = ["You help."]', ("You help.",)),
    ],
)
def test_own_default_prompts(tmp_path: Path, name: str, text: str, prompts: tuple[str, ...]):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read_default_prompts(path) == read_default_prompts(str(path)) == prompts


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("p.txt", " \n", UsageError, "holds no prompt"),
        ("p.jsonl", "", UsageError, "holds no prompt"),
        ("p.json", "[]", UsageError, "holds no prompt"),
        ("p.md", "You help.", UsageError, r"not from '\.md'"),
        ("p.json", '{"a": 1}', CatalogError, "must be a list of texts, found a table"),
        ("p.jsonl", '{"text": "a"}', CatalogError, "line 1: missing key.*prompt"),
        ("p.jsonl", "3", CatalogError, "line 1: expected a table"),
        ("p.toml", "prompts = ['a']\nother = 1", CatalogError, "unknown key.*other"),
        ("p.json", '["a", "a"]', CatalogError, "twice"),
    ],
)
def test_broken_default_prompts(tmp_path: Path, name: str, text: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        read_default_prompts(write(tmp_path / name, text))
