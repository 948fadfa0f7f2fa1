"""A request's numbers, bit by bit, alone and in company."""

import pytest
import torch
from torch import Tensor

import gfxlm
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM

BATCH = 32
PROMPT = [(3 * i * i + 5) % 199 for i in range(70)]
COMPANY = 4 * [(5, 4), (90, 30), (1, 9), (33, 1), (64, 16), (2, 40), (47, 3), (20, 20), (128, 5)]


class Watched:
    """A request whose log probabilities are kept, every step."""

    def __init__(self, request: Request) -> None:
        self.request, self.logprobs = request, list[Tensor]()

    def look(self, produced: list[Request]) -> None:
        if self.request in produced:
            assert self.request.logprobs is not None
            self.logprobs.append(self.request.logprobs.clone())


def engine_for(model: CausalLM, *, invariant: bool) -> Engine:
    return Engine(model, max_batch=BATCH, max_context=256, prefill_step_size=48, batch_invariant=invariant)


def run(model: CausalLM, *, company: bool, invariant: bool, temperature: float) -> Watched:
    engine = engine_for(model, invariant=invariant)
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=4, logprobs=True)
    others = [
        engine.add([7 + (i * 31 + n) % 190 for i in range(n)], SamplingParams(max_tokens=most, temperature=0.0))
        for n, most in COMPANY * company
    ]
    for _ in range(3 * company):
        engine.step()
    watched = Watched(engine.add(PROMPT, params))
    steps = 0
    while watched.request.finish_reason is None:
        watched.look(engine.step())
        steps += 1
        if company and steps == 12:
            engine.finish(next(other for other in others if other.finish_reason is None))
    assert watched.request.error is None
    return watched


def differences(model: CausalLM, *, invariant: bool, temperature: float = 0.0) -> int:
    """At how many of its tokens a request's log probabilities are others in company, or its token is."""
    alone, together = (
        run(model, company=company, invariant=invariant, temperature=temperature) for company in (False, True)
    )
    assert len(alone.logprobs) == len(together.logprobs) == 30
    tokens = zip(alone.request.tokens, together.request.tokens, strict=True)
    scores = zip(alone.logprobs, together.logprobs, strict=True)
    return sum(a != b for a, b in tokens) + sum(not torch.equal(a, b) for a, b in scores)


def small(family: str) -> CausalLM:
    from tests.checkpoints import mlx_checkpoint  # which needs MLX; a machine with a GPU may be without

    return load(str(mlx_checkpoint(family)), device="cpu")[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next"])
def test_company_changes_no_bit(family: str) -> None:
    model = small(family)
    for temperature in (0.0, 0.9):
        assert differences(model, invariant=True, temperature=temperature) == 0


def test_company_shows_where_nobody_asked() -> None:
    model = small("qwen3")
    assert differences(model, invariant=False) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_company_changes_no_bit_on_a_gpu() -> None:
    model, _ = load("builtin", device="cuda")
    for temperature in (0.0, 0.9):
        assert differences(model, invariant=True, temperature=temperature) == 0
    assert differences(model, invariant=False) > 0


def test_batch_generate() -> None:
    model, tokenizer = load("builtin", device="cpu")
    prompts = [tokenizer.encode(text) for text in ("def fibonacci(n):", "import os\n", "class Stack:")]
    settings = {"max_tokens": 12, "max_batch": 4, "max_context": 64, "batch_invariant": True}
    together = gfxlm.batch_generate(model, tokenizer, prompts, **settings).texts
    assert together == [gfxlm.batch_generate(model, tokenizer, [prompt], **settings).texts[0] for prompt in prompts]


def test_not_with_drafts() -> None:
    from gfxlm.engine.drafters import PromptLookup

    model, _ = load("builtin", device="cpu")
    with pytest.raises(UserError, match="batch_invariant"):
        Engine(model, max_context=64, drafter=PromptLookup(3), batch_invariant=True)
