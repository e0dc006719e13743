"""Policies: what they hold, and percentiles from the run they belong to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persona_axis.errors import UsageError
from persona_axis.geometry.axis import Axis
from persona_axis.model.identity import ModelIdentity
from persona_axis.steering.interventions import add, cap
from persona_axis.steering.policy import Policy

POOL = {"n": 345, "percentiles": {"25": [-1.0, -2.0, -3.0], "75": [1.0, 2.0, 3.0]}}


def an_axis(**metadata: Any) -> Axis:
    vectors = 5 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    return Axis(vectors, (2, 4, 7), 4, metadata)


def test_a_cap_policy_holds_each_layer_at_its_own_floor() -> None:
    axis = an_axis(model="tiny")
    policy = Policy.cap(axis, {7: -0.5, 2: 1.5}, note="by hand")
    assert policy.layers == (2, 7)
    for here, floor in zip(policy.interventions, (1.5, -0.5), strict=True):
        torch.testing.assert_close(here.V, axis.unit(here.layer)[None])
        assert here.lo.tolist() == [floor]
        assert here.hi.tolist() == [torch.inf]
        assert here.shift.tolist() == [0]
    assert policy.provenance == {
        "kind": "cap",
        "axis": {"model": "tiny"},
        "axis_hash": axis.content_hash,
        "note": "by hand",
    }
    assert policy.model == ModelIdentity("tiny", d_model=8)


@pytest.mark.parametrize("layers", [[], [3, 1], [1, 1], [1, 2, 2]])
def test_a_policy_needs_one_intervention_per_layer_in_order(layers: list[int]) -> None:
    direction = torch.arange(1.0, 5)
    with pytest.raises(UsageError, match="one intervention per layer, ascending"):
        Policy(tuple(add(layer, direction, 1.0) for layer in layers))


def test_kinds_may_be_mixed() -> None:
    direction = torch.arange(1.0, 5)
    assert Policy((add(1, direction, 1.0), cap(3, direction, 0.0))).layers == (1, 3)


def test_a_cap_without_floors_or_on_a_layer_the_axis_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="one intervention per layer"):
        Policy.cap(an_axis(), {})
    with pytest.raises(UsageError, match="no layer 3"):
        Policy.cap(an_axis(), {2: 0.0, 3: 0.0})


def test_percentiles_are_those_of_the_layer() -> None:
    policy = Policy.at_percentile(an_axis(pool=POOL), [7, 2, 2])
    assert policy.layers == (2, 7)
    assert [i.lo.item() for i in policy.interventions] == [1.0, 3.0]
    low = Policy.at_percentile(an_axis(pool=POOL), [4], percentile=25)
    assert [i.lo.item() for i in low.interventions] == [-2.0]


def test_percentiles_are_told_in_both_directions() -> None:
    provenance = Policy.at_percentile(an_axis(pool=POOL), [4]).provenance
    assert (provenance["percentile_assistant"], provenance["percentile_paper"], provenance["pool"]) == (75, 25, 345)
    assert provenance["kind"] == "cap"


def test_what_the_axis_does_not_carry_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no percentile 60 .*\(it has 25, 75\)"):
        Policy.at_percentile(an_axis(pool=POOL), [4], percentile=60)
    with pytest.raises(UsageError, match="does not come from a run"):
        Policy.at_percentile(an_axis(), [4])
    with pytest.raises(UsageError, match="no layer 5"):
        Policy.at_percentile(an_axis(pool=POOL), [4, 5])
    with pytest.raises(UsageError, match="one intervention per layer"):
        Policy.at_percentile(an_axis(pool=POOL), [])
