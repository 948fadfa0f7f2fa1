"""Speculative decoding: whoever drafts, whatever is refused, tokens and caches are those of plain decoding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gfxlm
from gfxlm.engine.callbacks import callbacks
from gfxlm.engine.conversation import Conversation
from gfxlm.engine.decode import DecodeStep
from gfxlm.engine.drafters import Drafter, DraftModel, PromptLookup, Target
from gfxlm.engine.engine import Engine
from gfxlm.engine.load import load
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.request import Request
from gfxlm.engine.snapshots import Snapshots
from gfxlm.engine.speculative import Speculation
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache, RecurrentCache

PROMPT = [5, 6, 7, 8, 5, 6, 7]
LENGTHS = [(5, 9), (1, 1), (17, 40), (3, 12), (2, -1), (9, 2)]  # of prompts, and the most tokens of their answers
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "logprobs": True},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
}


class Told:
    """Drafts what it was told will come, all but every `wrong`-th token; nothing after every `silent`-th."""

    def __init__(self, texts: Sequence[Sequence[int]], num_tokens: int = 3, wrong: int = 0, silent: int = 0) -> None:
        self.num_tokens, self._texts, self._wrong, self._silent = num_tokens, texts, wrong, silent

    def attach(self, target: Target) -> None:
        self._known: dict[int, list[int]] = {}

    def warm_up(self) -> None:
        pass

    def reset(self) -> None:
        pass

    def begin(self, slot: int, tokens: Sequence[int]) -> None:
        self._known[slot] = list(tokens)

    def extend(self, slot: int, token: int) -> None:
        self._known[slot].append(token)

    def end(self, slot: int) -> None:
        del self._known[slot]

    def draft(self, most: Mapping[int, int]) -> dict[int, list[int]]:
        return {slot: self._guess(self._known[slot], min(count, self.num_tokens)) for slot, count in most.items()}

    def _guess(self, known: list[int], count: int) -> list[int]:
        if self._silent and len(known) % self._silent == 0:
            return []
        text = next(text for text in self._texts if list(text[: len(known)]) == known)
        places = range(len(known), min(len(known) + count, len(text)))
        return [text[i] ^ 1 if self._wrong and i % self._wrong == 0 else text[i] for i in places]


def tiny(family: str) -> tuple[CausalLM, Tokenizer]:
    pytest.importorskip("mlx_lm")
    from tests.checkpoints import mlx_checkpoint

    return gfxlm.load(mlx_checkpoint(family), dtype=torch.float32)


@pytest.fixture(scope="module")
def hybrid() -> CausalLM:
    return tiny("qwen3_next")[0]


@pytest.fixture(scope="module")
def dense() -> CausalLM:
    return tiny("qwen3")[0]


@pytest.fixture(params=["hybrid", "dense"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    loaded: CausalLM = request.getfixturevalue(request.param)
    return loaded


def finish(engine: Engine, request: Request | None = None) -> None:
    while engine.busy if request is None else request.finish_reason is None:
        engine.step()


def serve(model: CausalLM, drafter: Drafter | None, *, overlap: bool = False, **sampling: object) -> list[Request]:
    """Three slots, six requests of different lengths, some of which join while others run."""
    engine = Engine(model, max_batch=3, max_context=48, overlap=overlap, drafter=drafter)
    requests = []
    for seed, (length, max_tokens) in enumerate(LENGTHS):
        params = SamplingParams(max_tokens=max_tokens, seed=seed, **sampling)
        requests.append(engine.add(range(100 + seed, 100 + seed + length), params))
        if seed % 2:
            engine.step()
    finish(engine)
    return requests


def answer(model: CausalLM, drafter: Drafter | None = None, **options: object) -> Request:
    """One request by itself."""
    params = SamplingParams(**{"max_tokens": 24, "temperature": 0.8, "seed": 3, **options})
    engine = Engine(model, max_context=64, drafter=drafter)
    request = engine.add(PROMPT, params)
    finish(engine)
    return request


def told(requests: Sequence[Request], **options: int) -> Told:
    return Told([[*request.prompt, *request.tokens] for request in requests], **options)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_same_tokens_in_company(model: CausalLM, sampling: str, overlap: bool) -> None:
    plain = serve(model, None, **SAMPLING[sampling])
    drafters = [PromptLookup(5), told(plain), told(plain, num_tokens=6, wrong=5, silent=3)]
    for drafter in drafters:
        requests = serve(model, drafter, overlap=overlap, **SAMPLING[sampling])
        assert [request.tokens for request in requests] == [request.tokens for request in plain]
        assert {request.finish_reason for request in requests} == {"length"}
    assert sum(request.drafted for request in requests) > sum(request.accepted for request in requests) > 10


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_same_tokens_in_every_family(family: str) -> None:
    model, _ = tiny(family)
    for options in SAMPLING.values():
        plain = answer(model, **options)
        for drafter in (told([plain], wrong=4), told([plain], num_tokens=30), PromptLookup(8), DraftModel(model)):
            assert answer(model, drafter, **options).tokens == plain.tokens


def test_log_probabilities_are_those_of_each_token(model: CausalLM) -> None:
    def collected(drafter: Drafter | None) -> list[Tensor]:
        engine = Engine(model, max_context=64, drafter=drafter)
        request = engine.add(PROMPT, SamplingParams(max_tokens=20, temperature=0.0, logprobs=True))
        found = []
        while engine.busy:
            engine.step()
            assert request.logprobs is not None
            found.append(request.logprobs)
        return found

    plain = collected(None)
    torch.testing.assert_close(collected(told([answer(model, temperature=0.0)], wrong=5)), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_the_model_itself_is_right_about_everything(model: CausalLM, num_tokens: int) -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0}):
        request = answer(model, DraftModel(model, num_tokens), **options)
        assert request.tokens == answer(model, **options).tokens
        assert request.accepted == request.drafted >= 23 - -(-23 // (num_tokens + 1))


def test_draft_model_is_wound_back(hybrid: CausalLM) -> None:
    """It drafts from what was accepted, not from what it had guessed: with penalties it is often wrong."""
    options = {"repetition_penalty": 1.3, "max_tokens": 40}
    drafter = DraftModel(hybrid, 4)
    request = answer(hybrid, drafter, **options)
    assert request.tokens == answer(hybrid, **options).tokens
    assert request.accepted < request.drafted
    engine = Engine(hybrid, max_context=64, drafter=drafter)
    again = engine.add(PROMPT, SamplingParams(max_tokens=10, temperature=0.0))
    finish(engine)
    assert again.drafted == again.accepted > 0


def test_draft_model_with_a_shorter_context(hybrid: CausalLM, dense: CausalLM) -> None:
    """Beyond its own context it drafts nothing."""
    plain = answer(dense, max_tokens=40)
    drafter = DraftModel(dense)
    drafter.model = dense
    limit, dense.model.rope.limit = dense.model.rope.limit, 24
    try:
        engine = Engine(dense, max_context=24)
        drafter.attach(Target(dense, 1, 64, engine.sampler, 64))
    finally:
        dense.model.rope.limit = limit
    drafter.begin(0, [*PROMPT, *plain.tokens[:15]])  # 22 tokens: two more, and a guess behind them
    assert len(drafter.draft({0: 9})[0]) == 3
    drafter.extend(0, 1)
    drafter.extend(0, 1)
    drafter.extend(0, 1)
    assert drafter.draft({0: 9}) == {}


def test_a_pass_for_many_tokens(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    verify = Speculation.verify
    monkeypatch.setattr(Speculation, "verify", lambda self, plan: passes.append(len(plan)) or verify(self, plan))
    plain = answer(model)
    passes.clear()
    assert answer(model, told([plain])).tokens == plain.tokens
    assert len(passes) == 6  # of four tokens each, after the prompt's own, the last of them of three


def test_refused_drafts_cost_no_passes_of_their_own(hybrid: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted tokens are fed again beside the next drafts, and are taken in when they get many."""
    rows: list[int] = []
    verify = Speculation.verify

    def counted(self: Speculation, plan: Mapping[Request, Sequence[int]]) -> None:
        rows.extend(len(request.pending) + len(drafts) for request, drafts in plan.items())
        verify(self, plan)

    plain = answer(hybrid, max_tokens=50)
    monkeypatch.setattr(Speculation, "verify", counted)
    request = answer(hybrid, told([plain], wrong=3), max_tokens=50)
    assert request.tokens == plain.tokens
    assert max(rows) <= 8
    assert len(rows) <= 50 * 4 / 7


def test_wrong_drafts_become_rare(model: CausalLM) -> None:
    """And right ones are welcome again."""
    plain = answer(model, max_tokens=50)
    request = answer(model, told([plain], num_tokens=2, wrong=1), max_tokens=50)
    assert (request.tokens, request.accepted) == (plain.tokens, 0)
    assert request.drafted == 2 * 6  # with 0, 1, 3, 7 and 15 tokens in between
    engine = Engine(model, max_context=64, drafter=told([plain]))
    request = engine.add(PROMPT, SamplingParams(max_tokens=50, temperature=0.8, seed=3))
    request.misses, request.rest = 5, 31
    finish(engine)
    assert request.tokens == plain.tokens
    assert request.accepted == request.drafted == 13  # of the last 18 tokens
    assert request.misses == 0


def same_caches(mine: Cache, other: Cache) -> None:
    """What either will ever read of them is the same."""
    assert mine.lengths == other.lengths
    length = mine.lengths[0]
    for ours, theirs in zip(mine.layers, other.layers, strict=True):
        for x, y in zip(ours.tensors, theirs.tensors, strict=True):
            places = list(range(length))
            if isinstance(ours, RecurrentCache):
                kernel = ours.conv.shape[1]  # its oldest input is not needed any more
                places = [p % kernel for p in range(length - kernel + 1, length)]
                places = places if x is ours.conv else list(range(x.shape[1]))
            torch.testing.assert_close(x[:, places], y[:, places], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("wrong", [0, 4])
def test_caches_are_as_plain_decoding_leaves_them(model: CausalLM, wrong: int, overlap: bool) -> None:
    """Wherever the text is cut: amid accepted drafts, after refused ones."""
    plain = answer(model)
    for cut in range(2, 12):
        caches = []
        for drafter in (None, told([plain], num_tokens=4, wrong=wrong)):
            cache = model.make_cache(1, 64)
            engine = Engine(model, cache=cache, overlap=overlap, drafter=drafter)
            request = engine.add(PROMPT, SamplingParams(max_tokens=24, temperature=0.8, seed=3))
            while len(request.tokens) < cut:
                engine.step()
            engine.finish(request)
            assert request.tokens == plain.tokens[:cut]
            caches.append(cache)
        assert caches[1].lengths == [len(PROMPT) + cut]
        same_caches(caches[1], caches[0])


def test_kept_cache_of_a_slot(model: CausalLM) -> None:
    plain = answer(model)
    kept = []
    for drafter in (None, told([plain], wrong=5)):
        engine = Engine(model, max_batch=2, max_context=64, drafter=drafter)
        request = engine.add(PROMPT, SamplingParams(max_tokens=10, temperature=0.8, seed=3), keep_cache=True)
        finish(engine)
        assert request.cache is not None
        kept.append(request.cache)
    same_caches(*kept)


def test_end_of_text_amid_a_run(model: CausalLM) -> None:
    plain = answer(model)
    last = next(token for i, token in enumerate(plain.tokens) if i > 3 and token not in plain.tokens[:i])
    stop = plain.tokens.index(last)
    engine = Engine(model, max_context=64, eos_token_ids=[last], drafter=told([plain], num_tokens=9))
    for _ in range(2):  # the second one in the slot that the first one left amid a run
        request = engine.add(PROMPT, SamplingParams(max_tokens=24, temperature=0.8, seed=3))
        finish(engine)
        assert request.tokens == plain.tokens[: stop + 1]
        assert request.finish_reason == "stop"
        assert not request.queue


@pytest.mark.parametrize("wrong", [0, 6])
def test_context_ends_where_it_would(model: CausalLM, wrong: int) -> None:
    plain = answer(model, max_tokens=-1)
    assert len(plain.tokens) == 64 - len(PROMPT) + 1
    for num_tokens in (1, 4, 11):
        request = answer(model, told([plain], num_tokens=num_tokens, wrong=wrong), max_tokens=-1)
        assert (request.tokens, request.finish_reason) == (plain.tokens, "length")
        cache = model.make_cache(1, 20)
        engine = Engine(model, cache=cache, drafter=told([plain], num_tokens=num_tokens, wrong=wrong))
        request = engine.add(PROMPT, SamplingParams(max_tokens=-1, temperature=0.8, seed=3))
        finish(engine)
        assert request.tokens == plain.tokens[:14]
        assert cache.lengths == [20]


def test_small_chunks_of_prompts_leave_room_for_drafts(model: CausalLM) -> None:
    plain = answer(model)
    for drafter in (told([plain], num_tokens=5), DraftModel(model)):
        engine = Engine(model, max_context=64, prefill_step_size=2, drafter=drafter)
        request = engine.add(PROMPT, SamplingParams(max_tokens=24, temperature=0.8, seed=3))
        finish(engine)
        assert request.tokens == plain.tokens


def test_functions_from_outside_see_what_they_would(model: CausalLM) -> None:
    histories: list[list[int]] = []

    def forbid_seen(tokens: Tensor, logits: Tensor) -> Tensor:
        histories.append(tokens.tolist())
        return logits.index_fill(1, tokens.unique(), -torch.inf)

    def text(drafter: Drafter | None) -> list[int]:
        histories.clear()
        sampler = callbacks(lambda logprobs: logprobs.argmax(-1), [forbid_seen])
        engine = Engine(model, max_context=64, sampler=sampler, drafter=drafter)
        request = engine.add(PROMPT, SamplingParams(max_tokens=16))
        finish(engine)
        return request.tokens

    plain = text(None)
    expected = list(histories)
    assert text(Told([[*PROMPT, *plain]], wrong=4)) == plain
    assert histories == expected
    assert text(DraftModel(model)) == plain


def test_plain_steps_and_speculation_take_turns(hybrid: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is drafted, steps are launched ahead as ever, and know of tokens that were not theirs."""
    runs: list[int] = []
    run = DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda self, slots: runs.append(len(slots)) or run(self, slots))
    plain = answer(hybrid)
    engine = Engine(hybrid, max_context=64, overlap=True, drafter=told([plain], silent=3))
    request = engine.add(PROMPT, SamplingParams(max_tokens=24, temperature=0.8, seed=3))
    finish(engine)
    assert request.tokens == plain.tokens
    assert request.accepted > 0
    assert runs


def naive(text: list[int], sizes: Sequence[int], count: int) -> list[int]:
    for size in sizes:
        for start in reversed(range(len(text) - size)):
            if text[start : start + size] == text[len(text) - size :]:
                period = len(text) - start - size
                return [text[start + size + i % period] for i in range(count)]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=8), st.integers(1, 9))
def test_prompt_lookup_finds_the_latest_occurrence(prompt: list[int], more: list[int], count: int) -> None:
    drafter = PromptLookup(7, max_ngram=3, min_ngram=1)
    drafter.begin(2, prompt)
    for token in more:
        drafter.extend(2, token)
    assert drafter.draft({2: count}) == {2: naive(prompt + more, (3, 2, 1), min(count, 7))}


def test_prompt_lookup_of_longer_pieces_alone() -> None:
    drafter = PromptLookup(3)
    drafter.begin(0, [1, 2, 3, 9, 2])
    assert drafter.draft({0: 5}) == {0: []}
    drafter.extend(0, 3)
    assert drafter.draft({0: 5}) == {0: [9, 2, 3]}


def test_snapshots_are_of_their_slot(hybrid: CausalLM) -> None:
    cache = hybrid.make_cache(2, 8)
    snapshots = Snapshots(cache)
    tensors = [x for layer in cache.layers if isinstance(layer, RecurrentCache) for x in layer.tensors]
    for number, x in enumerate(tensors):
        x.fill_(number)
    cache.lengths[:] = [3, 4]
    snapshots.save(1)
    for x in tensors:
        x.fill_(-1)
    cache.lengths[:] = [5, 7]
    assert snapshots.put_back(1) == 3
    assert cache.lengths == [5, 4]
    for number, x in enumerate(tensors):
        assert x[0].unique().tolist() == [-1]
        assert x[1].unique().tolist() == [number]


# mlx-lm's functions


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> tuple[CausalLM, Tokenizer]:
    return tiny(request.param)


REPEATING = "def add_1(x):\n    return x + 1\ndef add_1(x):\n"


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_stream_generate_with_drafts(loaded: tuple[CausalLM, Tokenizer], kind: str) -> None:
    model, tokenizer = loaded
    drafts = {"draft_model": model, "num_draft_tokens": 4} if kind == "model" else {"prompt_lookup_num_tokens": 6}
    plain = list(gfxlm.stream_generate(model, tokenizer, REPEATING, max_tokens=24))
    mine = list(gfxlm.stream_generate(model, tokenizer, REPEATING, max_tokens=24, **drafts))
    assert [(r.token, r.text, r.finish_reason) for r in mine] == [(r.token, r.text, r.finish_reason) for r in plain]
    assert [r.generation_tokens for r in mine] == list(range(1, 25))
    assert sum(r.from_draft for r in mine) >= (17 if kind == "model" else 0)
    assert not mine[0].from_draft
    torch.testing.assert_close([r.logprobs for r in mine], [r.logprobs for r in plain], atol=1e-4, rtol=0)
    assert gfxlm.generate(model, tokenizer, REPEATING, max_tokens=24, **drafts) == "".join(r.text for r in plain)


def test_stop_string_amid_a_run(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    drafts = {"draft_model": model, "num_draft_tokens": 12}
    prompt, more = tokenizer.encode(REPEATING), tokenizer.encode("return x")
    text = gfxlm.generate(model, tokenizer, prompt, max_tokens=24)
    for begin in (4, 8, 12):
        cache = model.make_cache(1, 128)
        options = {"max_tokens": 24, "stop": [text[begin : begin + 3]], "prompt_cache": cache, **drafts}
        before = list(gfxlm.stream_generate(model, tokenizer, prompt, **options))
        assert "".join(r.text for r in before) == text[: text.index(text[begin : begin + 3])]
        assert before[-1].finish_reason == "stop"
        assert cache.lengths == [len(prompt) + len(before)]
        tokens = prompt + [r.token for r in before] + more
        continued = gfxlm.generate(model, tokenizer, more, max_tokens=4, prompt_cache=cache, **drafts)
        assert continued == gfxlm.generate(model, tokenizer, tokens, max_tokens=4)


def test_who_stops_listening_amid_a_run(loaded: tuple[CausalLM, Tokenizer]) -> None:
    """The cache holds what was said, and a conversation goes on from there."""
    model, tokenizer = loaded
    texts = []
    for drafts in ({}, {"draft_model": model, "num_draft_tokens": 8}):
        conversation = Conversation(model, tokenizer, max_context=512)
        with_end: Iterator[object] = conversation.ask("add", max_tokens=20, **drafts)
        said = list(islice(with_end, 4))
        with_end.close()  # type: ignore[attr-defined]
        length = conversation._cache.lengths[0]
        assert len(conversation._cached) == length
        texts.append([r.token for r in said] + [r.token for r in conversation.ask("more", max_tokens=6, **drafts)])
    assert texts[0] == texts[1]


def test_the_built_in_model() -> None:
    model, tokenizer = load("builtin", dtype=torch.float32, device="cpu")
    plain = gfxlm.generate(model, tokenizer, REPEATING, max_tokens=24)
    assert gfxlm.generate(model, tokenizer, REPEATING, max_tokens=24, draft_model=model) == plain
    assert gfxlm.generate(model, tokenizer, REPEATING, max_tokens=24, prompt_lookup_num_tokens=5) == plain


def test_bad_input(dense: CausalLM) -> None:
    other, _ = load("builtin", device="cpu")
    with pytest.raises(UserError, match="draft model has a vocabulary of 512 tokens, the model one of"):
        Engine(other, max_context=16, drafter=DraftModel(dense))
    bad: list[tuple[Callable[[], object], str]] = [
        (lambda: PromptLookup(0), "num_tokens must be from 1 to 64, but is 0"),
        (lambda: PromptLookup(3, max_ngram=1), "n-grams must have 1 token or more, not from 2 to 1"),
        (lambda: DraftModel(dense, 65), "num_tokens must be from 1 to 64, but is 65"),
        (lambda: gfxlm.generate(*tiny("qwen3"), "x", draft_model=dense, prompt_lookup_num_tokens=2), "not from both"),
        (lambda: gfxlm.generate(*tiny("qwen3"), "x", prompt_lookup_num_tokens=-1), "prompt_lookup_num_tokens must be"),
        (lambda: gfxlm.generate(*tiny("qwen3"), "x", draft_model=dense, num_draft_tokens=0), "num_draft_tokens must"),
    ]
    for call, message in bad:
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampling", SAMPLING)
def test_recorded(sampling: str) -> None:
    """Passes and plain steps are replayed, and the tokens are those of plain decoding."""
    model, _ = load("builtin", dtype=torch.float32, device="cuda")
    plain = serve(model, None, overlap=True, **SAMPLING[sampling])
    drafters = [PromptLookup(5), told(plain), told(plain, num_tokens=6, wrong=5, silent=3), DraftModel(model)]
    for drafter in drafters:
        requests = serve(model, drafter, overlap=True, **SAMPLING[sampling])
        assert [request.tokens for request in requests] == [request.tokens for request in plain]
    if sampling != "penalised":
        assert sum(request.drafted for request in requests) == sum(request.accepted for request in requests) > 50
