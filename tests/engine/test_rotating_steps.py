"""The built-in model, a hybrid, beyond the size of its cache: steps ahead, recorded ones, chunks of any size."""

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import named
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.request import Request
from gfxlm.kernels import tuning
from gfxlm.models.base import CausalLM
from gfxlm.ops.ragged import ragged
from tests.engine import serving
from tests.engine.test_launch_counts import CONTEXT, hollow, layer_calls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 32
# Prompt lengths and lengths of answers: below the size and beyond it, in one chunk and in several.
REQUESTS = [(5, 60), (1, 1), (40, 45), (130, 30), (33, 20), (9, 2), (31, 50)]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load("builtin", device=DEVICE, dtype=torch.float32)[0]


def serve(model: CausalLM, *, overlap: bool, warm: bool = False) -> list[Request]:
    engine = Engine(model.with_rotating_kv(SIZE), max_batch=3, max_context=512, prefill_step_size=48, overlap=overlap)
    if warm:
        engine.warm_up()
    requests = serving.serve(engine, REQUESTS)
    assert [len(request.tokens) for request in requests] == [most for _, most in REQUESTS]
    return requests


def test_steps_ahead_give_the_same_text_and_so_does_the_model_at_once(model: CausalLM) -> None:
    plain = serve(model, overlap=False)
    assert [request.tokens for request in serve(model, overlap=True)] == [request.tokens for request in plain]
    for request in plain[::2]:
        whole = torch.tensor([[*request.prompt, *request.tokens[:-1]]], device=DEVICE)
        logits = model.with_rotating_kv(SIZE)(whole)[0, len(request.prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(request.tokens, device=DEVICE)[:, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() <= 1e-3 * logits.std()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_recorded_steps_give_the_same_text(model: CausalLM) -> None:
    wanted = [request.tokens for request in serve(model, overlap=False)]
    for warm in (False, True):
        assert [request.tokens for request in serve(model, overlap=True, warm=warm)] == wanted


@pytest.mark.parametrize("pool", [None, 255])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_chunks_of_any_size_and_pages(model: CausalLM, kv_bits: int | None, pool: int | None) -> None:
    tokens = (torch.arange(80, device=DEVICE) ** 2 + 5) % 4000
    model = model.with_rotating_kv(SIZE)
    model = model if kv_bits is None else model.with_quantized_kv(kv_bits, 32)

    def fed(lengths: list[int], pool: int | None) -> Tensor:
        with tuning.override("pages", {"page_size": 16}):
            cache = model.make_cache(8, 600, pool_positions=pool)
        assert (cache.pages is None) == (pool is None)
        assert cache.reserve(1, 80)
        parts, start = [], 0
        for length in lengths:
            positions, slots = ragged([1], [length], [start], DEVICE)
            parts.append(model.logits(model.forward(tokens[start : start + length], positions, slots, cache)))
            start += length
        return torch.cat(parts)

    with torch.inference_mode():
        wanted = fed([1] * 80, None)
        for lengths in ([80], [5, 17, 20, 1, 1, 36], [1] * 80 if pool else [32, 48]):
            # Now and then a number lies between two codes and rounds the other way.
            assert (fed(lengths, pool) - wanted).abs().max() <= (3e-3 if kv_bits else 1e-3) * wanted.std()


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_decode_steps_layers_start_what_they_always_do(kv_bits: int | None) -> None:
    model = hollow("builtin") if kv_bits is None else hollow("builtin").with_quantized_kv(kv_bits)
    for arch in (named("gfx1151"), named("sm_90")):
        assert layer_calls(model.with_rotating_kv(CONTEXT - 96), 2, arch) == layer_calls(model, 2, arch)
