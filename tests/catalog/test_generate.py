"""Draft, critique, revise, validate: with a scripted writer, and through the command against a real HTTP server."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from persona_axis.catalog.catalog import load_catalog
from persona_axis.catalog.generate import REVISIONS, Idea, generate, read_ideas
from persona_axis.catalog.texts import Role, Trait
from persona_axis.catalog.validate import validate
from persona_axis.errors import CatalogError, JudgeError, StorageError, UsageError
from persona_axis.llm.client import Answer, Failure, Prompt
from tests.catalog.small import good_role, good_trait, write_small_catalog
from tests.collect.fake_judge import JUDGE, FakeJudge, serving

CUT = "(cut)"  # marks a reply that ended at the token limit
FINE = json.dumps({"problems": []})


def role_json(role: Role) -> str:
    table = asdict(role)
    return json.dumps({key: table[key] for key in ("description", "prompts", "questions", "rubric")})


def trait_json(trait: Trait) -> str:
    table = asdict(trait)
    return json.dumps({key: table[key] for key in ("description", "opposite", "pairs", "questions", "evaluation")})


class Writer:
    """Answers each idea's prompts in turn from its row of replies, and remembers what it was asked."""

    def __init__(self, **replies: list[Any]) -> None:
        self.replies = {name: list(row) for name, row in replies.items()}
        self.asked: list[Prompt] = []

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[Answer | Failure]:
        for prompt in reversed(prompts):  # answers may come in any order
            self.asked.append(prompt)
            reply = self.replies[prompt.key].pop(0)
            if isinstance(reply, BaseException):
                raise reply
            yield (
                reply if isinstance(reply, Failure) else Answer(prompt.key, reply.removeprefix(CUT), 1, 1, CUT in reply)
            )


@pytest.fixture
def catalog(tmp_path: Path):
    root = write_small_catalog(tmp_path / "catalog")
    return load_catalog(root)


def written(out: Path, name: str) -> Role:
    return load_catalog(out).role(name)


def test_draft_critique_revise_accept(catalog, tmp_path: Path):
    bare = good_role("baker", description="A baker, too plainly said.")
    ask = Writer(baker=[role_json(bare), json.dumps({"problems": ["too plain"]}), role_json(good_role("baker"))])
    [outcome] = generate("role", [Idea("baker", "up at three")], tmp_path / "out", catalog, ask)
    assert (outcome.name, outcome.state) == ("baker", "accepted")
    assert written(tmp_path / "out", "baker") == replace(good_role("baker"), group="own")
    draft, critique, revision = (prompt.text for prompt in ask.asked)
    assert 'Write the role "baker". About it: up at three' in draft
    assert bare.description in critique
    assert "- too plain" in revision
    assert [prompt.answer.__name__ for prompt in ask.asked] == ["RoleDraft", "Critique", "RoleDraft"]


def test_a_good_draft_needs_no_revision_and_the_folder_is_a_catalog(catalog, tmp_path: Path):
    ask = Writer(baker=[role_json(good_role("baker")), FINE], waiter=[role_json(good_role("waiter")), FINE])
    outcomes = list(generate("role", [Idea("baker"), Idea("waiter")], tmp_path / "out", catalog, ask, group="food"))
    assert {(outcome.name, outcome.state) for outcome in outcomes} == {("baker", "accepted"), ("waiter", "accepted")}
    made = load_catalog(tmp_path / "out")
    assert made.groups == {"food": ("baker", "waiter")}
    assert (made.questions, made.default_prompts) == (catalog.questions, catalog.default_prompts)
    assert validate(made) == []


def test_traits_too(catalog, tmp_path: Path):
    ask = Writer(gruff=["```json\n" + trait_json(good_trait("gruff")) + "\n```", FINE])
    [outcome] = generate("trait", [Idea("gruff")], tmp_path / "out", catalog, ask)
    assert outcome.state == "accepted"
    trait = load_catalog(tmp_path / "out").trait("gruff")
    assert (trait.pairs, trait.group) == (good_trait("gruff").pairs, "own")


def test_findings_go_back_and_what_still_fails_is_rejected(catalog, tmp_path: Path):
    short = good_role("baker", description="Short.")
    bad = [role_json(short), FINE, *[role_json(short)] * REVISIONS]
    ask = Writer(baker=bad)
    [outcome] = generate("role", [Idea("baker")], tmp_path / "out", catalog, ask)
    assert (outcome.state, "description: 6 characters" in outcome.detail) == ("rejected", True)
    assert not (tmp_path / "out/roles").exists()
    assert "- role baker: description: 6 characters, 20 to 200 are allowed (lengths)" in ask.asked[2].text
    assert len(ask.asked) == 2 + REVISIONS
    silent = Writer()
    assert [o.state for o in generate("role", [Idea("baker")], tmp_path / "out", catalog, silent)] == ["rejected"]
    again = Writer(baker=[role_json(good_role("baker")), FINE])  # another line is another idea
    assert [o.state for o in generate("role", [Idea("baker", "new")], tmp_path / "out", catalog, again)] == ["accepted"]


def test_near_duplicates_of_the_catalog_and_of_siblings_are_refused(catalog, tmp_path: Path):
    question = catalog.role("cook").questions[1]
    copy = good_role("baker", questions=(*good_role("baker").questions[:39], question))
    ask = Writer(baker=[role_json(copy), FINE, role_json(good_role("baker"))])
    [outcome] = generate("role", [Idea("baker")], tmp_path / "out", catalog, ask)
    assert outcome.state == "accepted"
    assert "is like role cook: questions[1]" in ask.asked[2].text
    sibling = good_role("waiter", rubric=good_role("baker").rubric)
    ask = Writer(waiter=[role_json(sibling), FINE, role_json(good_role("waiter"))])
    [outcome] = generate("role", [Idea("waiter")], tmp_path / "out", catalog, ask)
    assert "is like role baker: rubric" in ask.asked[2].text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("Here it is!", "not the JSON that was asked for"),
        ("{}", "description: Field required"),
        (json.dumps({**json.loads(role_json(good_role())), "mood": 1}), "mood: Extra inputs are not permitted"),
        (CUT + '{"description": "A', "cut by the token limit"),
    ],
)
def test_answers_that_are_not_what_was_asked_for_are_asked_again(catalog, tmp_path: Path, answer: str, words: str):
    ask = Writer(baker=[answer, role_json(good_role("baker")), FINE])
    [outcome] = generate("role", [Idea("baker")], tmp_path / "out", catalog, ask)
    assert outcome.state == "accepted"
    assert words in ask.asked[1].text
    hopeless = Writer(waiter=[answer] * REVISIONS)
    [outcome] = generate("role", [Idea("waiter")], tmp_path / "out", catalog, hopeless)
    assert (outcome.state, words in outcome.detail) == ("rejected", True)


def test_a_failed_request_is_unfinished_and_goes_on(catalog, tmp_path: Path):
    draft = role_json(good_role("baker"))
    ask = Writer(baker=[draft, Failure("baker", "the reply has no content", True)])
    [outcome] = generate("role", [Idea("baker")], tmp_path / "out", catalog, ask)
    assert (outcome.state, outcome.detail) == ("unfinished", "the reply has no content")
    rest = Writer(baker=[FINE])
    assert [o.state for o in generate("role", [Idea("baker")], tmp_path / "out", catalog, rest)] == ["accepted"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), JudgeError("nobody there")])
def test_nothing_is_asked_twice_after_an_interruption(catalog, tmp_path: Path, error: BaseException):
    ideas = [Idea("baker"), Idea("waiter")]
    first = Writer(baker=[error], waiter=[role_json(good_role("waiter"))])
    with pytest.raises(type(error)):
        list(generate("role", ideas, tmp_path / "out", catalog, first))
    rest = Writer(baker=[role_json(good_role("baker")), FINE], waiter=[FINE])
    outcomes = list(generate("role", ideas, tmp_path / "out", catalog, rest))
    assert sorted(outcome.state for outcome in outcomes) == ["accepted", "accepted"]
    silent = generate("role", ideas, tmp_path / "out", catalog, Writer())
    assert [outcome.state for outcome in silent] == ["accepted", "accepted"]


def test_a_damaged_state_is_named(catalog, tmp_path: Path):
    file = tmp_path / "out/.generate/role/baker.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(StorageError, match=re.escape(str(file))):
        list(generate("role", [Idea("baker")], tmp_path / "out", catalog, Writer()))


def test_ideas(catalog, tmp_path: Path):
    file = tmp_path / "ideas.txt"
    file.write_text("# mine\nLighthouse Keeper: alone: very\n\nice-cream man\n")
    assert read_ideas([f"@{file}", "baker"]) == [
        Idea("lighthouse_keeper", "alone: very"),
        Idea("ice_cream_man"),
        Idea("baker"),
    ]
    for specs, words in (([], "no idea"), (["a", "A"], "named twice"), (["@nowhere"], "no such file")):
        with pytest.raises(UsageError, match=words):
            read_ideas(specs)
    with pytest.raises(CatalogError, match="lower-case"):
        read_ideas(["B\u00e4cker"])
    with pytest.raises(UsageError, match="has a role 'cook' already"):
        list(generate("role", [Idea("cook")], tmp_path / "out", catalog, Writer()))


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    """An OpenAI-compatible endpoint that writes `good_role` and finds nothing to criticise."""
    pytest.importorskip("inspect_ai.model")
    with serving() as server:
        server.reply = well_written
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def well_written(prompt: str) -> str:
    name = re.search(r'(?:Write the|draft of the) role "([a-z ]+)"', prompt)[1].replace(" ", "_")
    return FINE if "key problems" in prompt else role_json(good_role(name))


def start(catalog: Path, out: Path, *ideas: str) -> subprocess.Popen:
    argv = ["-c", "from persona_axis.cli.app import main; main()"]
    argv += ["catalog", "generate", "role", *ideas, "--out", str(out)]
    argv += ["--model", JUDGE, "--catalog", str(catalog), "--connections", "1"]
    return subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_command_goes_on_and_asks_nothing_twice(server: FakeJudge, catalog, tmp_path: Path):
    out = tmp_path / "out"
    killed_now = threading.Event()

    def hang_after_three(prompt: str) -> str:
        """Two drafts and one critique are answered; the next request only after the kill."""
        if len(server.prompts) > 3:
            killed_now.wait(60)
        return well_written(prompt)

    server.reply = hang_after_three
    killed = start(catalog.folder, out, "baker", "waiter")
    wait_for(lambda: len(server.bodies) > 3 and len(list(out.glob("roles/*/*.toml"))) == 1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    killed_now.set()
    server.reply = well_written
    before = len(server.bodies)
    done = start(catalog.folder, out, "baker", "waiter")
    stdout, stderr = done.communicate(timeout=120)
    assert done.returncode == 0, stderr
    assert len(server.bodies) - before == 1  # the critique that never came
    assert sorted(line.split(": ")[:2] for line in stdout.splitlines()) == [
        ["baker", "accepted"],
        ["waiter", "accepted"],
    ]
    assert load_catalog(out).groups == {"own": ("baker", "waiter")}
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert set(schema["required"]) == {"description", "prompts", "questions", "rubric"}


def test_the_command_says_what_is_not_written(server: FakeJudge, catalog, tmp_path: Path):
    server.reply = lambda prompt: "I would rather not."
    ended = start(catalog.folder, tmp_path / "out", "baker")
    stdout, stderr = ended.communicate(timeout=120)
    assert ended.returncode == 3
    assert stdout.startswith("baker: rejected: not the JSON that was asked for")
    assert "1 of 1 are not written" in stderr
    assert len(server.bodies) == REVISIONS
