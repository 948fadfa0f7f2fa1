"""A model over paged caches gives what it gives over contiguous ones."""

import pytest
import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.kernels import tuning
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import load_prompt_cache, save_prompt_cache
from gfxlm.models.load import load_model
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import ragged
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import mlx_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS = torch.arange(600) * 17 % 500


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return load_model(Checkpoint.open(mlx_checkpoint(request.param)), dtype=torch.float32, device=DEVICE)


def paged(model: CausalLM, positions: int = 256) -> Cache:
    with tuning.override("pages", {"page_size": 16}):
        return model.make_cache(4, 128, pool_positions=positions)


@torch.inference_mode()
def forward(model: CausalLM, cache: Cache, steps: list[dict[int, int]]) -> Tensor:
    """Feed each step's slots so many tokens; the hidden states of all."""
    hidden = []
    for step in steps:
        for slot, count in step.items():
            assert cache.reserve(slot, cache.lengths[slot] + count)
        starts = [cache.lengths[slot] for slot in step]
        positions, slots = ragged(list(step), list(step.values()), starts, DEVICE)
        rows = [TOKENS[100 * slot + start :][:n] for (slot, n), start in zip(step.items(), starts, strict=True)]
        hidden.append(model.forward(torch.cat(rows).to(DEVICE), positions, slots, cache))
        for slot, count in step.items():
            cache.lengths[slot] += count
    return torch.cat(hidden)


STEPS = [{0: 40, 2: 17}, {0: 1, 2: 1, 1: 30}, {2: 16, 0: 1}, {1: 3, 0: 1, 2: 1}, {1: 1, 0: 1, 2: 1}]


@pytest.mark.parametrize("bits", [None, 4])
def test_as_contiguous(model: CausalLM, bits: int | None) -> None:
    model = model if bits is None else model.with_quantized_kv(bits, 32)
    pages, slots = paged(model), model.make_cache(4, 128)
    assert pages.pages is not None
    assert pages.nbytes < slots.nbytes
    # What was there before is not seen.
    forward(model, pages, [{3: 50, 1: 60}])
    pages.release(1)
    pages.release(3)
    assert (forward(model, pages, STEPS) - forward(model, slots, STEPS)).abs().max() <= 1e-5


def test_all_of_it_is_contiguous(model: CausalLM) -> None:
    assert model.make_cache(4, 128, pool_positions=512).pages is None
    assert paged(model).max_context == 128


def test_a_small_pool_bounds_the_context(model: CausalLM) -> None:
    cache = paged(model, 100)
    assert cache.max_context == 5 * 16
    assert cache.reserve(0, 80)
    assert not cache.reserve(1, 1)


def test_calling_a_model_takes_pages(model: CausalLM) -> None:
    cache = paged(model)
    tokens = TOKENS[:180].view(2, 90)
    assert torch.allclose(model(tokens[:, :60], cache), model(tokens[:, :60]), atol=1e-4)
    assert cache.lengths == [60, 60, 0, 0]
    with pytest.raises(UserError, match="150 positions do not fit into a cache of 128"):
        model(tokens, cache)


def test_a_prompt_cache_of_pages(model: CausalLM, tmp_path: object) -> None:
    with tuning.override("pages", {"page_size": 16}):
        cache = model.make_cache(1, 128, pool_positions=112)
    forward(model, cache, [{0: 50}])
    file = f"{tmp_path}/cache.safetensors"
    save_prompt_cache(file, cache)
    again = load_prompt_cache(file, model=model)
    assert (again.lengths, again.max_context) == ([50], 96)
    assert (forward(model, again, [{0: 1}]) - forward(model, cache, [{0: 1}])).abs().max() <= 1e-5
    model.check_cache(cache)


def test_bytes_of_positions_and_sequences(model: CausalLM) -> None:
    for lm in (model, model.with_quantized_kv(8, 64)):
        position, state = lm.cache_bytes(torch.float32, lm.kv_format)
        for slots, context in ((1, 1), (3, 70)):
            assert lm.make_cache(slots, context).nbytes == slots * (context * position + state)
