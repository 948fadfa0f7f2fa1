"""Models over quantised keys and values: mlx-lm's numbers over the same codes, and how far those are from the exact."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_cache
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.load import load_model
from gfxlm.nn.cache import KVCache, QuantizedKVCache, RecurrentCache
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import mlx_checkpoint

TOKENS = torch.arange(48)[None] * 17 % 500


def load(family: str) -> CausalLM:
    return load_model(Checkpoint.open(mlx_checkpoint(family)), dtype=torch.float32)


def mlx_logits(family: str, bits: int, group_size: int) -> Tensor:
    model, _ = mlx_lm.load(str(mlx_checkpoint(family)))
    model.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )
    cache = [
        mlx_cache.QuantizedKVCache(group_size, bits) if isinstance(layer, mlx_cache.KVCache) else layer
        for layer in mlx_cache.make_prompt_cache(model)
    ]
    return torch.from_numpy(np.array(model(mx.array(TOKENS.numpy()), cache=cache)))


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_next"])
@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (8, 32), (4, 64), (4, 32)])
def test_logits_are_mlx_lms_over_a_quantised_cache(family: str, bits: int, group_size: int) -> None:
    theirs, exact = mlx_logits(family, bits, group_size), load(family)(TOKENS)
    model = load(family).with_quantized_kv(bits, group_size)
    ours, deviation = model(TOKENS), exact.std()
    # Now and then a number lies between two codes and rounds the other way here: one code of many thousand.
    assert (ours - theirs).abs().max() <= 3e-3 * deviation
    # A step of 8 bits is 1/255 of a group's range, of 4 bits 1/15; the random keys of these models are the worst case.
    bound = {8: 0.02, 4: 0.34}[bits]
    assert (ours - exact).square().mean().sqrt() <= bound * deviation
    assert not torch.equal(ours, exact)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_in_parts_as_at_once(family: str) -> None:
    model = load(family).with_quantized_kv(4, 32)
    cache = model.make_cache(1, 48)
    parts = torch.cat([model(TOKENS[:, i : i + 8], cache) for i in range(0, 48, 8)], dim=1)
    whole = model(TOKENS)
    assert (parts - whole).abs().max() <= 1e-3 * whole.std()


def test_only_attention_layers_are_quantised_and_the_model_stays_as_it_was() -> None:
    model = load("qwen3_next")
    quantizing = model.with_quantized_kv(4, 64)
    kinds = [type(layer) for layer in quantizing.make_cache(2, 100).layers]
    assert kinds == [RecurrentCache] * 3 + [QuantizedKVCache]
    assert [type(layer) for layer in model.make_cache(2, 100).layers] == [RecurrentCache] * 3 + [KVCache]
    assert quantizing.layers is model.layers


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (4, 32)])
def test_bytes(bits: int, group_size: int) -> None:
    model = load_model(Checkpoint.open(mlx_checkpoint("qwen3")))
    heads, size, layers, context = 2, 64, 2, 100
    numbers = layers * 2 * context * heads * size
    assert model.make_cache(1, context).nbytes == 2 * numbers
    # A scale and a bias of 2 bytes each for a group.
    quantised = model.with_quantized_kv(bits, group_size).make_cache(1, context).nbytes
    assert quantised == numbers * bits // 8 + numbers // group_size * 4


@pytest.mark.parametrize(
    ("bits", "group_size", "said"),
    [
        (3, 64, "4 or 8 bits and groups of 32, 64 or 128, not 3 and 64"),
        (16, 64, "not 16 and 64"),
        (8, 16, "not 8 and 16"),
        (8, 128, "heads of 64 features cannot be quantised in groups of 128; groups of 32 or 64 fit"),
    ],
)
def test_what_cannot_be(bits: int, group_size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("qwen3_next").with_quantized_kv(bits, group_size)
