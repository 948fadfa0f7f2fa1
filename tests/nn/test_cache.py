"""Caches: rows land in their slot at their position, and nowhere else."""

import pytest
import torch

from gfxlm.errors import UserError
from gfxlm.nn.cache import Cache, KVCache, KVFormat, QuantizedKVCache, RecurrentCache
from gfxlm.ops import cached_attention, dequantize, kv, quantize
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


@pytest.mark.parametrize(("bits", "group_size", "head_dim"), [(8, 64, 128), (4, 64, 64), (4, 32, 96), (8, 32, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_rows_are_those_of_quantize(bits: int, group_size: int, head_dim: int, dtype: torch.dtype) -> None:
    cpu = torch.device("cpu")
    cache = QuantizedKVCache.allocate(3, 9, 2, head_dim, dtype, cpu, bits=bits, group_size=group_size)
    keys, values = (torch.randn(5, 2, head_dim).to(dtype) for _ in range(2))
    positions, slots = ragged([2, 0], [3, 2], [4, 0])
    cache.write(keys, values, positions, slots)
    for stored, rows in ((cache.keys, keys), (cache.values, values)):
        back = dequantize(*quantize(rows, group_size, bits), group_size, bits)
        assert torch.equal(kv.read(stored, 2, 4, 7), back[:3])
        assert torch.equal(kv.read(stored, 0, 0, 2), back[3:])
        assert (stored.shape, stored.dtype) == ((3, 9, 2, head_dim), dtype)
    q = torch.randn(5, 4, head_dim).to(dtype)
    plain = KVCache.allocate(3, 9, 2, head_dim, dtype, cpu)
    for stored, tensor in ((cache.keys, plain.keys), (cache.values, plain.values)):
        tensor[2, :7], tensor[0, :2] = kv.read(stored, 2, 0, 7), kv.read(stored, 0, 0, 2)
    out, expected = (cached_attention(q, c.keys, c.values, positions, slots, scale=0.1) for c in (cache, plain))
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_bytes_of_a_quantized_cache() -> None:
    cache = QuantizedKVCache.allocate(2, 10, 2, 128, torch.bfloat16, torch.device("cpu"), bits=4)
    assert Cache([cache], [0, 0], 10).nbytes == 2 * 2 * 10 * 2 * (64 + 2 * 4)
    assert Cache([cache], [0, 0], 10).trimmable


def test_copy_of_a_quantized_slot() -> None:
    source, target = (
        Cache([QuantizedKVCache.allocate(2, 10, 1, 64, torch.float32, torch.device("cpu"))], [0, 0], 10)
        for _ in range(2)
    )
    for tensor in source.layers[0].tensors:
        tensor.random_(0, 100)
    source.lengths[1] = 4
    target.copy_slot(0, source, 1)
    assert target.lengths == [4, 0]
    for ours, theirs in zip(target.layers[0].tensors, source.layers[0].tensors, strict=True):
        assert torch.equal(ours[0, :4], theirs[1, :4])


def quantised(context: int, bits: int) -> Cache:
    layer = QuantizedKVCache.allocate(2, context, 2, 64, torch.float32, torch.device("cpu"), bits=bits, group_size=32)
    return Cache([layer], [0, 0], context)


def plain(context: int, lengths: list[int]) -> Cache:
    cache = Cache([KVCache.allocate(2, context, 2, 64, torch.float32, torch.device("cpu"))], lengths, context)
    for tensor in cache.layers[0].tensors:
        for slot, length in enumerate(lengths):
            tensor[slot, :length].normal_()
    return cache


@pytest.mark.parametrize("bits", [4, 8])
def test_copies_between_formats_are_those_of_quantize(bits: int) -> None:
    source, target, back = plain(9, [0, 7]), quantised(8, bits), plain(7, [0, 0])
    target.copy_slot(0, source, 1)
    back.copy_slot(1, target, 0)
    assert (target.lengths, back.lengths) == ([7, 0], [0, 7])
    for ours, theirs in zip(back.layers[0].tensors, source.layers[0].tensors, strict=True):
        assert torch.equal(ours[1], dequantize(*quantize(theirs[1, :7], 32, bits), 32, bits))


def test_quantising_a_whole_cache() -> None:
    cache, expected = plain(9, [4, 9]), quantised(9, 4)
    for slot in (0, 1):
        expected.copy_slot(slot, cache, slot)
    recurrent = RecurrentCache(torch.randn(2, 3, 5), torch.randn(2, 2, 4, 4))
    cache.layers.append(recurrent)
    cache.quantize(KVFormat(4, 32))
    assert cache.layers[1] is recurrent
    for ours, theirs in zip(cache.layers[0].tensors, expected.layers[0].tensors, strict=True):
        assert torch.equal(ours[0, :4], theirs[0, :4])
        assert torch.equal(ours[1], theirs[1])
    cache.quantize(KVFormat(4, 32))  # it is
    with pytest.raises(UserError, match="has 4 bits in groups of 32, not 8 bits in groups of 32"):
        cache.quantize(KVFormat(8, 32))
    with pytest.raises(UserError, match=r"heads of 64 features .* groups of 128; groups of 32 or 64 fit"):
        plain(9, [1, 1]).quantize(KVFormat(4, 128))


@pytest.mark.parametrize(("bits", "group_size", "head_dim"), [(3, 64, 64), (8, 16, 64), (8, 64, 80), (4, 128, 64)])
def test_what_cannot_be_quantized(bits: int, group_size: int, head_dim: int) -> None:
    with pytest.raises(UserError, match=f"{head_dim} features|not {bits} and {group_size}"):
        QuantizedKVCache.allocate(
            1, 8, 1, head_dim, torch.float32, torch.device("cpu"), bits=bits, group_size=group_size
        )
