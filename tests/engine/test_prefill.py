"""Chunks of prompts: how they are padded, and that a recorded one does what one fed at once does."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.prefill import PaddedChunk, PrefillStep, bucket_rows
from gfxlm.kernels.batch import Span
from gfxlm.models.base import CausalLM
from gfxlm.ops.ragged import ragged
from tests.engine.serving import serve

# Prompt lengths and lengths of answers: buckets that are full, not full, needed once and again, and several chunks.
REQUESTS = [(5, 40), (1, 1), (17, 30), (300, 50), (40, 60), (9, 2), (128, 20)] * 3
# The same in chunks of 32.
FEWER = [(5, 10), (1, 1), (17, 8), (75, 12), (10, 15), (9, 2), (32, 5)]


@given(st.integers(1, 100_000))
def test_buckets(rows: int) -> None:
    bucket = bucket_rows(rows)
    assert rows <= bucket <= max(rows * 1.25, rows + 15)
    assert bucket % 16 == 0
    assert bucket_rows(bucket) == bucket


def test_a_padded_chunk_says_what_the_batch_is() -> None:
    chunk = PaddedChunk(16, 3, torch.device("cpu"))
    for slots, counts, offsets in (((2, 0), (3, 5), (10, 0)), ((), (), ()), ((1,), (16,), (7,))):
        positions, places = ragged(slots, counts, offsets)
        count = sum(counts)
        chunk.fill(range(100, 100 + count), places.spans)
        assert chunk.tokens.tolist() == [*range(100, 100 + count), *[0] * (16 - count)]
        assert chunk.positions[:count].tolist() == positions.tolist()
        assert chunk.slots.tolist() == [*places.index.tolist(), *[-1] * (16 - count)]


def test_a_padded_chunk_is_for_kernels() -> None:
    model, _ = load("builtin", device="cpu")
    chunk, cache = PaddedChunk(16, 2, model.device), model.make_cache(1, 16)
    chunk.fill([1, 2], [Span(0, 0, 2, 2)])
    with torch.inference_mode(), pytest.raises(ValueError, match="for kernels, and there are none on cpu"):
        chunk.forward(model, cache)


def test_fed_rows_are_the_models() -> None:
    model, _ = load("builtin", device="cpu", dtype=torch.float32)
    cache = model.make_cache(2, 32)
    step = PrefillStep(model, cache, 16)
    with torch.inference_mode():
        fed = step.run([5, 6, 7, 8, 9], [1, 0], [2, 3])
        assert cache.lengths == [3, 2]
        hidden, positions, slots = fed.at([1, 4])
        assert (positions.tolist(), slots.tolist()) == ([1, 2], [1, 0])
        first, second = (model(torch.tensor([tokens]))[0, -1] for tokens in ([5, 6], [7, 8, 9]))
        torch.testing.assert_close(model.logits(hidden), torch.stack((first, second)), rtol=1e-4, atol=1e-4)
        assert torch.equal(fed.at([4])[0], hidden[1:])


def texts(
    model: CausalLM, requests: Sequence[tuple[int, int]], step: int, *, overlap: bool, warm: bool = False
) -> list[list[int]]:
    engine = Engine(model, max_batch=3, max_context=512, prefill_step_size=step, overlap=overlap)
    if warm:
        engine.warm_up()
    return [request.tokens for request in serve(engine, requests)]


def test_prompts_beside_decode_steps_give_the_same_text() -> None:
    model, _ = load("builtin", device="cpu", dtype=torch.float32)
    assert texts(model, FEWER, 32, overlap=True, warm=True) == texts(model, FEWER, 32, overlap=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_chunks_give_the_same_text() -> None:
    model, _ = load("builtin", device="cuda", dtype=torch.float32)
    wanted = texts(model, REQUESTS, 128, overlap=False)
    for warm in (False, True):
        assert texts(model, REQUESTS, 128, overlap=True, warm=warm) == wanted
