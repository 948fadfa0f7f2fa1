"""Prompts that begin like earlier ones: fed from there on, with the same texts, and nothing is left behind."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gfxlm.engine import budget
from gfxlm.engine.drafters import PromptLookup
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.errors import UserError
from gfxlm.models import base
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import RecurrentCache
from tests.engine.serving import finish

PAGE, CONTEXT, STEP = 16, 192, 64
FAMILIES = ["qwen3_next", "qwen3", "qwen3_moe"]
PREFIX = [(7 * i * i + 3) % 499 for i in range(100)]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, budget):
        monkeypatch.setattr(module, "page_size", lambda device: PAGE)


@pytest.fixture(scope="module")
def models() -> Callable[[str], CausalLM]:
    made: dict[str, CausalLM] = {}

    def model(family: str) -> CausalLM:
        if family not in made:
            made[family] = load(checkpoint(family), device="cpu", dtype=torch.float32)[0]
        return made[family]

    return model


def checkpoint(family: str) -> str:
    if family == "builtin":
        return family
    from tests.checkpoints import mlx_checkpoint  # which needs MLX; a machine with a GPU may be without

    return str(mlx_checkpoint(family, dtype=torch.float32))


def engine_for(model: CausalLM, *, prefix_cache: bool = True, overlap: bool = False, slots: int = 3, **more) -> Engine:  # type: ignore[no-untyped-def]
    return Engine(
        model,
        max_batch=slots,
        max_context=CONTEXT,
        prefill_step_size=STEP,
        prefix_cache=prefix_cache,
        overlap=overlap,
        **more,
    )


def ask(engine: Engine, *prompts: list[int], most: int = 8, **more) -> list[Request]:  # type: ignore[no-untyped-def]
    requests = [engine.add(prompt, SamplingParams(max_tokens=most, **more)) for prompt in prompts]
    finish(engine)
    for request in requests:
        request.check()
    return requests


def check_empty(engine: Engine) -> None:
    """Nobody has anything, and every page is free or known to the prefix cache, once."""
    pages, prefixes = engine.cache.pages, engine._prefixes
    assert pages is not None
    assert prefixes is not None
    assert (engine.waiting, engine.running, engine.busy) == (0, 0, False)
    assert engine.free_positions == engine.positions == (pages.count - 1) * PAGE
    assert engine.cache.lengths == [0] * len(engine.cache.lengths)
    assert set(pages._holders) == {0}
    assert set(pages._idle) == set(prefixes._digests) == pages._kept
    assert {page: digest for digest, page in prefixes._known.items()} == prefixes._digests
    assert sorted([*pages._idle, *pages._free]) == list(range(1, pages.count))
    if prefixes._states is not None:
        assert set(prefixes._states._places) <= set(pages._idle)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_beginning_is_not_fed_again(models: Callable[[str], CausalLM], family: str, overlap: bool) -> None:
    engine = engine_for(models(family), overlap=overlap)
    plain = engine_for(models(family), overlap=overlap, prefix_cache=False)
    prompts = [[*PREFIX, 5, 6, 7], [*PREFIX, 5, 6, 7], PREFIX[:40], [*PREFIX[:70], 8, 9]]
    for prompt, cached in zip(prompts, [0, 96, 32, 64], strict=True):
        [request], [wanted] = ask(engine, prompt), ask(plain, prompt)
        assert request.tokens == wanted.tokens
        if family != "qwen3_next":
            assert request.cached == cached
    assert (engine.prefix_queries, plain.prefix_queries) == (sum(map(len, prompts)), 0)
    check_empty(engine)
    engine.clear_prefixes()
    check_empty(engine)
    hits = engine.prefix_hits
    assert ask(engine, prompts[0])[0].cached == 0
    assert engine.prefix_hits == hits


def test_a_recurrent_model_goes_on_where_a_state_was_saved(models: Callable[[str], CausalLM]) -> None:
    engine = engine_for(models("qwen3_next"))
    # At the ends of chunks, 64, and of the prompt's last whole page, 96.
    assert [ask(engine, [*PREFIX, 5])[0].cached for _ in range(2)] == [0, 96]
    # Where a prompt parts from a known one it is fed from the last state before; the next one that parts there is not.
    assert [ask(engine, [*PREFIX[:85], n])[0].cached for n in (1, 2)] == [64, 80]


def test_the_next_turn_goes_on_behind_the_answer(models: Callable[[str], CausalLM]) -> None:
    engine = engine_for(models("qwen3"))
    [first] = ask(engine, PREFIX, most=30)
    [second] = ask(engine, [*PREFIX, *first.tokens, 5, 6, 7])
    assert second.cached == 128
    [wanted] = ask(engine_for(models("qwen3"), prefix_cache=False), [*PREFIX, *first.tokens, 5, 6, 7])
    assert second.tokens == wanted.tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_come_together_are_fed_once(models: Callable[[str], CausalLM], family: str) -> None:
    engine = engine_for(models(family))
    requests = ask(engine, *([PREFIX] * 3))
    assert [request.cached for request in requests] == [0, 96, 96]
    assert len({tuple(request.tokens) for request in requests}) == 1


@pytest.mark.parametrize("kv", [None, 8])
def test_what_is_shared_is_never_written(models: Callable[[str], CausalLM], kv: int | None) -> None:
    model = models("qwen3") if kv is None else models("qwen3").with_quantized_kv(kv)
    engine = engine_for(model, overlap=True)
    ask(engine, PREFIX)
    prefixes = engine._prefixes
    assert prefixes is not None
    known = list(prefixes._digests)
    before = [tensor[known].clone() for layer in engine.cache.layers for tensor in layer.tensors]
    assert len(known) == 6
    for prompt in ([*PREFIX, 5], PREFIX, PREFIX[:50]):
        assert ask(engine, prompt, most=40)[0].cached
    after = [tensor[known] for layer in engine.cache.layers for tensor in layer.tensors]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("family", ["builtin", *FAMILIES])
def test_the_same_bits_with_a_cached_beginning(models: Callable[[str], CausalLM], family: str) -> None:
    model = models(family)

    def logprobs(engine: Engine, prompt: list[int]) -> tuple[int, list[torch.Tensor]]:
        request = engine.add(prompt, SamplingParams(max_tokens=5, logprobs=True))
        found = []
        while request.finish_reason is None:
            found += [request.logprobs.clone() for one in engine.step() if one.logprobs is not None]
        return request.cached, found

    prompt = [*PREFIX, *PREFIX[:50], 5]
    invariant = engine_for(model, batch_invariant=True)
    cold, wanted = logprobs(invariant, prompt)
    ask(invariant, [*PREFIX[:99], 1])  # of which 64 positions are a whole chunk
    warm, found = logprobs(invariant, prompt)
    assert (cold, warm) == (0, 128)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_pages_that_are_needed_make_room(models: Callable[[str], CausalLM]) -> None:
    engine = engine_for(models("qwen3"), slots=1)
    for first in range(5):
        ask(engine, [first, *PREFIX])
        check_empty(engine)
    assert ask(engine, [4, *PREFIX])[0].cached == 96
    assert ask(engine, [0, *PREFIX])[0].cached == 0


def test_what_failed_is_not_gone_on_from(models: Callable[[str], CausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("qwen3")
    engine = engine_for(model)
    logits = model.logits
    with monkeypatch.context() as patch:
        patch.setattr(model, "logits", lambda hidden: logits(hidden) * torch.nan)
        request = engine.add(PREFIX, SamplingParams())
        finish(engine)
        assert request.error is not None
    check_empty(engine)
    assert ask(engine, PREFIX)[0].cached == 0


def test_states_make_room_for_each_other(models: Callable[[str], CausalLM]) -> None:
    engine = engine_for(models("qwen3_next"))
    prefixes = engine._prefixes
    assert prefixes is not None
    states = prefixes._states
    assert states is not None
    states._free = states._free[:2]
    for first in range(3):
        ask(engine, [first, *PREFIX])
        assert len(states._places) <= 2
    assert [ask(engine, [first, *PREFIX])[0].cached for first in (2, 0)] == [96, 0]
    check_empty(engine)


def test_drafts_go_with_it(models: Callable[[str], CausalLM]) -> None:
    prompt = [*PREFIX[:20] * 4, 5]
    for family in FAMILIES:
        [wanted] = ask(engine_for(models(family), prefix_cache=False), prompt, most=40)
        engine = engine_for(models(family), drafter=PromptLookup(4))
        assert [ask(engine, prompt, most=40)[0].tokens for _ in range(2)] == [wanted.tokens] * 2
        assert engine.prefix_hits == 80
        check_empty(engine)


def test_what_cannot_be_shared(models: Callable[[str], CausalLM]) -> None:
    model = models("qwen3")
    with pytest.raises(UserError, match="a cache of its own"):
        Engine(model, cache=model.make_cache(1, 64), prefix_cache=True)
    with pytest.raises(UserError, match="max_kv_size"):
        Engine(model.with_rotating_kv(64), max_context=CONTEXT, prefix_cache=True)
    with pytest.raises(UserError, match="a multiple of 16, but is 40"):
        Engine(model, max_context=64, prefill_step_size=40, prefix_cache=True, batch_invariant=True)


def test_a_request_with_a_cache_of_its_own_shares_nothing(models: Callable[[str], CausalLM]) -> None:
    engine = engine_for(models("qwen3"))
    request = engine.add(PREFIX, SamplingParams(max_tokens=4), keep_cache=True)
    finish(engine)
    known = engine.prefix_queries
    again = engine.add(PREFIX[:40], SamplingParams(max_tokens=4), prefix=request.cache)
    finish(engine)
    again.check()
    assert (again.cached, engine.prefix_queries) == (0, known)
    check_empty(engine)


def test_every_slot_has_room_for_its_context(models: Callable[[str], CausalLM]) -> None:
    cache = Engine(models("qwen3"), max_batch=2, max_context=100, prefix_cache=True).cache
    assert cache.max_context == 100
    assert all(cache.reserve(slot, 100) for slot in range(2))


def test_warm_up(models: Callable[[str], CausalLM]) -> None:
    engine = engine_for(models("qwen3_next"))
    engine.warm_up()
    check_empty(engine)
    assert (engine.prefix_queries, engine.prefix_hits) == (0, 0)


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # whose beginning
        st.integers(1, 110),  # how much of it
        st.integers(0, 30),  # tokens of its own
        st.integers(1, 20),  # tokens to generate
        st.sampled_from(["end", "end", "end", "cancel", "late"]),
        st.integers(0, 6),  # steps until the next one
    ),
    min_size=3,
    max_size=8,
)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_any_company(models: Callable[[str], CausalLM], family: str, overlap: bool) -> None:
    """Random requests that share beginnings, some cut off, in a small pool: with and without, texts are the same."""
    model = models(family)
    plain = engine_for(model, prefix_cache=False, slots=1)
    hits = []
    texts: dict[tuple[int, ...], list[int]] = {}

    def wanted(prompt: list[int], most: int) -> list[int]:
        if tuple(prompt) not in texts:
            texts[tuple(prompt)] = ask(plain, prompt, most=20)[0].tokens
        return texts[tuple(prompt)][:most]

    @settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(EVENTS, st.integers(0, 2**32))
    def run(events: list[tuple[int, int, int, int, str, int]], seed: int) -> None:
        engine = engine_for(model, overlap=overlap, slots=3)
        shrink(engine)
        dice = random.Random(seed)
        asked = []
        for whose, shared, own, most, fate, steps in events:
            prompt = [whose, *PREFIX[:shared], *(dice.randrange(499) for _ in range(own))]
            request = engine.add(prompt, SamplingParams(max_tokens=most), timeout=0.01 if fate == "late" else None)
            asked.append((request, prompt, most, fate))
            for _ in range(steps):
                engine.step()
            if fate == "cancel":
                engine.finish(request)
        finish(engine)
        check_empty(engine)
        hits.append(engine.prefix_hits)
        for request, prompt, most, fate in asked:
            text = wanted(prompt, most)
            assert request.tokens == text[: len(request.tokens)]
            if fate == "end":
                assert request.error is None
                assert request.tokens == text

    run()
    assert sum(hits) > 0


def shrink(engine: Engine) -> None:
    """Leave so few pages that requests wait for each other and push out what is kept: one of them fits."""
    pages = engine.cache.pages
    assert pages is not None
    assert not any(isinstance(layer, RecurrentCache) and layer.state.isnan().any() for layer in engine.cache.layers)
    pages.count = CONTEXT // PAGE + 5
    pages._free = set(range(1, pages.count))
