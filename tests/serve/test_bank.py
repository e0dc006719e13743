"""The policy bank: what is written, who keeps a slot, and what is refused before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from small_policies import WIDTH, made
from torch import Tensor

from persona_axis.errors import UsageError
from persona_axis.serve.vllm.bank import Bank, bank_hash
from persona_axis.steering.interventions import Intervention
from persona_axis.steering.op import intervene_
from persona_axis.steering.policy import Policy

N_LAYERS = 4


def a_bank(layers: Sequence[int] = range(N_LAYERS), max_policies: int = 3, max_directions: int = 2) -> Bank:
    return Bank(layers, N_LAYERS, WIDTH, max_policies, max_directions, torch.device("cpu"))


def content(bank: Bank) -> list[Tensor]:
    return [t.clone() for t in (bank.V, bank.lo, bank.hi, bank.shift, bank.touches)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_holds(bank: Bank, slot: int, policy: Policy) -> None:
    """Bit for bit, at the policy's layers that this process has; off at all others."""
    parts = {part.layer: part for part in policy.interventions}
    for i, layer in enumerate(bank.layers):
        part = parts.get(layer)
        assert bank.touches[i, slot] == (0 if part is None else slot)
        k = 0 if part is None else len(part.V)
        if part is not None:
            for name in ("V", "lo", "hi", "shift"):
                assert torch.equal(getattr(bank, name)[i, slot, :k], getattr(part, name)), name
        assert not bank.V[i, slot, k:].any()
        assert (bank.lo[i, slot, k:] == -math.inf).all()
        assert (bank.hi[i, slot, k:] == math.inf).all()
        assert not bank.shift[i, slot, k:].any()


# ---- content --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cap", "band", "add", "all"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_policy_is_written_as_it_is(kind: str, k: int) -> None:
    bank, policy = a_bank(), made(3, (0, 2, 3), kind, k=k)
    entry = bank.load("p", policy)
    assert_holds(bank, entry.slot_for(1), policy)
    assert entry.layers == (0, 2, 3)
    assert entry.directions == {0: k, 2: k, 3: k}
    assert bank.loaded == {"p": policy.content_hash}
    assert bank[policy.content_hash] is entry


def test_an_empty_bank_is_off() -> None:
    bank = a_bank()
    assert not bank.touches.any()
    assert bank.loaded == {}
    with pytest.raises(KeyError):
        bank[made().content_hash]


def test_a_smaller_policy_leaves_nothing_of_the_slots_former_one() -> None:
    bank = a_bank(max_policies=1)
    bank.load("old", made(1, (0, 1, 2, 3), "all", k=2))
    bank.unload("old")
    new = made(2, (2,), "cap", k=1)
    assert_holds(bank, bank.load("new", new).slot_for(1), new)


def test_tensors_stay_where_they_are() -> None:
    bank = a_bank(max_policies=1)
    where = [t.data_ptr() for t in (bank.V, bank.lo, bank.hi, bank.shift, bank.touches)]
    for seed in range(3):
        bank.load("p", made(seed))
        bank.unload("p")
    assert where == [t.data_ptr() for t in (bank.V, bank.lo, bank.hi, bank.shift, bank.touches)]


def test_a_pipeline_stage_keeps_its_own_layers_under_their_global_numbers() -> None:
    bank, policy = a_bank(layers=(2, 3)), made(1, (0, 1, 3), "all")
    entry = bank.load("p", policy)
    assert_holds(bank, entry.slot_for(1), policy)
    assert bank.touches[:, entry.slot].tolist() == [0, entry.slot]
    assert entry.layers == (0, 1, 3)
    elsewhere = made(2, (0,))
    assert not bank.touches[:, bank.load("elsewhere", elsewhere).slot].any()
    assert bank.loaded == {"p": policy.content_hash, "elsewhere": elsewhere.content_hash}


@pytest.mark.parametrize("kind", ["cap", "add", "all"])
def test_a_watching_slot_projects_and_changes_nothing(kind: str) -> None:
    bank, policy = a_bank(), made(5, (1,), kind, k=2)
    entry = bank.load("p", policy)
    hold, watch = entry.slot_for(1), entry.slot_for(0)
    assert hold != watch
    hidden = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))
    p, before = torch.zeros(8, 2), hidden.clone()
    part = policy.interventions[0]
    for slot, moved in ((watch, False), (hold, True)):
        slots = torch.full([8], slot, dtype=torch.int32)
        intervene_(hidden, bank.V[1], bank.lo[1], bank.hi[1], bank.shift[1], slots, projections=p)
        torch.testing.assert_close(p, before @ part.V.T)
        assert torch.equal(hidden, before) != moved
    assert bank.touches[1, [hold, watch]].tolist() == [hold, watch]


# ---- replacing ------------------------------------------------------------------------------------------------------


def test_the_same_content_again_changes_nothing() -> None:
    bank = a_bank(max_policies=1)
    entry, before = bank.load("p", made(1)), content(bank)
    assert bank.load("p", made(1)) is entry
    assert same(content(bank), before)


def test_the_same_content_under_two_names_is_two_entries() -> None:
    bank = a_bank()
    one, other = bank.load("a", made(1)), bank.load("b", made(1))
    assert one.slot != other.slot
    assert bank.loaded == {"a": one.content_hash, "b": one.content_hash}
    bank.unload("b")
    bank.load("c", made(2))
    bank.load("d", made(3))  # takes b's slot
    assert bank[one.content_hash] is one


def test_a_replaced_policy_keeps_its_slot_while_requests_run_under_it() -> None:
    bank, old, new = a_bank(max_policies=2), made(1, kind="all"), made(2, (0,))
    running = bank.load("p", old)
    running.users += 1
    entry = bank.load("p", new)
    assert bank.loaded == {"p": new.content_hash}
    assert_holds(bank, entry.slot, new)
    assert_holds(bank, running.slot, old)
    with pytest.raises(UsageError, match="1 of them by replaced policies that requests still run under"):
        bank.load("q", made(3))
    assert_holds(bank, running.slot, old)
    running.users -= 1
    assert bank.load("q", made(3)).slot == running.slot
    with pytest.raises(KeyError):
        bank[old.content_hash]


def test_the_slot_of_a_replaced_policy_is_reused_last_of_all() -> None:
    """Requests that were checked before it was replaced, and arrive after, find it as long as can be."""
    bank = a_bank(max_policies=3)
    old = bank.load("p", made(1))
    bank.load("p", made(2))
    assert bank[old.content_hash] is old
    assert bank.load("q", made(3)).slot != old.slot
    assert bank[old.content_hash] is old
    assert bank.load("r", made(4)).slot == old.slot


def test_of_replaced_policies_the_oldest_makes_room() -> None:
    bank = a_bank(max_policies=3)
    first, second = bank.load("p", made(1)), bank.load("p", made(2))
    bank.load("p", made(3))
    assert bank.load("q", made(4)).slot == first.slot
    assert bank[second.content_hash] is second


def test_content_that_comes_back_is_loaded_again() -> None:
    bank = a_bank()
    old = bank.load("p", made(1))
    bank.load("p", made(2))
    again = bank.load("p", made(1))
    assert bank.loaded == {"p": old.content_hash}
    assert_holds(bank, bank[old.content_hash].slot, made(1))
    assert not again.retired
    assert bank[old.content_hash] is again


def test_unloading_what_is_not_loaded_is_refused() -> None:
    bank = a_bank()
    bank.load("p", made(1))
    with pytest.raises(UsageError, match=r"'q'.*loaded: p"):
        bank.unload("q")
    bank.unload("p")
    assert bank.loaded == {}
    with pytest.raises(UsageError, match="loaded: none"):
        bank.unload("p")


# ---- what does not fit ----------------------------------------------------------------------------------------------


def per_sequence() -> Policy:
    part = made(1, (1,)).interventions[0]
    return Policy((Intervention(1, part.V, part.lo.expand(3, 1).clone(), part.hi, part.shift),))


REFUSED = {
    "3 directions at layer 1; the bank has room for 2.*--max-directions 3": made(1, (1,), k=3),
    "width 5; the model's residual has 6": made(1, (1,), width=5),
    "layer 4; the model has 0 to 3": made(1, (1, 4)),
    "layer -1": made(1, (-1, 2)),
    "positions 'reply'.*all or decode": made(1, positions="reply"),
    "bounds for 3 sequences": per_sequence(),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_written(says: str) -> None:
    bank = a_bank()
    bank.load("p", made(9, kind="all"))
    before, loaded = content(bank), bank.loaded
    for name in ("p", "q"):
        with pytest.raises(UsageError, match=f"Policy '{name}' .*{says}"):
            bank.load(name, REFUSED[says])
    assert same(content(bank), before)
    assert bank.loaded == loaded
    bank.load("r", made(1))
    bank.load("s", made(2))  # no slot was lost


def test_what_fits_another_stage_only_is_checked_here_too() -> None:
    with pytest.raises(UsageError, match="3 directions at layer 0"):
        a_bank(layers=(2, 3)).load("p", made(1, (0,), k=3))


@pytest.mark.parametrize("name", ["a", "c"])
def test_a_full_bank_refuses_and_says_which_option_to_change(name: str) -> None:
    bank = a_bank(max_policies=2)
    bank.load("a", made(1))
    bank.load("b", made(2))
    before, loaded = content(bank), bank.loaded
    with pytest.raises(UsageError, match=r"all 2 are taken\. .*--max-policies 3 .*PERSONA_AXIS_MAX_POLICIES"):
        bank.load(name, made(3))
    assert same(content(bank), before)
    assert bank.loaded == loaded


# ---- comparing processes --------------------------------------------------------------------------------------------


def test_the_hash_of_a_bank_is_of_names_and_contents() -> None:
    loaded = {"a": "1" * 64, "b": "2" * 64}
    assert bank_hash(loaded) == bank_hash(dict(reversed(loaded.items())))
    others = [{}, {"a": "1" * 64}, {"a": "2" * 64, "b": "1" * 64}, {"a": "1" * 64, "c": "2" * 64}]
    assert len({bank_hash(other) for other in [loaded, *others]}) == 5


def test_policies_for_generated_tokens_alone_say_so() -> None:
    bank = a_bank()
    assert bank.load("d", made(1, positions="decode")).decode_only
    assert not bank.load("a", made(1)).decode_only
