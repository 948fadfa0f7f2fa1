"""The flattened ragged batch: however tokens are cut up and mixed, every sequence gets what it gets alone."""

import functools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import recognized
from gfxlm.errors import UserError
from gfxlm.kernels.launch import recording
from gfxlm.models.base import CausalLM
from gfxlm.models.load import load_model
from gfxlm.nn.cache import Cache, KVCache, RecurrentCache
from gfxlm.nn.mlp import SparseMoE
from gfxlm.ops.ragged import ragged
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import FAMILIES, mlx_checkpoint, transformers_checkpoint

# Long enough for three chunks of the gated delta rule.
TOKENS = torch.randint(0, 500, (150,), generator=torch.Generator().manual_seed(1))


@functools.cache
def load(family: str, dtype: torch.dtype) -> CausalLM:
    model = load_model(Checkpoint.open(transformers_checkpoint(family, torch.float32)), dtype=dtype)
    if dtype == torch.float64:
        make_cache = model.make_cache
        model.make_cache = lambda slots, max_context: with_float64_state(make_cache(slots, max_context))  # type: ignore[method-assign]
    return model


def with_float64_state(cache: Cache) -> Cache:
    """Recurrent states are float32 whatever the model's type is."""
    wide = [RecurrentCache(x.conv, x.state.double()) if isinstance(x, RecurrentCache) else x for x in cache.layers]
    return Cache(wide, cache.lengths, cache.max_context)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> CausalLM:
    """In float64, where order of summation is no excuse."""
    return load(request.param, torch.float64)


def run(model: CausalLM, cache: Cache, parts: Sequence[tuple[int, Tensor, int]]) -> list[Tensor]:
    """One ragged step over (slot, tokens, offset) for each sequence: its logits (T, V)."""
    slots, tokens, offsets = zip(*parts, strict=True)
    lengths = [len(t) for t in tokens]
    positions, where = ragged(slots, lengths, offsets)
    with torch.inference_mode():
        logits = model.logits(model.forward(torch.cat(tokens), positions, where, cache))
    return list(logits.split(lengths))


def alone(model: CausalLM, tokens: Tensor) -> Tensor:
    return model(tokens[None])[0]


def tensors(cache: Cache) -> list[Tensor]:
    return [
        t
        for layer in cache.layers
        for t in ((layer.keys, layer.values) if isinstance(layer, KVCache) else (layer.conv, layer.state))
    ]


def assert_close(ours: Tensor, expected: Tensor) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 3e-6 * expected.std()


@pytest.mark.parametrize(
    ("length", "sizes"),
    [(40, 1), (150, 2), (150, 7), (150, [64, 64, 22]), (150, [65, 1, 1, 83]), (150, [1, 149]), (150, [149, 1])],
    ids=str,
)
def test_chunks_equal_the_whole(model: CausalLM, length: int, sizes: int | list[int]) -> None:
    tokens = TOKENS[:length]
    cache = model.make_cache(3, length)
    pieces, start = [], 0
    for piece in tokens.split(sizes):
        pieces += run(model, cache, [(1, piece, start)])
        start += len(piece)
    assert_close(torch.cat(pieces), alone(model, tokens))


@pytest.mark.parametrize("recipe", ["dense", "4bit", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_in_float32(family: str, recipe: str) -> None:
    model = load_model(Checkpoint.open(mlx_checkpoint(family, recipe)), dtype=torch.float32)
    cache = model.make_cache(1, 40)
    pieces = torch.cat([model(piece[None], cache=cache)[0] for piece in TOKENS[:40].split([9, 1, 1, 20, 9])])
    whole = alone(model, TOKENS[:40])
    # Gated norms magnify the rounding of small outputs: of a delta net, either way errs by 1e-4 against float64.
    assert (pieces - whole).abs().max() <= (3e-4 if family == "qwen3_next" else 2e-5) * whole.std()


def test_chunks_through_a_window() -> None:
    windowed = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
    checkpoint = Checkpoint.open(transformers_checkpoint("llama", torch.float32))
    model = load_model(checkpoint, overrides=windowed, dtype=torch.float64)
    whole = alone(model, TOKENS[:60])
    assert (whole - alone(load("llama", torch.float64), TOKENS[:60])).abs().max() > 0.1
    for sizes in (1, 4, [10, 1, 30, 19]):
        cache = model.make_cache(1, 60)
        assert_close(torch.cat([model(piece[None], cache=cache)[0] for piece in TOKENS[:60].split(sizes)]), whole)


def test_sequences_of_any_length_in_any_slots(model: CausalLM) -> None:
    lengths, slots = [5, 1, 70, 17, 1], [3, 0, 6, 2, 7]
    sequences = [TOKENS[n : n + length] for n, length in enumerate(lengths)]
    parts = [(slot, tokens, 0) for slot, tokens in zip(slots, sequences, strict=True)]
    for ours, tokens in zip(run(model, model.make_cache(8, 80), parts), sequences, strict=True):
        assert_close(ours, alone(model, tokens))


def test_prefill_and_decode_in_one_batch(model: CausalLM) -> None:
    """Four sequences, of which some go on by a token, some by a chunk, and some begin, in every order."""
    cache = model.make_cache(4, 100)
    sequences = {slot: TOKENS[10 * slot : 10 * slot + 60] for slot in range(4)}
    expected = {slot: alone(model, tokens) for slot, tokens in sequences.items()}
    done = dict.fromkeys(sequences, 0)
    plan = [
        {2: 9},
        {0: 4, 2: 1},
        {2: 1, 0: 1, 3: 30},
        {1: 2, 3: 1, 2: 12, 0: 1},
        {3: 1, 2: 1, 1: 1, 0: 1},
        {0: 40, 3: 2},
    ]
    for step in plan:
        parts = [(slot, sequences[slot][done[slot] : done[slot] + n], done[slot]) for slot, n in step.items()]
        for (slot, tokens, start), ours in zip(parts, run(model, cache, parts), strict=True):
            assert_close(ours, expected[slot][start : start + len(tokens)])
            done[slot] += len(tokens)


@pytest.mark.parametrize("steps", [[20], [1] * 5, [3, 1, 16]], ids=str)
def test_a_used_slot_is_as_good_as_new(model: CausalLM, steps: list[int]) -> None:
    tokens = TOKENS[50 : 50 + sum(steps)]
    results = []
    for used in (False, True):
        cache = model.make_cache(2, 60)
        if used:
            run(model, cache, [(0, TOKENS[:60], 0), (1, TOKENS[7:60], 0)])
        logits, start = [], 0
        for piece in tokens.split(steps):
            logits += run(model, cache, [(1, piece, start)])
            start += len(piece)
        results.append(torch.cat(logits))
    assert torch.equal(*results)


@pytest.mark.parametrize("steps", [[20], [1] * 5], ids=str)
def test_what_a_slot_held_does_not_matter_even_if_it_is_nan(model: CausalLM, steps: list[int]) -> None:
    cache = model.make_cache(2, 60)
    for tensor in tensors(cache):
        tensor.fill_(torch.nan)
    start = 0
    for piece in TOKENS[: sum(steps)].split(steps):
        assert run(model, cache, [(0, piece, start), (1, piece, start)])[1].isfinite().all()
        start += len(piece)


def test_caches_are_written_in_place_and_in_their_slot_only(model: CausalLM) -> None:
    cache = model.make_cache(3, 30)
    for tensor in tensors(cache):
        tensor.fill_(0.5)
    before = [(t.data_ptr(), t.shape, t.dtype) for t in tensors(cache)]
    for tokens, start in ((TOKENS[:9], 0), (TOKENS[9:10], 9)):
        run(model, cache, [(1, tokens, start)])
    assert [(t.data_ptr(), t.shape, t.dtype) for t in tensors(cache)] == before
    for tensor in tensors(cache):
        assert (tensor[[0, 2]] == 0.5).all()
        assert not (tensor[1] == 0.5).all()
    for layer in cache.layers:
        if isinstance(layer, KVCache):
            assert (layer.keys[1, 10:] == 0.5).all()
            assert (layer.values[1, 10:] == 0.5).all()


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Count everything that brings a tensor's value to the host, by the module that asks."""
    seen: Counter[tuple[str, str]] = Counter()

    def watch(name: str) -> None:
        original = getattr(Tensor, name)

        def wrapper(self: Tensor, *args: Any) -> Any:
            seen[sys._getframe(1).f_globals["__name__"], name] += 1
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, wrapper)

    for name in (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__array__",
    ):
        watch(name)
    return seen


def test_nothing_is_read_back(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.make_cache(2, 60)
    steps = [ragged([0, 1], [7, 1], [0, 0]), ragged([0, 1], [1, 1], [7, 1]), ragged([1, 0], [5, 1], [2, 8])]
    seen = count_reads(monkeypatch)
    for positions, slots in steps:
        model.logits(model.forward(TOKENS[: len(positions)], positions, slots, cache))
    # On a CPU, and there alone, experts are visited one by one.
    sparse = sum(isinstance(module, SparseMoE) for module in model.modules())
    assert seen == ({("gfxlm.ops.moe", "tolist"): sparse * len(steps)} if sparse else {})


@pytest.mark.parametrize("recipe", ["dense", "4bit", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_without_values(family: str, recipe: str) -> None:
    """On the meta device tensors have no values, so that nothing can depend on one: as on a GPU, in a graph."""
    model = load_model(Checkpoint.open(mlx_checkpoint(family, recipe)), device="meta")
    cache = model.make_cache(2, 60)
    with recording(recognized("gfx1151")) as launches:
        for layout in (([0, 1], [7, 1], [0, 0]), ([0, 1], [1, 1], [7, 1])):
            positions, slots = ragged(*layout, "meta")
            tokens = torch.zeros(len(positions), dtype=torch.int64, device="meta")
            hidden = model.forward(tokens, positions, slots, cache)
            assert (hidden.shape, hidden.dtype) == ((len(tokens), 128), model.dtype)
            assert model.logits(hidden).shape == (len(tokens), 512)
    assert launches


def test_call_continues_as_in_mlx_lm(model: CausalLM) -> None:
    batch = TOKENS[:60].view(3, 20)
    whole = model(batch)
    assert whole.shape == (3, 20, 512)
    cache = model.make_cache(4, 20)
    pieces = [model(piece, cache=cache) for piece in batch.split([6, 1, 1, 12], dim=1)]
    assert cache.lengths == [20, 20, 20, 0]
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(whole[1], alone(model, batch[1]))


def test_sequences_of_a_cache_may_differ_in_length() -> None:
    model = load("qwen3_next", torch.float64)
    cache = model.make_cache(2, 30)
    model(TOKENS[None, :5], cache=cache)
    assert cache.lengths == [5, 0]
    both = model(torch.stack((TOKENS[5:15], TOKENS[40:50])), cache=cache)
    assert cache.lengths == [15, 10]
    assert_close(both[0], alone(model, TOKENS[:15])[5:])
    assert_close(both[1], alone(model, TOKENS[40:50]))


def test_too_many_positions() -> None:
    model = load("llama", torch.float32)
    cache = model.make_cache(2, 10)
    model(TOKENS[None, :8], cache=cache)
    held = [t.clone() for t in tensors(cache)]
    with pytest.raises(UserError, match="11 positions do not fit into a cache of 10"):
        model(TOKENS[None, :3], cache=cache)
    with pytest.raises(UserError, match="12 positions do not fit into a cache of 10"):
        model(TOKENS[:8].view(2, 4), cache=cache)
    assert cache.lengths == [8, 0]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors(cache), held, strict=True))
    assert model(TOKENS[None, :2], cache=cache).shape == (1, 2, 512)


def test_tokens_of_the_wrong_shape() -> None:
    model = load("llama", torch.float32)
    with pytest.raises(ValueError, match=r"tokens: expected \(B, T\), got shape \(5,\)"):
        model(TOKENS[:5])
    with pytest.raises(ValueError, match=r"tokens: 3 sequences, but the cache has 2 slots"):
        model(TOKENS[:6].view(3, 2), cache=model.make_cache(2, 10))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_tokens(model: CausalLM, shape: tuple[int, int]) -> None:
    cache = model.make_cache(2, 10)
    tokens = torch.zeros(shape, dtype=torch.int64)
    for logits in (model(tokens), model(tokens, cache=cache)):
        assert logits.shape == (*shape, 512)
    assert cache.lengths == [0, 0]


def test_a_sequence_without_tokens_in_a_batch(model: CausalLM) -> None:
    cache = model.make_cache(3, 20)
    run(model, cache, [(0, TOKENS[:4], 0), (1, TOKENS[:4], 0)])
    parts = [(1, TOKENS[:0], 4), (0, TOKENS[4:9], 4), (2, TOKENS[:0], 0)]
    nothing, ours, _ = run(model, cache, parts)
    assert len(nothing) == 0
    assert_close(ours, alone(model, TOKENS[:9])[4:])
    assert_close(run(model, cache, [(1, TOKENS[4:6], 4)])[0], alone(model, TOKENS[:6])[4:])


def test_token_types() -> None:
    model = load("llama", torch.float32)
    expected = model(TOKENS[None, :6])
    assert torch.equal(model(TOKENS[None, :6].int()), expected)
    assert not expected.requires_grad


def test_caches_of_a_model() -> None:
    model = load("qwen3_next", torch.float32)
    cache = model.make_cache(3, 40)
    assert [type(layer).__name__ for layer in cache.layers] == ["RecurrentCache"] * 3 + ["KVCache"]
    assert cache.nbytes == sum(t.nbytes for t in tensors(cache))
    assert not cache.trimmable
    assert load("llama", torch.float32).make_cache(1, 8).trimmable
    half = load_model(Checkpoint.open(mlx_checkpoint("qwen3_next", "4bit"))).make_cache(1, 8)
    assert {t.dtype for t in tensors(half)} == {torch.bfloat16, torch.float32}
    assert all(layer.state.dtype == torch.float32 for layer in half.layers if not isinstance(layer, KVCache))
