"""The plan: who is asked what, in which order, for how much; and its file."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import make_questions, make_roles, small_plan

from persona_axis.collect.plan import (
    BLOCK_QUESTIONS,
    DEFAULT,
    MIN_BLOCKS,
    SHARD_ROWS,
    Plan,
    balanced,
    fit_budget,
    make_plan,
    plan_summary,
)
from persona_axis.errors import StorageError, UsageError

NEUTRAL = ("", "Help.", "Answer me.", "Be kind.")

layouts = st.fixed_dictionaries(
    {
        "n_roles": st.integers(3, 6),
        "prompts_each": st.integers(1, 5),
        "n_questions": st.integers(MIN_BLOCKS, 40),
        "n_own": st.integers(1, 3),
        "n_neutral": st.integers(1, 4),
        "design": st.sampled_from(["rotated", "crossed"]),
        "own_questions": st.booleans(),
        "keep_all": st.booleans(),
        "seed": st.integers(0, 10),
    }
)


def lay_out(layout: dict[str, Any]) -> Plan:
    roles = make_roles(layout["n_roles"], layout["prompts_each"], layout["n_own"])
    options = {name: layout[name] for name in ("design", "own_questions", "keep_all", "seed")}
    return make_plan(roles, make_questions(layout["n_questions"]), NEUTRAL[: layout["n_neutral"]], **options)


# ---- who is asked what -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_each_role_answers_each_question_under_the_prompts_of_the_design(layout: dict[str, Any]) -> None:
    plan = lay_out(layout)
    prompts = layout["prompts_each"]
    asked = layout["n_questions"] + layout["n_own"] * layout["own_questions"]
    for role in make_roles(layout["n_roles"], prompts, layout["n_own"]):
        mine = [row for row in plan.rows if row.persona == role.name]
        times = Counter(row.question_id for row in mine)
        assert set(times.values()) == {1 if layout["design"] == "rotated" else prompts}
        assert len(times) == asked
        per_prompt = Counter(row.prompt_index for row in mine)
        assert max(per_prompt.values()) - min(per_prompt.get(p, 0) for p in range(prompts)) <= 1
        assert all(row.system_prompt == role.prompts[row.prompt_index] for row in mine)
        assert {(row.group, row.rubric) for row in mine} == {(role.group, role.rubric)}


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_the_default_persona_answers_everything_under_every_neutral_prompt(layout: dict[str, Any]) -> None:
    plan = lay_out(layout)
    mine = [row for row in plan.rows if row.persona == DEFAULT]
    shared = [row for row in mine if row.category != "own"]
    assert Counter((row.system_prompt, row.question) for row in shared) == Counter(
        (prompt, q.text) for prompt in NEUTRAL[: layout["n_neutral"]] for q in make_questions(layout["n_questions"])
    )
    assert plan.personas[0] == DEFAULT
    assert plan.rows[: len(mine)] == tuple(mine)
    assert all(row.group == row.rubric == "" for row in mine)


@settings(max_examples=30, deadline=None)
@given(layouts)
def test_own_questions_are_put_to_their_role_and_the_default_persona(layout: dict[str, Any]) -> None:
    plan = lay_out({**layout, "own_questions": True})
    assert all(row.category == "own" for row in plan.rows if row.question_id.startswith("bard:"))
    for role in make_roles(layout["n_roles"], layout["prompts_each"], layout["n_own"]):
        for text in role.questions:
            rows = [row for row in plan.rows if row.question == text]
            assert {row.persona for row in rows} == {DEFAULT, role.name}  # so no cell stands alone
            assert sum(row.persona == DEFAULT for row in rows) == 1
    assert not any(row.category == "own" for row in lay_out({**layout, "own_questions": False}).rows)


def test_prompts_are_not_tied_to_question_categories() -> None:
    # Two prompts dealt in catalog order would each meet one category only.
    plan = small_plan(4, 40)
    for role in make_roles(4):
        met = {(row.prompt_index, row.category) for row in plan.rows if row.persona == role.name}
        assert len(met) == 4


def test_the_seed_deals_prompts_and_nothing_else() -> None:
    first, again, other = (small_plan(4, 20, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [(r.persona, r.question) for r in sorted(first.rows, key=lambda r: (r.persona, r.question))] == [
        (r.persona, r.question) for r in sorted(other.rows, key=lambda r: (r.persona, r.question))
    ]


def test_only_the_prompts_asked_for_are_used() -> None:
    plan = make_plan(make_roles(3, prompts=4), make_questions(), NEUTRAL, prompts=[3, 1])
    used = Counter((row.persona, row.prompt_index) for row in plan.rows if row.persona != DEFAULT)
    assert set(used.values()) == {4}
    assert {prompt for _, prompt in used} == {1, 3}
    crossed = make_plan(make_roles(3, prompts=4), make_questions(), NEUTRAL, prompts=[2], design="crossed")
    assert {row.prompt_index for row in crossed.rows if row.persona != DEFAULT} == {2}


# ---- keys, shards, blocks ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_keys_are_unique_shards_full_and_blocks_sound(layout: dict[str, Any]) -> None:
    plan = lay_out(layout)
    assert len({row.key for row in plan.rows}) == len(plan.rows)
    shards = list(plan.shards())
    assert [number for number, _ in shards] == list(range(plan.n_shards))
    assert [row for _, rows in shards for row in rows] == list(plan.rows)
    assert {len(rows) for _, rows in shards[:-1]} <= {SHARD_ROWS}
    assert 1 <= len(shards[-1][1]) <= SHARD_ROWS
    assert all(row.shard == number for number, rows in shards for row in rows)

    index = {row.question_id: (row.question_index, row.block) for row in plan.rows}
    assert all(index[row.question_id] == (row.question_index, row.block) for row in plan.rows)
    assert sorted(i for i, _ in index.values()) == list(range(len(index)))
    blocks = [block for _, block in sorted(index.values())]
    assert blocks[0] == 0
    assert all(0 <= after - before <= 1 for before, after in pairwise(blocks))
    assert plan.n_blocks == blocks[-1] + 1 >= MIN_BLOCKS  # as many as folds
    most = max(Counter(blocks).values())
    assert most == 1 if layout["keep_all"] else most <= BLOCK_QUESTIONS


def test_rollouts_of_one_system_prompt_stand_together() -> None:
    # Their common prefix is prefilled once.
    plan = small_plan(4, 20)
    runs = [(row.persona, row.prompt_index) for row in plan.rows]
    changes = sum(a != b for a, b in pairwise(runs))
    assert changes == len(set(runs)) - 1


def test_the_summary_counts() -> None:
    plan = small_plan(4, 20)
    assert plan_summary(plan) == {
        "rollouts": 4 * 20 + 3 * 20,
        "personas": 5,
        "blocks": 20,
        "shards": 3,
        "digest": plan.digest(),
    }


# ---- digest and file ---------------------------------------------------------------------------------------------


def test_the_digest_is_the_same_in_every_process() -> None:
    # A change here makes every existing run folder refuse its own command: that needs a reason.
    assert small_plan(3, 5).digest() == "33a2f819c4868a13adc2d689309d324e2a72d496702d571efe7916346b94ca6d"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_digest_sees_every_field_of_every_row(data: st.DataObject) -> None:
    plan = small_plan(3, 5)
    i = data.draw(st.integers(0, len(plan.rows) - 1))
    name = data.draw(st.sampled_from([field.name for field in fields(plan.rows[0])]))
    value = getattr(plan.rows[i], name)
    changed = replace(plan.rows[i], **{name: value + 1 if isinstance(value, int) else value + " "})
    assert Plan((*plan.rows[:i], changed, *plan.rows[i + 1 :])).digest() != plan.digest()


def test_the_digest_sees_the_order() -> None:
    plan = small_plan(3, 5)
    assert Plan(plan.rows[::-1]).digest() != plan.digest()


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=25, deadline=None)
@given(system=texts, question=texts)
def test_a_plan_survives_its_file(tmp_path_factory: pytest.TempPathFactory, system: str, question: str) -> None:
    plan = small_plan(3, 5, keep_all=False, own_questions=True)
    plan = Plan(tuple(replace(row, system_prompt=system, question=question) for row in plan.rows))
    path = tmp_path_factory.mktemp("plan") / "plan.parquet"
    plan.write(path)
    read = Plan.read(path)
    assert read == plan
    assert read.digest() == plan.digest()


def test_a_damaged_plan_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    with pytest.raises(FileNotFoundError):
        Plan.read(path)
    small_plan().write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=r"plan\.parquet is damaged .* Delete it and run the same command"):
        Plan.read(path)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"roles": make_roles(2)}, "at least 3 roles, not 2"),
        ({"questions": make_questions(4)}, "4 questions are too few"),
        ({"default_prompts": []}, "no default prompt"),
        ({"roles": [*make_roles(3), replace(make_roles(1)[0], name=DEFAULT)]}, "cannot be called 'default'"),
        ({"prompts": [0, 2]}, "Role bard has prompts 0 to 1, not 2"),
        ({"prompts": [-1]}, "Role bard has prompts 0 to 1, not -1"),
        ({"prompts": []}, "at least one"),
        ({"prompts": [1, 1]}, "each once"),
    ],
)
def test_impossible_plans_are_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"roles": make_roles(3), "questions": make_questions(5), "default_prompts": [""]}
    make_plan(**given)
    with pytest.raises(UsageError, match=words):
        make_plan(**{**given, **change})


# ---- budget ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(layout=layouts, budget=st.integers(1, 400))
def test_a_budget_buys_as_many_questions_as_it_pays_for(layout: dict[str, Any], budget: int) -> None:
    roles = make_roles(layout["n_roles"], layout["prompts_each"], layout["n_own"])
    everything = make_questions(layout["n_questions"])
    neutral = NEUTRAL[: layout["n_neutral"]]
    asks = 1 if layout["design"] == "rotated" else layout["prompts_each"]
    each = len(roles) * asks + len(neutral)
    fixed = len(roles) * layout["n_own"] * (asks + 1) if layout["own_questions"] else 0

    def cost(n: int) -> int:
        options = {name: layout[name] for name in ("design", "own_questions")}
        return len(make_plan(roles, everything[:n], neutral, **options).rows)

    if cost(MIN_BLOCKS) > budget:
        with pytest.raises(UsageError, match=f"at least {cost(MIN_BLOCKS)} rollouts"):
            fit_budget(budget, everything, each, fixed)
        return
    kept = fit_budget(budget, everything, each, fixed)
    assert cost(len(kept)) <= budget
    assert len(kept) == len(everything) or cost(len(kept) + 1) > budget


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=30), st.data())
def test_questions_are_cut_evenly_by_category(categories: list[str], data: st.DataObject) -> None:
    questions = make_questions(len(categories), categories)
    n = data.draw(st.integers(1, len(questions)))
    kept = balanced(questions, n)
    assert len(kept) == n
    assert kept == [q for q in questions if q in kept]  # in their order, none twice
    have, left = Counter(categories), Counter(q.category for q in kept)
    # A category has fewer than another only when it has no more to give.
    for category in have:
        assert left[category] == have[category] or left[category] >= max(left.values()) - 1
        assert [q for q in kept if q.category == category] == [q for q in questions if q.category == category][
            : left[category]
        ]
