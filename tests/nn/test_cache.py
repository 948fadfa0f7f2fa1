"""Caches: rows land in their slot at their position, and nowhere else."""

import torch

from gfxlm.nn.cache import Cache, KVCache, RecurrentCache
from gfxlm.ops.ragged import ragged


def kv_cache(slots: int, max_context: int) -> KVCache:
    cache = KVCache.allocate(slots, max_context, 2, 3, torch.float32, torch.device("cpu"))
    cache.keys.zero_()
    cache.values.zero_()
    return cache


def test_rows_are_written_where_they_belong() -> None:
    cache = kv_cache(4, 8)
    keys, values = torch.randn(6, 2, 3), torch.randn(6, 2, 3)
    positions, slots = ragged([2, 0, 3], [3, 1, 2], [4, 0, 6])
    cache.write(keys, values, positions, slots)
    wanted_keys, wanted_values = torch.zeros(4, 8, 2, 3), torch.zeros(4, 8, 2, 3)
    for row, (slot, position) in enumerate([(2, 4), (2, 5), (2, 6), (0, 0), (3, 6), (3, 7)]):
        wanted_keys[slot, position], wanted_values[slot, position] = keys[row], values[row]
    assert torch.equal(cache.keys, wanted_keys)
    assert torch.equal(cache.values, wanted_values)


def mixed_cache(slots: int, max_context: int) -> Cache:
    recurrent = RecurrentCache(torch.randn(slots, 3, 5), torch.randn(slots, 2, 4, 4))
    kv = kv_cache(slots, max_context)
    kv.keys.normal_()
    kv.values.normal_()
    return Cache([recurrent, kv], [0] * slots, max_context)


def test_books() -> None:
    cache = mixed_cache(2, 8)
    assert cache.nbytes == 4 * (2 * 3 * 5 + 2 * 2 * 4 * 4 + 2 * (2 * 8 * 2 * 3))
    assert not cache.trimmable
    assert Cache([cache.layers[1]], [0], 8).trimmable


def test_copy_of_a_slot() -> None:
    source, target = mixed_cache(2, 8), mixed_cache(3, 6)
    source.lengths[1] = 5
    before = [t.clone() for layer in target.layers for t in vars_of(layer)]
    target.copy_slot(2, source, 1)
    assert target.lengths == [0, 0, 5]
    recurrent, kv = source.layers
    assert isinstance(recurrent, RecurrentCache)
    assert isinstance(kv, KVCache)
    conv, state, keys, values = (t for layer in target.layers for t in vars_of(layer))
    assert torch.equal(conv[2], recurrent.conv[1])
    assert torch.equal(state[2], recurrent.state[1])
    assert torch.equal(keys[2, :5], kv.keys[1, :5])
    assert torch.equal(values[2, :5], kv.values[1, :5])
    for now, then in zip((conv, state, keys, values), before, strict=True):
        assert torch.equal(now[:2], then[:2])


def vars_of(layer: KVCache | RecurrentCache) -> tuple[torch.Tensor, torch.Tensor]:
    return (layer.keys, layer.values) if isinstance(layer, KVCache) else (layer.conv, layer.state)
