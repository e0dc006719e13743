"""Slots: what is written is found again after moving, growing, shrinking and copying."""

from __future__ import annotations

import torch
from torch import Tensor

from persona_axis.model.cache import GROWTH, SlotCache

N_LAYERS, HEADS, DIM = 2, 3, 4


def cache_of(slots: int, capacity: int) -> SlotCache:
    return SlotCache(N_LAYERS, slots, capacity, torch.device("cpu"))


def states(rows: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS, n, DIM, generator=random), torch.randn(rows, HEADS, n, DIM, generator=random)


def write(cache: SlotCache, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a forward does: every block writes (block l gets l more) and reads back."""
    return [layer.update(keys + i, values + i) for i, layer in enumerate(cache.layers)]


def filled(slots: int = 3, capacity: int = 10, n: int = 5) -> tuple[SlotCache, Tensor, Tensor]:
    cache = cache_of(slots, capacity)
    keys, values = states(slots, n, 0)
    cache.begin_prefill(torch.arange(slots), torch.zeros(slots, dtype=torch.long), n)
    write(cache, keys, values)
    return cache, keys, values


def stored(cache: SlotCache, slot: int, n: int) -> Tensor:
    """Keys and values of one slot, all blocks: ``[n_layers, 2, heads, n, dim]``."""
    return torch.stack([torch.stack(pair) for pair in cache.extract(slot, n)])


def expected(keys: Tensor, values: Tensor, row: int) -> Tensor:
    return torch.stack([torch.stack([keys[row] + i, values[row] + i]) for i in range(N_LAYERS)])


def test_prefill_returns_what_its_rows_hold() -> None:
    cache, _, _ = filled()
    keys, values = states(2, 3, 1)
    positions = cache.begin_prefill(torch.tensor([2, 0]), torch.tensor([5, 2]), 3)
    assert positions.tolist() == [[5, 6, 7], [2, 3, 4]]
    assert cache.width == 8
    for i, (k, v) in enumerate(write(cache, keys, values)):
        assert k.shape == (2, HEADS, 8, DIM)
        torch.testing.assert_close(k[0, :, 5:8], keys[0] + i)
        torch.testing.assert_close(v[1, :, 2:5], values[1] + i)


def test_a_decoding_step_reads_a_view() -> None:
    cache, keys, values = filled(slots=4)
    new_keys, new_values = states(2, 1, 1)
    cache.begin_decode(torch.tensor([5, 3]), 6)
    for i, (k, v) in enumerate(write(cache, new_keys, new_values)):
        layer = cache.layers[i]
        assert k.data_ptr() == layer.keys.data_ptr()
        assert v.data_ptr() == layer.values.data_ptr()
        assert k.shape == (2, HEADS, 6, DIM)
        torch.testing.assert_close(k[0, :, 5], new_keys[0, :, 0] + i)
        torch.testing.assert_close(k[1, :, 3], new_keys[1, :, 0] + i)
        torch.testing.assert_close(k[1, :, :3], keys[1, :, :3] + i)
    torch.testing.assert_close(stored(cache, 2, 5), expected(keys, values, 2))  # not active: untouched


def test_capacity_grows_in_steps() -> None:
    assert cache_of(1, 1).capacity == GROWTH
    assert cache_of(1, GROWTH + 1).capacity == 2 * GROWTH


def test_growing_keeps_contents() -> None:
    cache, keys, values = filled()
    cache.resize(7, 3 * GROWTH)
    assert cache.layers[0].keys.shape == (7, HEADS, 3 * GROWTH, DIM)
    for slot in range(3):
        torch.testing.assert_close(stored(cache, slot, 5), expected(keys, values, slot))
    assert not cache.layers[0].keys[3:].any()  # zeros, never stale NaN


def test_fewer_slots_keep_the_first() -> None:
    cache, keys, values = filled()
    cache.resize(2, 2 * GROWTH)
    for slot in range(2):
        torch.testing.assert_close(stored(cache, slot, 5), expected(keys, values, slot))
    cache.resize(2, 1)
    assert cache.capacity == 2 * GROWTH, "storage never gets shorter than what it may hold"


def test_resizing_before_the_first_write() -> None:
    cache = cache_of(1, 1)
    cache.resize(3, 100)
    keys, values = states(3, 100, 0)
    cache.begin_prefill(torch.arange(3), torch.zeros(3, dtype=torch.long), 100)
    write(cache, keys, values)
    torch.testing.assert_close(stored(cache, 2, 100), expected(keys, values, 2))


def test_moving() -> None:
    cache, keys, values = filled(slots=5)
    cache.move(torch.tensor([3, 4]), torch.tensor([0, 2]))
    for slot, source in ((0, 3), (2, 4), (1, 1)):
        torch.testing.assert_close(stored(cache, slot, 5), expected(keys, values, source))


def test_a_stored_prefix_is_a_copy() -> None:
    cache, keys, values = filled()
    prefix = cache.extract(1, 3)
    cache.begin_prefill(torch.tensor([1]), torch.tensor([0]), 5)
    write(cache, *states(1, 5, 9))
    cache.insert(torch.tensor([0, 2]), prefix)
    for slot in (0, 2):
        torch.testing.assert_close(stored(cache, slot, 3), expected(keys, values, 1)[..., :3, :])
        torch.testing.assert_close(stored(cache, slot, 5)[..., 3:, :], expected(keys, values, slot)[..., 3:, :])


def test_inserting_into_an_empty_cache() -> None:
    source, keys, values = filled()
    cache = cache_of(2, 8)
    cache.insert(torch.tensor([1]), source.extract(2, 4))
    torch.testing.assert_close(stored(cache, 1, 4), expected(keys, values, 2)[..., :4, :])
