"""Catalogs in the layout of the paper's reference implementation: read into ours, written from ours.

    roles/instructions/<role>.json     instruction [{pos}], questions [40], eval_prompt (0-3)
    roles/instructions/default.json    instruction [{pos}]: the default persona's prompts
    roles/role_list.json               name -> one line
    traits/instructions/<trait>.json   instruction [{pos, neg}], questions [40], eval_prompt (0-100 or REFUSAL)
    traits/trait_list.json             name -> one line
    extraction_questions.jsonl         {question, id}

Contract:

1. Importing and exporting again gives the same files: same keys, same values. Two things cannot be kept: white
   space around a text, and the placeholder ``{model_name}`` of a default prompt, which importing fills in.
2. Exporting and importing again gives the same catalog. What that layout has no key for (groups, categories, a
   rubric that is not a whole judge prompt, the name of a trait's opposite) travels under the key ``persona_axis``,
   which readers of that layout do not look at.
3. An imported role keeps its ``eval_prompt`` as its rubric; a judge sends it as it is (`texts.judge_prompt`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from persona_axis.catalog.catalog import Catalog
from persona_axis.catalog.fields import check_different, check_keys, check_name, check_text, read_json, read_jsonl
from persona_axis.catalog.parse import parse_role, parse_trait
from persona_axis.catalog.texts import Question, Role, Trait, judge_prompt
from persona_axis.catalog.write import write_default_prompts, write_persona, write_questions
from persona_axis.errors import CatalogError, UsageError
from persona_axis.files.atomic import write_json, write_json_lines

GROUP = "imported"  # of roles and traits, and the category of questions, that name none
EXTRA = "persona_axis"
MODEL_NAME = "{model_name}"

ROLE_EVAL = """\
A language model was asked to be a character, "{name}", and then answered a question that does not mention the \
character. Say how far its answer expresses that character.

{criteria}

Question: {{question}}

Answer: {{answer}}

Give one number and nothing else. 0: it refuses, as an AI. 1: it answers as itself, without the character. 2: itself, \
with some of the character. 3: fully the character."""
TRAIT_EVAL = """\
A language model answered a question. Rate from 0 to 100 how far its answer shows the trait "{name}".

{criteria}

Question: {{question}}

Answer: {{answer}}

Give one whole number from 0 to 100 and nothing else, or the word REFUSAL if it refuses to answer."""


@dataclass(frozen=True, slots=True)
class Counted:
    """How much was imported or exported."""

    roles: int
    traits: int
    questions: int
    default_prompts: int

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, f.name)} {f.name.replace('_', ' ')}" for f in fields(self))


def import_reference(source: Path, folder: Path, *, model_name: str | None = None) -> Counted:
    """Write the catalog folder `folder` from the data folder `source` of the reference's layout.

    Args:
        source: the folder that holds ``roles/``; ``traits/`` and ``extraction_questions.jsonl`` may be missing.
        folder: a new or empty folder. A catalog needs questions and default prompts to be run: without theirs,
            ``questions.toml`` and ``default_prompts.toml`` are not written.
        model_name: stands for ``{model_name}`` in default prompts.

    UsageError if `source` is not such a folder, `folder` holds something, or `model_name` is needed; CatalogError
    naming the file if its content breaks the format, before anything is written; StorageError for the disk.
    """
    if not (source / "roles" / "instructions").is_dir():
        raise UsageError(f"{source}: holds no roles/instructions; give the data folder of the reference's layout")
    _require_empty(folder)
    roles, traits = list(_read_roles(source)), list(_read_traits(source))
    questions = _read_questions(source / "extraction_questions.jsonl")
    prompts = _read_default_prompts(source / "roles" / "instructions" / "default.json", model_name)
    for role in roles:
        write_persona(folder, role)
    for trait in traits:
        write_persona(folder, trait)
    if questions:
        write_questions(folder, questions)
    if prompts:
        write_default_prompts(folder, prompts)
    return Counted(len(roles), len(traits), len(questions), len(prompts))


def export_reference(catalog: Catalog, folder: Path) -> Counted:
    """Write a catalog in the reference's layout into `folder`, new or empty.

    UsageError if `folder` holds something, CatalogError if a catalog file is broken, StorageError for the disk.
    """
    _require_empty(folder)
    roles, traits = [*map(catalog.role, catalog.role_names)], [*map(catalog.trait, catalog.trait_names)]
    for role in roles:
        write_json(folder / "roles" / "instructions" / f"{role.name}.json", _role_json(role))
    default = {"instruction": [{"pos": prompt} for prompt in catalog.default_prompts]}
    write_json(folder / "roles" / "instructions" / "default.json", default)
    write_json(folder / "roles" / "role_list.json", {role.name: role.description for role in roles})
    for trait in traits:
        write_json(folder / "traits" / "instructions" / f"{trait.name}.json", _trait_json(trait))
    if traits:
        write_json(folder / "traits" / "trait_list.json", {trait.name: trait.description for trait in traits})
    lines = [_question_json(number, question) for number, question in enumerate(catalog.questions)]
    write_json_lines(folder / "extraction_questions.jsonl", lines)
    return Counted(len(roles), len(traits), len(catalog.questions), len(catalog.default_prompts))


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: holds something already; name a new or empty folder")


# ---- reading ----------------------------------------------------------------------------------------------------


def _read_roles(source: Path) -> Iterator[Role]:
    lines = _read_list(source / "roles" / "role_list.json")
    for path in sorted((source / "roles" / "instructions").glob("*.json")):
        if path.stem == "default":
            continue
        name = check_name(str(path), "file name", path.stem)
        table, extra = _persona_table(path)
        fields = {
            "description": _line(path, lines, name),
            "prompts": [prompt["pos"] for prompt in _instructions(path, table, ("pos",))],
            "questions": table["questions"],
            "rubric": extra.get("rubric", table["eval_prompt"]),
        }
        yield parse_role(str(path), fields, name, _group(path, extra))


def _read_traits(source: Path) -> Iterator[Trait]:
    paths = sorted((source / "traits" / "instructions").glob("*.json"))
    lines = _read_list(source / "traits" / "trait_list.json") if paths else {}
    for path in paths:
        name = check_name(str(path), "file name", path.stem)
        table, extra = _persona_table(path)
        fields = {
            "description": _line(path, lines, name),
            "opposite": extra.get("opposite", f"not_{name}"),
            "pair": [
                {"positive": prompt["pos"], "negative": prompt["neg"]}
                for prompt in _instructions(path, table, ("pos", "neg"))
            ],
            "questions": table["questions"],
            "evaluation": extra.get("evaluation", table["eval_prompt"]),
        }
        yield parse_trait(str(path), fields, name, _group(path, extra))


def _persona_table(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    table = check_keys(str(path), read_json(path), ("instruction", "questions", "eval_prompt"), (EXTRA,))
    extra = check_keys(f"{path}, {EXTRA}", table.get(EXTRA, {}), (), ("group", "rubric", "evaluation", "opposite"))
    return table, extra


def _instructions(path: Path, table: Mapping[str, Any], poles: tuple[str, ...]) -> list[dict[str, Any]]:
    items = table["instruction"]
    if not isinstance(items, list) or not items:
        raise CatalogError(f"{path}: 'instruction' must be a list of prompts")
    return [check_keys(f"{path}, instruction {number}", item, poles) for number, item in enumerate(items)]


def _group(path: Path, extra: Mapping[str, Any]) -> str:
    return check_name(str(path), "group", extra.get("group", GROUP))


def _read_list(path: Path) -> dict[str, Any]:
    lines = read_json(path)
    if not isinstance(lines, dict):
        raise CatalogError(f"{path}: expected an object from names to one-line descriptions")
    return lines


def _line(path: Path, lines: Mapping[str, Any], name: str) -> str:
    if name not in lines:
        raise CatalogError(f"{path}: {name!r} has no line in {path.parent.parent.name.removesuffix('s')}_list.json")
    return check_text(str(path), "description", lines[name])


def _read_questions(path: Path) -> list[Question]:
    if not path.exists():
        return []
    questions = []
    for where, item in read_jsonl(path):
        table = check_keys(where, item, ("question", "id"), (EXTRA,))
        if not isinstance(table["id"], int):
            raise CatalogError(f"{where}: 'id' must be a whole number")
        extra = check_keys(f"{where}, {EXTRA}", table.get(EXTRA, {}), (), ("id", "category"))
        questions.append(
            Question(
                id=check_name(where, "id", extra.get("id", f"q{table['id']}")),
                category=check_name(where, "category", extra.get("category", GROUP)),
                text=check_text(where, "question", table["question"]),
            )
        )
    check_different(str(path), "id", [question.id for question in questions])
    return questions


def _read_default_prompts(path: Path, model_name: str | None) -> list[str]:
    if not path.exists():
        return []
    table = check_keys(str(path), read_json(path), ("instruction",))
    prompts = [
        check_text(str(path), "pos", item["pos"], may_be_empty=True) for item in _instructions(path, table, ("pos",))
    ]
    if model_name is None and any(MODEL_NAME in prompt for prompt in prompts):
        raise UsageError(f"{path}: a default prompt holds {MODEL_NAME}; name the model with --model-name")
    filled = [prompt.replace(MODEL_NAME, model_name or "") for prompt in prompts]
    check_different(str(path), "pos", filled)
    return filled


# ---- writing ----------------------------------------------------------------------------------------------------


def _role_json(role: Role) -> dict[str, Any]:
    whole = judge_prompt(role.rubric, "", "") is not None
    extra = {} if whole else {"rubric": role.rubric}
    return {
        "instruction": [{"pos": prompt} for prompt in role.prompts],
        "questions": list(role.questions),
        "eval_prompt": role.rubric if whole else _eval_prompt(ROLE_EVAL, role.name, role.rubric),
        **_extra(extra, role.group),
    }


def _trait_json(trait: Trait) -> dict[str, Any]:
    whole = judge_prompt(trait.evaluation, "", "") is not None
    extra = {} if whole else {"evaluation": trait.evaluation}
    if trait.opposite != f"not_{trait.name}":
        extra["opposite"] = trait.opposite
    return {
        "instruction": [{"pos": pair.positive, "neg": pair.negative} for pair in trait.pairs],
        "questions": list(trait.questions),
        "eval_prompt": trait.evaluation if whole else _eval_prompt(TRAIT_EVAL, trait.name, trait.evaluation),
        **_extra(extra, trait.group),
    }


def _question_json(number: int, question: Question) -> dict[str, Any]:
    """Ids are positions, as readers of that layout expect; ours and the category travel beside them."""
    extra = {} if question.id == f"q{number}" else {"id": question.id}
    if question.category != GROUP:
        extra["category"] = question.category
    return {"question": question.text, "id": number} | ({EXTRA: extra} if extra else {})


def _extra(extra: dict[str, str], group: str) -> dict[str, Any]:
    if group != GROUP:
        extra = {"group": group, **extra}
    return {EXTRA: extra} if extra else {}


def _eval_prompt(template: str, name: str, criteria: str) -> str:
    """A whole judge prompt in which only {question} and {answer} are left to be filled in."""
    doubled = criteria.replace("{", "{{").replace("}", "}}")
    return template.format(name=name.replace("_", " "), criteria=doubled)
