"""Caches that forget: mlx-lm's logits while decoding, and the plain definition of what a row sees everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_cache
from torch import Tensor

import gfxlm.nn.attention
from gfxlm.errors import UserError
from gfxlm.kernels import tuning
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import (
    KVOptions,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    prompt_cache_size,
    save_prompt_cache,
    trim_prompt_cache,
)
from gfxlm.models.load import load_model
from gfxlm.nn.cache import Cache, QuantizedKVCache, RecurrentCache
from gfxlm.nn.module import Module, ModuleList
from gfxlm.nn.ring import KEPT, Ring
from gfxlm.ops.ragged import ragged
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import mlx_checkpoint

SIZE = 20
TOKENS = torch.arange(90)[None] * 17 % 500


def load(family: str, recipe: str = "4bit") -> CausalLM:
    return load_model(Checkpoint.open(mlx_checkpoint(family, recipe)), dtype=torch.float32)


def one_layer(model: CausalLM) -> CausalLM:
    """Whose keys depend on nothing but tokens and positions."""
    first = model.layers.get_submodule("0")
    assert isinstance(first, Module)
    model.model.layers = ModuleList([first])
    return model


def rotating(model: CausalLM, size: int = SIZE) -> Cache:
    return model.with_rotating_kv(size).make_cache(1, 200)


def in_parts(model: CausalLM, cache: Cache, lengths: Sequence[int], start: int = 0) -> Tensor:
    parts = []
    for length in lengths:
        parts.append(model(TOKENS[:, start : start + length], cache))
        start += length
    return torch.cat(parts, 1)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.std()


# mlx-lm as the oracle.


def mlx_caches(model: Any, size: int) -> list[mlx_cache.RotatingKVCache]:
    """Of its `make_prompt_cache`, which has other plans for Llama."""
    return [mlx_cache.RotatingKVCache(size, keep=4) for _ in model.layers]


def mlx_logits(folder: Path, prompt: int, size: int, *, layers: int | None = None) -> Tensor:
    """Of a prompt in one piece, and then of one token after the other."""
    model, _ = mlx_lm.load(str(folder))
    model.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
    cache = mlx_caches(model, size)
    lengths = [prompt] + [1] * (TOKENS.shape[1] - prompt)
    starts = np.cumsum([0, *lengths])
    parts = [
        model(mx.array(TOKENS[:, start : start + n].numpy()), cache=cache)
        for start, n in zip(starts, lengths, strict=False)
    ]
    return torch.from_numpy(np.array(mx.concatenate(parts, axis=1)))


@pytest.mark.parametrize(("prompt", "size"), [(12, 20), (20, 20), (19, 20), (1, 7)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_decoding_is_mlx_lms(family: str, prompt: int, size: int) -> None:
    theirs = mlx_logits(mlx_checkpoint(family), prompt, size)
    model = load(family)
    ours = in_parts(model, rotating(model, size), [prompt] + [1] * (TOKENS.shape[1] - prompt))
    assert_close(ours, theirs)
    everything = model(TOKENS)
    assert (ours - everything)[:, size + 1 :].abs().max() > 0.1 * theirs.std()


def test_after_a_longer_prompt_a_layers_keys_are_mlx_lms() -> None:
    """A longer prompt is read differently (see docs/memory.md), but of one layer the same keys stay."""
    theirs = mlx_logits(mlx_checkpoint("qwen3"), 47, SIZE, layers=1)
    model = one_layer(load("qwen3"))
    ours = in_parts(model, rotating(model), [47] + [1] * (TOKENS.shape[1] - 47))
    assert_close(ours[:, 47:], theirs[:, 47:])


def test_trimming_is_mlx_lms() -> None:
    model = load("llama")
    oracle, _ = mlx_lm.load(str(mlx_checkpoint("llama")))
    for length in (SIZE - 1, SIZE, SIZE + 5):
        theirs, ours = mlx_caches(oracle, SIZE), make_prompt_cache(model, SIZE)
        oracle(mx.array(TOKENS[:, :length].numpy()), cache=theirs)
        model(TOKENS[:, :length], ours)
        assert can_trim_prompt_cache(ours) == mlx_cache.can_trim_prompt_cache(theirs) == (length < SIZE)
        assert trim_prompt_cache(ours, 3) == mlx_cache.trim_prompt_cache(theirs, 3)


# The definition: plain attention over everything, with a mask.


def by_definition(model: CausalLM, size: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits of all tokens at once, every attention in float64 over all keys with the mask written out."""

    def attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, _: object, **options: object) -> Tensor:
        gate = options["gate"]
        length, group = len(q), q.shape[1] // keys.shape[2]
        k, v = (x[0, :length].double().repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * options["scale"]
        row, key = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = (key <= row) & ((key < KEPT) | (row - key < size - KEPT))
        out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        return (out if gate is None else out * torch.sigmoid(gate.double())).float()  # type: ignore[attr-defined]

    with monkeypatch.context() as patch:
        patch.setattr(gfxlm.nn.attention, "cached_attention", attention)
        return model(TOKENS)


@pytest.mark.parametrize("size", [5, 20, 64])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_however_it_is_fed(family: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(family)
    wanted = by_definition(model, size, monkeypatch)
    for lengths in ([90], [1] * 90, [30, 30, 30], [3, 14, 2, 1, 1, 40, 1, 7, 21], [64, 26], [19, 1, 70]):
        cache = rotating(model, size)
        assert_close(in_parts(model, cache, lengths), wanted)
        assert cache.lengths == [90]
        assert {t.shape[1] for x in cache.layers if not isinstance(x, RecurrentCache) for t in x.tensors} == {size}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(bits: int) -> None:
    model = load("qwen3").with_quantized_kv(bits, 32)
    wanted = in_parts(model, rotating(model), [1] * 90)
    cache = rotating(model)
    assert isinstance(cache.layers[0], QuantizedKVCache)
    # Now and then a number lies between two codes and rounds the other way.
    assert (in_parts(model, cache, [30, 1, 1, 44, 14]) - wanted).abs().max() <= 3e-3 * wanted.std()
    exact = in_parts(load("qwen3"), rotating(load("qwen3")), [90])
    assert 0 < (wanted - exact).square().mean().sqrt() <= {8: 0.02, 4: 0.34}[bits] * exact.std()


@pytest.mark.parametrize("pool", [None, 9 * 16])
def test_slots_at_different_positions(pool: int | None) -> None:
    """Four sequences in eight slots, each as if it were alone, in pages too: some decode, some go round in chunks."""
    model = load("qwen3_next")
    lengths = [[1, 1, 30, 1, 1, 5], [25, 1, 1, 1, 9, 1], [4, 4, 4, 4, 4, 4], [50, 1, 7, 1, 1, 1]]
    alone = [in_parts(model, rotating(model), each) for each in lengths]
    with tuning.override("pages", {"page_size": 16}):
        cache = model.with_rotating_kv(SIZE).make_cache(8, 200, pool_positions=pool)
    if pool:
        assert cache.pages is not None
        assert cache.pages.table.shape == (8, 2)
    order = [2, 0, 3, 1]
    parts: dict[int, list[Tensor]] = {slot: [] for slot in order}
    for step in range(6):
        counts = [lengths[slot][step] for slot in order]
        offsets = [cache.lengths[slot] for slot in order]
        assert all(cache.reserve(slot, cache.lengths[slot] + n) for slot, n in zip(order, counts, strict=True))
        tokens = torch.cat([TOKENS[0, a : a + n] for a, n in zip(offsets, counts, strict=True)])
        positions, slots = ragged(order, counts, offsets)
        with torch.inference_mode():
            logits = model.logits(model.forward(tokens, positions, slots, cache))
        for slot, n, part in zip(order, counts, logits.split(counts), strict=True):
            parts[slot].append(part)
            cache.lengths[slot] += n
    for slot in order:
        assert_close(torch.cat(parts[slot])[None], alone[slot])
    cache.release(3)
    assert cache.pages is None or cache.pages.free == 2


# Caches that are kept, copied and written to files.


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("length", [7, 20, 47])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_files(family: str, length: int, bits: int | None, tmp_path: Path) -> None:
    model = load(family)
    model = model if bits is None else model.with_quantized_kv(bits, 32)
    cache, file = make_prompt_cache(model, SIZE), tmp_path / "prompt.safetensors"
    model(TOKENS[:, :length], cache)
    save_prompt_cache(file, cache)
    assert prompt_cache_size(file) == SIZE
    again = load_prompt_cache(file, model=model)
    assert (again.lengths, again.max_context, again.ring) == ([length], 1024, Ring(SIZE))
    assert torch.equal(in_parts(model, again, [3, 1, 25], length), in_parts(model, cache, [3, 1, 25], length))
    save_prompt_cache(file, again)
    assert load_prompt_cache(file, max_context=100).max_context == 100


def test_a_file_of_one_size_in_a_cache_of_another(tmp_path: Path) -> None:
    model, file = one_layer(load("llama")), tmp_path / "prompt.safetensors"
    for size, smaller in ((None, 20), (40, 20), (40, 5)):
        cache = make_prompt_cache(model, size)
        model(TOKENS[:, :60], cache)
        save_prompt_cache(file, cache)
        wanted = in_parts(model, rotating(model, smaller), [60] + [1] * 30)[:, 60:]
        assert_close(in_parts(model, load_prompt_cache(file, max_kv_size=smaller), [1] * 30, 60), wanted)
        copied = rotating(model, smaller)
        copied.copy_slot(0, cache, 0)
        assert_close(in_parts(model, copied, [1] * 30, 60), wanted)
        quantised = rotating(model.with_quantized_kv(8, 32), smaller)
        quantised.copy_slot(0, cache, 0)
        assert (in_parts(model, quantised, [1] * 30, 60) - wanted).abs().max() <= 0.2 * wanted.std()
    with pytest.raises(
        UserError, match=rf"{file}: a cache of 40 positions \(max_kv_size\) has forgotten some of the 60"
    ):
        load_prompt_cache(file, max_kv_size=41)
    with pytest.raises(UserError, match="has forgotten"):
        model.make_cache(1, 100).copy_slot(0, cache, 0)
    # Before it has forgotten anything, it can become any other.
    cache = make_prompt_cache(model, 40)
    model(TOKENS[:, :30], cache)
    whole = model.make_cache(1, 100)
    whole.copy_slot(0, cache, 0)
    assert_close(in_parts(model, whole, [60], 30), model(TOKENS)[:, 30:])


def test_quantised_after_it_went_round() -> None:
    model = load("qwen3")
    cache = make_prompt_cache(model, SIZE)
    model(TOKENS[:, :50], cache)
    kv = KVOptions(SIZE, 8, 32, quantized_kv_start=0)
    exact = make_prompt_cache(model, SIZE)
    exact.copy_slot(0, cache, 0)
    kv.prepare(cache, model, 90)
    ours, theirs = in_parts(model, cache, [1] * 20, 50), in_parts(model, exact, [1] * 20, 50)
    assert 0 < (ours - theirs).square().mean().sqrt() <= 0.02 * theirs.std()


def test_sizes() -> None:
    model = load("qwen3")
    cache = make_prompt_cache(model, SIZE)
    assert (cache.max_context, cache.places, cache.nbytes) == (1024, SIZE, model.make_cache(1, SIZE).nbytes)
    assert make_prompt_cache(model, 1024).ring is None
    assert model.with_rotating_kv(SIZE).make_cache(2, SIZE).ring is None
    for size in (4, 0, -1):
        with pytest.raises(UserError, match=f"max_kv_size must be at least 5, .* but is {size}"):
            make_prompt_cache(model, size)
    with pytest.raises(UserError, match="max_kv_size is 21, but the prompt cache holds up to 20 positions"):
        KVOptions(21).prepare(cache, model, 100)
    KVOptions(SIZE).prepare(cache, model, 100)
    assert KVOptions(SIZE, 8, quantized_kv_start=SIZE).format_for(1000) is None
    with pytest.raises(UserError, match="1025 positions do not fit into a cache of 1024"):
        model(torch.zeros(1, 1025, dtype=torch.int64), cache)


def test_layers_with_windows_of_their_own() -> None:
    model = load("llama")
    model.layers.get_submodule("1").mixer.window = 30  # type: ignore[union-attr]
    with pytest.raises(UserError, match="max_kv_size is 31, but layers of this model see only their last 30 positions"):
        model.with_rotating_kv(31)
    narrow = in_parts(model, rotating(model), [50] + [1] * 40)
    assert_close(narrow, in_parts(load("llama"), rotating(model), [90]))
