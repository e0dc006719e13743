"""A policy on the model it was made for, on another of its shape, and on one it cannot fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from persona_axis.errors import UsageError
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering.compatibility import check_fits
from persona_axis.steering.interventions import cap
from persona_axis.steering.policy import Policy

HERE = ModelIdentity("org/model", "abc", "", 4, 8)


def a_policy(model: ModelIdentity | None, layer: int = 3, width: int = 8) -> Policy:
    return Policy((cap(layer, torch.arange(1.0, width + 1), 0.5),), model=model)


@pytest.mark.parametrize("model", [None, HERE, replace(HERE, n_layers=None, d_model=None)])
def test_its_own_model_and_a_policy_that_claims_nothing_fit(model: ModelIdentity | None) -> None:
    policy = a_policy(model)
    record = check_fits(policy, HERE)
    assert (record.policy_hash, record.made_for, record.model) == (policy.content_hash, model, HERE)
    assert (record.allowed, record.differences, record.not_compared) == (False, (), ())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "org/other"}, "Its model is org/other, the loaded model's org/model."),
        ({"revision": "def"}, "Its revision is def, the loaded model's abc."),
        ({"quantisation": "fp8"}, "Its quantisation is fp8, the loaded model's none."),
    ],
)
def test_another_model_is_refused_with_the_difference_unless_it_is_named(change: dict[str, str], sentence: str) -> None:
    policy = a_policy(replace(HERE, **change))
    with pytest.raises(UsageError, match=f"{re.escape(sentence)}.*--allow-model 'org/model'"):
        check_fits(policy, HERE)
    record = check_fits(policy, HERE, allow_model="org/model")
    assert (record.allowed, record.differences) == (True, (sentence,))
    assert sentence in str(record)


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"Its model .* Its revision .* Its quantisation"):
        check_fits(a_policy(ModelIdentity("a", "b", "c", 4, 8)), HERE)


def test_permission_for_a_model_that_is_not_loaded_is_refused() -> None:
    for model in (None, HERE, replace(HERE, name="org/other")):
        with pytest.raises(UsageError, match="allowed is 'org/third', but 'org/model' is loaded"):
            check_fits(a_policy(model), HERE, allow_model="org/third")


def test_what_one_side_does_not_say_is_listed() -> None:
    record = check_fits(a_policy(ModelIdentity("org/model", d_model=8)), HERE)
    assert record.not_compared == ("revision", "quantisation")
    unnamed = check_fits(a_policy(HERE), ModelIdentity("", "", "", 4, 8))
    assert unnamed.not_compared == ("model", "revision")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (a_policy(None, layer=4), "names layer 4; the model has 0 to 3"),
        (a_policy(None, width=9), "width 9, the model's residual 8"),
        (a_policy(replace(HERE, n_layers=5)), "a model of 5 layers .* has 4"),
    ],
)
def test_another_shape_is_refused_whatever_is_allowed(policy: Policy, words: str) -> None:
    for allow in (None, "org/model"):
        with pytest.raises(UsageError, match=words):
            check_fits(policy, HERE, allow_model=allow)


def test_the_record_is_json() -> None:
    record = check_fits(a_policy(replace(HERE, name="org/other")), HERE, "org/model").to_dict()
    assert json.loads(json.dumps(record)) == record
    assert record["allowed_other_model"] is True
