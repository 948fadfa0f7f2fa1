"""Prompt caches in files: the same bits come back, and only to the model that they are of."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    prompt_cache_metadata,
    save_prompt_cache,
    trim_prompt_cache,
)
from gfxlm.models.load import load_model
from gfxlm.nn.cache import Cache, RecurrentCache
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import mlx_checkpoint

TOKENS = torch.arange(20)[None] * 17 % 500


def load(family: str, recipe: str = "4bit", dtype: torch.dtype | None = None) -> CausalLM:
    return load_model(Checkpoint.open(mlx_checkpoint(family, recipe)), dtype=dtype)


def filled(model: CausalLM, max_context: int = 64) -> Cache:
    cache = model.make_cache(1, max_context)
    model(TOKENS[:, :12], cache)
    return cache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_round_trip_is_exact(family: str, kv_bits: int | None, file: Path) -> None:
    model = load(family)
    model = model if kv_bits is None else model.with_quantized_kv(kv_bits, 32)
    cache = filled(model)
    save_prompt_cache(file, cache, {"why": "a test"})
    again, metadata = load_prompt_cache(file, return_metadata=True, model=model)
    assert metadata == prompt_cache_metadata(file) == {"why": "a test"}
    assert (again.lengths, again.max_context) == ([12], 64)
    for ours, theirs in zip(again.layers, cache.layers, strict=True):
        assert type(ours) is type(theirs)
        for a, b in zip(ours.tensors, theirs.tensors, strict=True):
            rows = slice(None) if isinstance(ours, RecurrentCache) else (slice(None), slice(12))
            assert torch.equal(a[rows], b[rows])
    assert torch.equal(model(TOKENS[:, 12:], again), model(TOKENS[:, 12:], cache))
    assert can_trim_prompt_cache(again) == (family == "llama")
    assert trim_prompt_cache(again, 3) == (3 if family == "llama" else 0)


def test_the_file_holds_what_is_filled_and_no_more(file: Path) -> None:
    model = load("llama")
    save_prompt_cache(file, filled(model, 1000))
    tensors = load_file(file)
    assert tensors["layers.0.keys"].shape == (12, 2, 64)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    save_prompt_cache(file, filled(model))  # replaces it
    assert load_prompt_cache(file).max_context == 64
    # A cache that came out of a file goes into one again.
    save_prompt_cache(file, load_prompt_cache(file))
    load_prompt_cache(file, model=model)


def test_room(file: Path) -> None:
    model = load("llama")
    save_prompt_cache(file, filled(model))
    for context in (12, 500):
        assert load_prompt_cache(file, max_context=context).max_context == context
    with pytest.raises(UserError, match="holds 12 positions, which do not fit into 11"):
        load_prompt_cache(file, max_context=11)


def test_a_copy_of_a_cache_is_no_copy_of_the_model(file: Path) -> None:
    model = load("llama")
    cache = copy.deepcopy(filled(model))
    save_prompt_cache(file, cache)
    assert torch.equal(model(TOKENS[:, 12:], cache), model(TOKENS[:, 12:], load_prompt_cache(file, model=model)))


def test_other_models_are_refused(file: Path) -> None:
    save_prompt_cache(file, filled(load("qwen3")))
    load_prompt_cache(file, model=load("qwen3"))
    for other in ("llama", "qwen3_next"):
        with pytest.raises(UserError, match=f"{file}: the prompt cache of another model than this {other}"):
            load_prompt_cache(file, model=load(other))
    # Other weights of the same shapes, be it in one matrix.
    tuned = load("qwen3", "dense")
    save_prompt_cache(file, filled(tuned))
    layer = tuned.model.layers.get_submodule("1")
    layer.self_attn.o_proj.weight.tensor[0, 3] *= 1.1  # type: ignore[union-attr,operator,index]
    with pytest.raises(UserError, match="the prompt cache of another model"):
        load_prompt_cache(file, model=tuned)
    with pytest.raises(UserError, match=r"layer 0 is a KVCache of \[2, 64\] bfloat16.*not a KVCache .*float32"):
        load_prompt_cache(file, model=load("qwen3", "dense", torch.float32))


def test_what_cannot_be_saved(file: Path) -> None:
    model = load("llama")
    cache = filled(model)
    with pytest.raises(UserError, match="has one slot, this cache has 2"):
        save_prompt_cache(file, model.make_cache(2, 8))
    with pytest.raises(UserError, match="does not say which model"):
        save_prompt_cache(file, Cache(cache.layers, cache.lengths, cache.max_context))
    with pytest.raises(UserError, match="its folder does not exist"):
        save_prompt_cache(file / "below", cache)
    with pytest.raises(UserError, match="is a folder"):
        save_prompt_cache(file.parent, cache)
    assert list(file.parent.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama")
    save_prompt_cache(file, filled(model), {"version": "1"})

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gfxlm.models.cache.save_file", full)
    with pytest.raises(UserError, match=r"not written: .*No space left"):
        save_prompt_cache(file, filled(model), {"version": "2"})
    assert prompt_cache_metadata(file) == {"version": "1"}
    assert list(file.parent.iterdir()) == [file]


def test_files_that_are_no_prompt_caches(file: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_prompt_cache(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_prompt_cache(file)
    save_file({"0.0": torch.zeros(1)}, file, {"0": "KVCache"})
    for read in (load_prompt_cache, prompt_cache_metadata):
        with pytest.raises(UserError, match="not a prompt cache of gfxlm's; `gfxlm cache-prompt` makes one"):
            read(file)


def test_corrupt_files(file: Path) -> None:
    save_prompt_cache(file, filled(load("llama")))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_prompt_cache(file)
    file.write_bytes(whole)
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    header = json.loads(metadata["cache"])
    changes = (
        ({"length": 13}, "corrupt: a tensor of shape"),
        ({"length": 99}, "corrupt: it does not say"),
        ({"layers": ["RotatingKVCache"] * 2}, "corrupt: it does not say"),
        ({"layers": ["KVCache"] * 3}, r"corrupt: tensor layers\.2\.keys is missing"),
        ({"metadata": []}, "corrupt: it does not say"),
        ({"max_kv_size": 4}, "corrupt: it does not say"),
        ({"max_kv_size": 11}, r"corrupt: a tensor of shape \(12, .* where 11 positions belong"),
    )
    for change, said in changes:
        save_file(tensors, file, metadata | {"cache": json.dumps(header | change)})
        with pytest.raises(UserError, match=said):
            load_prompt_cache(file)
    save_file(tensors, file, {"format": metadata["format"], "cache": "{"})
    with pytest.raises(UserError, match="corrupt: it does not say"):
        load_prompt_cache(file)
