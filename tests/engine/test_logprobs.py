"""Log probabilities of the likeliest tokens, against float64's, however a token came about."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gfxlm
from gfxlm.engine.callbacks import callbacks
from gfxlm.engine.drafters import PromptLookup
from gfxlm.engine.engine import Engine
from gfxlm.engine.grammar import Grammar
from gfxlm.engine.logprobs import TokenLogprob, likeliest, token_logprob
from gfxlm.engine.params import MAX_TOP_LOGPROBS, SamplingParams
from gfxlm.engine.request import Request
from gfxlm.engine.sampler import Sampler
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM

PROMPT = [5, 6, 7, 8, 5, 6, 7]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return gfxlm.load("builtin", dtype=torch.float32, device="cpu")[0]


def check(found: TokenLogprob, token: int, logits: torch.Tensor, count: int, tolerance: float = 1e-5) -> None:
    """`found` is what float64's log softmax of the logits (V,) says."""
    expected = torch.log_softmax(logits.double(), 0)
    assert found.token == token
    assert found.logprob == pytest.approx(expected[token].item(), abs=tolerance)
    assert len(found.top) == min(count, int((expected > -torch.inf).sum()), len(expected))
    best = expected.sort(descending=True).values[: len(found.top)]
    torch.testing.assert_close(torch.tensor([value for _, value in found.top]).double(), best, rtol=0, atol=tolerance)
    for other, value in found.top:
        assert value == pytest.approx(expected[other].item(), abs=tolerance)
    assert len({other for other, _ in found.top}) == len(found.top)


@settings(deadline=None)
@given(
    vocab_size=st.integers(1, 70),
    count=st.integers(0, MAX_TOP_LOGPROBS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    banned=st.integers(0, 69),
    seed=st.integers(0, 99),
)
def test_likeliest(vocab_size: int, count: int, dtype: torch.dtype, banned: int, seed: int) -> None:
    logits = (5 * torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed))).to(dtype)
    logits[1, : min(banned, vocab_size - 1)] = -torch.inf
    chosen = torch.tensor([0, vocab_size - 1, -1])
    rows = likeliest(logits, chosen)
    assert rows.dtype == torch.float32
    assert rows.shape == (3, 1 + 2 * min(MAX_TOP_LOGPROBS, vocab_size))
    for row, token, its_logits in zip(rows[:2], chosen.tolist(), logits, strict=False):
        check(token_logprob(row, token, count), token, its_logits, count)


def run(engine: Engine, wanted: Sequence[SamplingParams]) -> list[tuple[Request, list[TokenLogprob | None]]]:
    requests = [engine.add([*PROMPT, number], params) for number, params in enumerate(wanted)]
    found: dict[Request, list[TokenLogprob | None]] = {request: [] for request in requests}
    while engine.busy:
        for request in engine.step():
            assert request.error is None
            found[request].append(request.logprob)
    return list(found.items())


WANTED = [
    SamplingParams(max_tokens=24, top_logprobs=5),
    SamplingParams(max_tokens=14),
    SamplingParams(max_tokens=12, temperature=1.0, seed=3, top_logprobs=0, top_p=0.5),
    SamplingParams(max_tokens=12, temperature=0.7, seed=4, top_logprobs=20, logit_bias={7: 3.0}),
]


@pytest.mark.parametrize(
    "options",
    [{"overlap": True}, {"overlap": False}, {"drafter": True}, {"drafter": True, "overlap": True}, {"max_batch": 2}],
    ids=str,
)
def test_a_request_has_those_of_its_own_logits(model: CausalLM, options: dict[str, Any]) -> None:
    if "drafter" in options:
        options = options | {"drafter": PromptLookup(3)}
    drafted = 0
    for number, (request, found) in enumerate(
        run(Engine(model, **{"max_batch": 4, "max_context": 64} | options), WANTED)
    ):
        assert len(found) == len(request.tokens)
        drafted += request.accepted
        if request.params.top_logprobs is None:
            assert found == [None] * len(found)
            continue
        text = [*PROMPT, number, *request.tokens]
        logits = every_logits(model, text)[len(PROMPT) : -1]
        for token, bias in (request.params.logit_bias or {}).items():
            logits[:, token] += bias
        for logprob, token, row in zip(found, request.tokens, logits, strict=True):
            check(logprob, token, row, request.params.top_logprobs, tolerance=2e-3)
    assert drafted > 0 or "drafter" not in options


def every_logits(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    """The logits behind each of the tokens, in one pass."""
    from gfxlm.ops.ragged import ragged

    with torch.inference_mode():
        positions, slots = ragged([0], [len(tokens)], [0], model.device)
        hidden = model.forward(torch.tensor(tokens), positions, slots, model.make_cache(1, len(tokens)))
        logits = model.logits(hidden)
    return logits.clone()


def test_company_changes_none(model: CausalLM) -> None:
    params = [SamplingParams(max_tokens=8, temperature=1.0, seed=i, top_logprobs=3) for i in range(3)]
    together = run(Engine(model, max_batch=3, max_context=64, batch_invariant=True), params)
    alone = run(Engine(model, max_batch=3, max_context=64, batch_invariant=True), params[:1])
    assert together[0][1] == alone[0][1]


def test_they_change_no_token(model: CausalLM) -> None:
    without = [replace(params, top_logprobs=None) for params in WANTED]
    found, plain = (run(Engine(model, max_batch=4, max_context=64), wanted) for wanted in (WANTED, without))
    assert [request.tokens for request, _ in found] == [request.tokens for request, _ in plain]


def test_what_a_grammar_bans_is_not_among_them() -> None:
    sampler = Sampler(1, 100)
    sampler.set(0, SamplingParams(top_logprobs=20, grammar=Grammar("json_object")))
    mask = torch.zeros(1, 4, dtype=torch.int32)
    mask[0, 2] = 0b1101
    sampler.allow([0], mask)
    logits = torch.randn(1, 100)
    tokens, _, top = sampler.sample(logits, torch.tensor([0]), torch.tensor([0]))
    logits[0, [token for token in range(100) if token not in (64, 66, 67)]] = -torch.inf
    check(token_logprob(top[0], tokens.item(), 20), tokens.item(), logits[0], 20)


def test_functions_of_ones_own(model: CausalLM) -> None:
    sampler = callbacks(None, [lambda _, logits: logits * 2])
    engine = Engine(model, max_batch=2, max_context=64, sampler=sampler)
    request = engine.add(PROMPT, SamplingParams(max_tokens=1, top_logprobs=4))
    engine.step()
    check(request.logprob, request.tokens[0], every_logits(model, PROMPT)[-1] * 2, 4, tolerance=2e-3)


@pytest.mark.parametrize("count", [-1, 21, 1.5, True])
def test_bad_numbers(count: object) -> None:
    with pytest.raises(UserError, match="top_logprobs must be an integer from 0 to 20"):
        SamplingParams(top_logprobs=count)
