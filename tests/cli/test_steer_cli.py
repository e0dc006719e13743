"""``steer`` and ``cap``: both replies with their projections, and what the policy did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_axis.cli.holding import ranges
from persona_axis.geometry.axis import Axis
from persona_axis.model.engine import Sampling
from persona_axis.model.fallback import plain_generate
from persona_axis.model.identity import ModelIdentity
from persona_axis.model.layers import tapped
from persona_axis.model.loading import ChatModel, load_model
from persona_axis.steering.hooks import steer
from persona_axis.steering.policy import Policy
from tests.cli.conftest import Invoke

SLACK = 2e-3
POOL = {"n": 40, "percentiles": {str(p): [p - 50.0] * 4 for p in (5, 25, 50, 75, 95)}}


@pytest.fixture(scope="module")
def chat(model_folder: Path) -> ChatModel:
    return load_model(str(model_folder), dtype="float32", device="cpu")


@pytest.fixture
def axis(tmp_path: Path, chat: ChatModel) -> Axis:
    """Saved as axis.safetensors beside what else the test writes."""
    vectors = 3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    known = {"model": chat.name, "revision": chat.revision, "pool": POOL, "residual_norms": [2.0, 4.0, 8.0, 16.0]}
    axis = Axis(vectors, (0, 1, 2, 3), 2, known)
    axis.save(tmp_path / "axis.safetensors")
    return axis


@pytest.fixture
def words(axis: Axis, tmp_path: Path, model_folder: Path) -> list[str]:
    """What every command here is given."""
    where = ["--model", str(model_folder), "--dtype", "float32", "--device", "cpu", "--max-tokens", "8"]
    return [str(tmp_path / "axis.safetensors"), *where]


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@torch.inference_mode()
def expected(chat: ChatModel, axis: Axis, question: str, system: str) -> tuple[str, float]:
    """The greedy reply and its mean projection, by generate and a forward over all of it, as the model is steered."""
    ids = chat.template.prompt_ids(chat.template.messages(system, question))
    made = plain_generate(chat, torch.tensor([ids]), Sampling(8, temperature=0)).sequences[0].tolist()
    seen: list[torch.Tensor] = []
    with tapped([chat.blocks[axis.layer]], lambda i, hidden: seen.append(hidden[0, len(ids) :].clone())):
        chat.model(input_ids=torch.tensor([made[:-1]]))
    return chat.decode(made[len(ids) :]), float(axis.project(seen[0]).mean())


def test_steer_shows_both_replies(invoke: Invoke, words: list[str], chat: ChatModel) -> None:
    ended = invoke("steer", *words, "--strength", "-3", "--unit", "norm", "Who?", "Why?")
    assert ended.code == 0
    assert ended.err == "steered: steered by -3 x the mean norm at layer 2\n"
    assert ended.out.startswith("> Who?\n\nplain, layer 2: ")
    assert ended.out.count("\nsteered, layer 2: ") == 2
    assert "\n\n> Why?\n" in ended.out
    assert "of 40 replies" in ended.out
    assert "corrected" not in ended.out


def test_steer_as_json_says_what_the_model_does(invoke: Invoke, words: list[str], chat: ChatModel, axis: Axis) -> None:
    asked = ["Who are you?", "Why is that so?"]
    ended = invoke("steer", *words, "--strength", "-6", "--layer", "1", "--system", "Be odd.", "--json", *asked)
    assert (ended.code, ended.err) == (0, "")
    found = rows(ended.out)
    assert [(r["question"], r["way"]) for r in found] == [(q, w) for q in asked for w in ("plain", "steered")]
    for row in found:
        steering = row["intervention"]
        assert (steering is None) == (row["way"] == "plain")
        strength = 0.0 if steering is None else -6.0
        with steer(chat, axis, 1, strength):
            text, projection = expected(chat, axis, row["question"], "Be odd.")
        assert text.startswith(row["reply"])  # the stop tokens of this model have text
        assert row["projection"] == pytest.approx(projection, abs=SLACK)
        if steering is not None:
            assert {key: steering[key] for key in ("kind", "strength", "unit", "layers")} == {
                "kind": "steer",
                "strength": -6.0,
                "unit": "raw",
                "layers": [1],
            }
    assert found[0]["reply"] != found[1]["reply"]
    assert found[0]["model"] == chat.name
    nothing = rows(invoke("steer", *words, "--strength", "0", "--json", "Who are you?").out)
    assert nothing[0]["reply"] == nothing[1]["reply"]
    assert nothing[0]["projection"] == nothing[1]["projection"]


def test_the_same_draws_for_both(invoke: Invoke, words: list[str]) -> None:
    warm = ["--temperature", "1", "--top-p", "1", "--strength", "0", "--json"]
    first, second = (rows(invoke("steer", *words, *warm, "--seed", seed, "Who?").out) for seed in (1, 2))
    assert first[0]["reply"] == first[1]["reply"] != second[0]["reply"]


def test_cap_at_a_percentile(invoke: Invoke, words: list[str]) -> None:
    capped = ["--layers", "1-2", "--percentile", "95"]
    ended = invoke("cap", *words, *capped, "Who are you?")
    assert ended.code == 0
    assert "capped: held at layers 1-2; policy " in ended.err
    assert "floors: percentile 95 toward the Assistant, 5 as the paper counts (on the negated axis)\n" in ended.out
    assert "  layer   1        +45.00  100 % of tokens corrected\n" in ended.out
    plain, held = rows(invoke("cap", *words, *capped, "--json", "Who are you?").out)
    assert plain["intervention"] is None
    found = held["intervention"]
    assert (found["percentile_assistant"], found["percentile_paper"], found["positions"]) == (95, 5, "all")
    assert [(at["layer"], at["lo"], at["hi"]) for at in found["at"]] == [(1, [45.0], [None]), (2, [45.0], [None])]
    assert found["at"][0]["share_corrected"] == 1
    assert found["compatibility"]["policy_hash"] == found["policy"]
    assert found["compatibility"]["allowed_other_model"] is False
    low = rows(invoke("cap", *words, "--layers", "1", "--percentile", "5", "--json", "Who are you?").out)
    assert low[1]["intervention"]["at"][0]["share_corrected"] < 1
    assert (
        rows(invoke("cap", *words, "--layers", "1", "--json", "Hm?").out)[1]["intervention"]["percentile_paper"] == 25
    )


def test_cap_with_a_saved_policy(
    invoke: Invoke, words: list[str], axis: Axis, tmp_path: Path, model_folder: Path
) -> None:
    policy = Policy.at_percentile(axis, [1, 3], 75)
    policy.save(tmp_path / "run" / "calibration" / "policy")
    axis.save(tmp_path / "run" / "fit" / "axis.safetensors")
    for argv in ([*words, "--policy", tmp_path / "run"], [tmp_path / "run", *words[1:]]):
        _, held = rows(invoke("cap", *argv, "--json", "Who?").out)
        assert held["intervention"]["policy"] == policy.content_hash


def test_a_policy_of_another_model_needs_to_be_allowed(
    invoke: Invoke, words: list[str], axis: Axis, chat: ChatModel, tmp_path: Path
) -> None:
    policy = Policy.at_percentile(axis, [1], 75)
    Policy(policy.interventions, policy.provenance, "all", ModelIdentity("a/b", d_model=32)).save(tmp_path / "other")
    argv = ["cap", *words, "--policy", tmp_path / "other", "--json", "Who?"]
    refused = invoke(*argv)
    assert (refused.code, refused.out) == (2, "")
    assert "made for another model" in refused.message
    allowed = invoke(*argv, "--allow-model", chat.name)
    assert allowed.code == 0
    assert "note: Held with a policy of another model, as allowed: Its model is a/b" in allowed.err
    record = rows(allowed.out)[1]["intervention"]["compatibility"]
    assert record["allowed_other_model"] is True
    assert record["made_for"]["name"] == "a/b"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["steer", "--strength", "1", "--unit", "feet", "Hm?"], "--unit 'feet': choose raw"),
        (["steer", "--strength", "nan", "Hm?"], "--strength nan: a finite number"),
        (["steer", "--strength", "1", "--layer", "9", "Hm?"], "This axis has no layer 9"),
        (["steer", "--strength", "1", "--temperature", "-1", "Hm?"], "--temperature must be 0"),
        (["steer", "--strength", "1", "--top-p", "0", "Hm?"], "--top-p must be in"),
        (["cap", "Hm?"], "holds no calibrated policy. Name one (--policy), or say where to cap: --layers 2-3"),
        (["cap", "--percentile", "50", "Hm?"], "--layers must say at which layers"),
        (["cap", "--layers", "1", "--percentile", "51", "Hm?"], "no percentile 51"),
        (["cap", "--layers", "9", "Hm?"], "no layer 9"),
        (["cap", "--policy", "nowhere", "--layers", "1", "Hm?"], "leave --layers and --percentile out"),
    ],
)
def test_mistakes(invoke: Invoke, words: list[str], argv: list[str], said: str) -> None:
    ended = invoke(argv[0], *words, *argv[1:])
    assert ended.code == 2
    assert said in ended.message
    assert ended.out == ""


def test_an_axis_without_its_model_or_norms(invoke: Invoke, words: list[str], tmp_path: Path, axis: Axis) -> None:
    Axis(axis.vectors, axis.layers, 2, {"model": "mine"}).save(tmp_path / "bare.safetensors")
    unnamed = invoke("steer", tmp_path / "bare.safetensors", "--strength", "1", "Hm?")
    assert (unnamed.code, "called 'mine'. Name the model: --model" in unnamed.message) == (2, True)
    normless = invoke("steer", tmp_path / "bare.safetensors", *words[1:], "--strength", "1", "--unit", "norm", "Hm?")
    assert normless.code == 2
    assert "does not say the model's residual norms" in normless.message
    assert "note: This axis was made on another model (mine," in normless.err


def test_ranges() -> None:
    assert [ranges(numbers) for numbers in ((4,), (4, 5), (1, 4, 5, 6, 9))] == ["4", "4-5", "1,4-6,9"]
