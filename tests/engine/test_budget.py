"""What a model needs of memory, against the bytes of real tensors, and what is said where there is too little."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gfxlm
from gfxlm.device.memory import parsed_bytes, taken_bytes
from gfxlm.engine import budget as budgets
from gfxlm.engine import engine as engines
from gfxlm.engine.budget import Budget, explain_out_of_memory, is_out_of_memory, planned, remaining
from gfxlm.engine.drafters import DraftModel, PromptLookup
from gfxlm.engine.engine import Engine
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.load import build, load_model
from gfxlm.nn.cache import Cache, KVFormat
from gfxlm.weights.checkpoint import Checkpoint
from tests.checkpoints import mlx_checkpoint
from tests.engine.test_info import QWEN3_8B, QWEN3_CODER_NEXT, headers

CPU = torch.device("cpu")
PLAN = Budget(
    memory=10_000,
    weights=4000,
    workspace=1000,
    state=100,
    position=10,
    quantized={8: 5, 4: 3},
    context_length=2000,
)


@given(st.integers(0, 20_000), st.integers(0, 50), st.integers(1, 8))
def test_what_fits_is_what_is_needed(memory: int, position: int, slots: int) -> None:
    plan = replace(PLAN, memory=memory, position=position, slots=slots)
    most = plan.positions
    assert most >= 0
    if most:
        assert plan.needed(most) <= memory
    if most < slots * plan.context_length:
        assert plan.needed(most + 1) > memory or plan.needed(0) > memory
    assert plan.longest == min(most, plan.context_length)


def test_refusals() -> None:
    PLAN.check(490)
    with pytest.raises(UserError) as refusal:
        PLAN.check(800)
    assert str(refusal.value) == (
        "not enough memory: 13.10 kB are needed (4.00 kB of weights, 8.00 kB of keys and values for 800 tokens, "
        "100 bytes of recurrent state, 1.00 kB to work in), 10.00 kB can be had; "
        "what would fit: a context of 490 tokens, 800 tokens with 8-bit keys and values (kv_bits)"
    )
    with pytest.raises(UserError, match=r"490 tokens, 980 tokens with 8-bit .*, 1000 tokens with 4-bit"):
        PLAN.check(1000)
    with pytest.raises(
        UserError, match="not even a short context would fit; a smaller model would, or one of fewer bits"
    ):
        replace(PLAN, memory=4500).check(1)
    with pytest.raises(UserError, match=r"would fit: 16 tokens with 4-bit keys and values"):
        replace(PLAN, memory=5150, position=60, quantized={4: 3}).check(1000)


def test_a_context_is_shortened_with_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PLAN.fit(490) == 490
    with pytest.warns(
        UserWarning, match="shortened to 490 tokens instead of 500, for which there is not enough memory"
    ):
        assert PLAN.fit(500) == 490
    for options in ({"exact": True}, {"least": 491}):
        with pytest.raises(UserError, match="not enough memory"):
            PLAN.fit(500, **options)  # type: ignore[arg-type]
    assert PLAN.fit(100, least=200) == 100


@pytest.mark.parametrize(("family", "recipe"), [("qwen3", "4bit"), ("qwen3_next", "4bit"), ("llama", "dense")])
@pytest.mark.parametrize("bits", [None, 4])
def test_planned_is_what_is_loaded(family: str, recipe: str, bits: int | None) -> None:
    checkpoint = Checkpoint.open(mlx_checkpoint(family, recipe))
    kv = None if bits is None else KVFormat(bits, 32)
    plan = planned(build(checkpoint)[0], checkpoint, CPU, kv=kv, slots=2)
    model = load_model(checkpoint)
    model = model if kv is None else model.with_quantized_kv(kv.bits, kv.group_size)
    # Norms and other vectors are no matrices.
    assert plan.weights == pytest.approx(model.weight_bytes, rel=2e-2)
    assert plan.needed(2 * 50) - plan.weights - plan.workspace == model.make_cache(2, 50).nbytes
    now = remaining(model, slots=2)
    assert (now.position, now.state, now.workspace) == (plan.position, plan.state, plan.workspace)
    assert now.quantized == plan.quantized
    assert now.quantized[4] == load_model(checkpoint).cache_bytes(torch.bfloat16, KVFormat(4, 64))[0]


def test_published_models_on_usual_devices(tmp_path: Path) -> None:
    """What is known of them: an 8B model of 4 bits runs on 8 GB with a few thousand tokens, an 80B one needs 48 GB."""
    checkpoint = headers(QWEN3_8B, tmp_path)
    plan = planned(build(checkpoint)[0], checkpoint, torch.device("meta"))
    plan = replace(plan, memory=8_000_000_000, workspace=plan.workspace + budgets._FIXED["cuda"])
    assert plan.position == 147456
    assert 10_000 < plan.longest < 20_000
    assert replace(plan, position=plan.quantized[8]).longest > 1.8 * plan.longest
    assert replace(plan, memory=4_000_000_000).longest == 0
    assert replace(plan, memory=24_000_000_000).longest == 40960
    checkpoint = headers(QWEN3_CODER_NEXT, tmp_path)
    plan = planned(build(checkpoint)[0], checkpoint, torch.device("meta"))
    assert replace(plan, memory=48_000_000_000).longest > 50_000
    assert replace(plan, memory=40_000_000_000).longest == 0


@pytest.mark.parametrize(("host", "told"), [(120, True), (17, False)])
def test_memory_that_an_integrated_gpu_may_not_use(host: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Strix Halo whose kernel lends it 16 GB of 128: there is a way to more."""
    checkpoint, gpu = Checkpoint.open(mlx_checkpoint("qwen3")), torch.device("cuda")
    model, free = build(checkpoint)[0], {"cuda": 16 << 30, "cpu": host << 30}
    monkeypatch.setattr(budgets, "unified", lambda device: device.type == "cuda")
    monkeypatch.setattr(budgets, "available_bytes", lambda device, limit=None: limit or free[device.type])
    plan = planned(model, checkpoint, gpu)
    assert plan.unreached == (host - 16) << 30
    with pytest.raises(UserError) as refusal:
        replace(plan, weights=17 << 30).check(100)
    more = "; the host has 111.67 GB more that this GPU may not use: gfxlm doctor says how it may"
    assert str(refusal.value).endswith(more) == told
    assert planned(model, checkpoint, gpu, limit=1 << 30).unreached == 0
    assert planned(model, checkpoint, CPU).unreached == 0


@pytest.fixture(scope="module")
def loaded() -> tuple[CausalLM, Tokenizer]:
    return gfxlm.load(mlx_checkpoint("qwen3"))


def with_room(model: CausalLM, positions: int, slots: int = 1) -> None:
    """Limit a model so that there is memory for so many positions."""
    plan = remaining(model, slots=slots)
    model.memory_limit = taken_bytes(CPU) + plan.needed(positions) - plan.weights + plan.position // 2


def test_caches_in_what_there_is(loaded: tuple[CausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded

    def room(positions: int, slots: int) -> None:
        plan = remaining(model, slots=slots)
        monkeypatch.setattr(budgets, "available_bytes", lambda *_: plan.needed(positions) - plan.weights)

    room(3000, 4)
    assert budgets.make_cache(model, remaining(model, slots=4), 700).pages is None
    cache = budgets.make_cache(model, remaining(model, slots=4), 1000)
    assert cache.pages is not None
    assert (cache.max_context, cache.pages.count) == (1000, 3000 // cache.pages.size)
    assert cache.nbytes <= 3000 * remaining(model).position + cache.pages.table.nbytes
    room(600, 4)
    with pytest.warns(UserWarning, match="shortened to 600 tokens instead of 1000"):
        assert budgets.make_cache(model, remaining(model, slots=4), 1000).max_context <= 600
    with pytest.raises(UserError, match="what would fit: a context of 600 tokens"):
        budgets.make_cache(model, remaining(model, slots=4), 1000, exact=True)
    room(100, 4)
    with pytest.raises(UserError, match=r"for 256 tokens.*a context of 100 tokens"):
        budgets.make_cache(model, remaining(model, slots=4), 1000)


def test_what_does_not_fit_is_not_loaded() -> None:
    folder = mlx_checkpoint("qwen3")
    read: list[int] = []
    with pytest.raises(UserError, match=f"^{folder}: not enough memory: .*not even a short context") as refusal:
        gfxlm.load(folder, memory_limit="100MB", progress=lambda done, total: read.append(done))
    assert read == []
    assert "0 bytes can be had" in str(refusal.value)
    with pytest.raises(UserError, match="memory limit 'lots': expected an amount"):
        gfxlm.load(folder, memory_limit="lots")
    with pytest.raises(UserError, match="max_context must be from 1 to the model's 1024, but is 1025"):
        gfxlm.load(folder, max_context=1025)
    model, _ = gfxlm.load(folder, memory_limit="80%", max_context=1024)
    assert model.memory_limit == parsed_bytes("80%", CPU)
    assert model.with_quantized_kv().memory_limit == model.memory_limit


def test_requests_keep_to_the_limit(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    prompt = [7] * 300
    try:
        with_room(model, 4096)
        assert gfxlm.generate(model, tokenizer, prompt, max_tokens=4)
        model.memory_limit = 1000
        with pytest.raises(UserError, match=r"not enough memory: .* for 301 tokens"):
            gfxlm.generate(model, tokenizer, prompt, max_tokens=400)
        with pytest.raises(UserError, match=r"not enough memory: .* for 304 tokens"):
            gfxlm.generate(model, tokenizer, prompt, max_tokens=4, max_context=310)
        with pytest.raises(UserError, match="not enough memory"):
            gfxlm.batch_generate(model, tokenizer, [prompt, prompt])
    finally:
        model.memory_limit = None


def test_a_context_that_is_asked_for(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    *_, last = gfxlm.stream_generate(model, tokenizer, [7] * 30, max_tokens=100, max_context=40)
    assert (last.finish_reason, last.generation_tokens) == ("length", 11)
    with pytest.raises(UserError, match="the prompt has 30 tokens, but the context holds 20"):
        gfxlm.generate(model, tokenizer, [7] * 30, max_context=20)
    for context in (0, 1025):
        with pytest.raises(UserError, match=f"max_context must be from 1 to the model's 1024, but is {context}"):
            gfxlm.generate(model, tokenizer, [7] * 30, max_context=context)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.20 GiB. GPU 0 has ..."), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 77 bytes."),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("shape '[3]' is invalid"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory(error: Exception, is_one: bool, loaded: tuple[CausalLM, Tokenizer]) -> None:
    assert is_out_of_memory(error) == is_one
    text = explain_out_of_memory(error, loaded[0], loaded[0].make_cache(1, 64))
    assert "prefill_step_size" in text
    assert "\n" not in text
    assert ("wanted 1.20 GiB" in text) == ("1.20 GiB" in str(error))
    assert ("wanted 77 bytes" in text) == ("77 bytes" in str(error))


def test_torchs_own_error_is_recognised() -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    assert is_out_of_memory(caught.value)


@pytest.fixture(scope="module")
def hybrid() -> tuple[CausalLM, Tokenizer]:
    return gfxlm.load(mlx_checkpoint("qwen3_next"))


def test_an_engine_counts_its_drafter(hybrid: tuple[CausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = hybrid
    asked: list[Budget] = []
    make = engines.make_cache

    def made(model: CausalLM, budget: Budget, *args: Any, **named: Any) -> Cache:
        asked.append(budget)
        return make(model, budget, *args, **named)

    monkeypatch.setattr(engines, "make_cache", made)
    plain = remaining(model, slots=2, prefill_step_size=64)
    for drafter, states, positions in ((None, 1, 1), (PromptLookup(3), 2, 1), (DraftModel(model), 4, 2)):
        Engine(model, max_batch=2, max_context=64, prefill_step_size=64, drafter=drafter)
        budget = asked.pop()
        assert (budget.slots, budget.state, budget.position) == (2, states * plain.state, positions * plain.position)
    Engine(model, max_batch=2, max_context=64, budget=plain)
    assert asked == [plain]


def test_memory_is_looked_at_once(hybrid: tuple[CausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    look = budgets.available_bytes
    monkeypatch.setattr(budgets, "available_bytes", lambda *given: looks.append(given) or look(*given))
    for generate in (gfxlm.generate, gfxlm.batch_generate):
        looks.clear()
        generate(*hybrid, [5, 6] if generate is gfxlm.generate else [[5, 6], [7]], max_tokens=2)
        assert len(looks) == 1
