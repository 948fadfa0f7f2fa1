"""Texts longer than the cache: mlx-lm's, however they are run, kept and gone on with."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
import torch
from mlx.utils import tree_map

import gfxlm
from gfxlm.engine import budget as budgets
from gfxlm.engine.budget import remaining
from gfxlm.engine.conversation import Conversation
from gfxlm.engine.prompt_cache import PromptFile, cache_prompt
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.kernels import tuning
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import KVOptions, load_prompt_cache, make_prompt_cache, save_prompt_cache
from gfxlm.nn.ring import Ring
from tests.checkpoints import mlx_checkpoint

Loaded = tuple[CausalLM, Tokenizer]
PROMPT = "def add_1(x):"
SIZE = 24


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return gfxlm.load(mlx_checkpoint(request.param), dtype=torch.float32)


@pytest.fixture(scope="module")
def dense() -> Loaded:
    return gfxlm.load(mlx_checkpoint("qwen3"), dtype=torch.float32)


def tokens_of(loaded: Loaded, prompt: str | list[int], **options: Any) -> list[int]:
    return [response.token for response in gfxlm.stream_generate(*loaded, prompt, temperature=0.0, **options)]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_greedy_tokens_are_mlx_lms_while_the_margin_is_clear(family: str) -> None:
    folder = mlx_checkpoint(family)
    theirs, their_tokenizer = mlx_lm.load(str(folder))
    theirs.update(
        tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, theirs.parameters())
    )
    ours = gfxlm.load(folder, dtype=torch.float32)
    options: dict[str, Any] = {"max_tokens": 80, "max_kv_size": SIZE}
    pairs = zip(
        gfxlm.stream_generate(*ours, PROMPT, temperature=0.0, **options),
        mlx_lm.stream_generate(theirs, their_tokenizer, PROMPT, **options),
        strict=True,
    )
    for count, (mine, other) in enumerate(pairs):
        assert mine.logprobs is not None
        best, second = mine.logprobs.topk(2).values
        if best - second < 1e-3:
            assert count > SIZE
            break
        assert mine.token == other.token


def test_a_text_of_the_size_is_what_it_would_be(loaded: Loaded) -> None:
    prompt = loaded[1].encode(PROMPT)
    count = SIZE - len(prompt)
    plain = tokens_of(loaded, prompt, max_tokens=count + 40)
    assert tokens_of(loaded, prompt, max_tokens=count + 40, max_kv_size=SIZE)[:count] == plain[:count]
    assert tokens_of(loaded, prompt, max_tokens=count, max_kv_size=SIZE) == plain[:count]


# mlx-lm's functions.


def test_a_batch_gives_each_what_it_gets_alone(loaded: Loaded) -> None:
    prompts = [loaded[1].encode(text) for text in (PROMPT, "return x" * 20, "# plus")]
    options: dict[str, Any] = {"max_kv_size": SIZE, "temperature": 0.0}
    together = gfxlm.batch_generate(
        *loaded, prompts, max_tokens=[60, 10, 30], return_prompt_caches=True, return_token_ids=True, **options
    )
    alone = [tokens_of(loaded, p, max_tokens=n, max_kv_size=SIZE) for p, n in zip(prompts, (60, 10, 30), strict=True)]
    assert together.token_ids == alone
    # The caches say by themselves that they forget.
    assert together.caches is not None
    assert all(cache.ring == Ring(SIZE) for cache in together.caches)
    again = gfxlm.batch_generate(
        *loaded,
        [[5, 6], [7], [8]],
        prompt_caches=together.caches,
        max_tokens=20,
        return_token_ids=True,
        temperature=0.0,
    )
    whole = [[*prompt, *ids] for prompt, ids in zip(prompts, alone, strict=True)]
    nexts = ([5, 6], [7], [8])
    assert again.token_ids == [
        tokens_of(loaded, [*before, *more], max_tokens=20, max_kv_size=SIZE)
        for before, more in zip(whole, nexts, strict=True)
    ]
    with pytest.raises(UserError, match=r"a cache of 24 positions \(max_kv_size\) has forgotten"):
        gfxlm.batch_generate(*loaded, nexts, prompt_caches=together.caches, max_tokens=2, max_kv_size=25)


@pytest.mark.parametrize("kv", [{}, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}])
def test_a_cache_is_gone_on_with(loaded: Loaded, kv: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    prompt, file = tokenizer.encode(PROMPT), tmp_path / "cache.safetensors"
    whole = tokens_of(loaded, prompt, max_tokens=70, max_kv_size=SIZE, **kv)
    cache = make_prompt_cache(model, SIZE)
    first = tokens_of(loaded, prompt, max_tokens=40, prompt_cache=cache, max_kv_size=SIZE, **kv)
    assert (first, cache.lengths) == (whole[:40], [len(prompt) + 40])
    save_prompt_cache(file, cache)
    cache = load_prompt_cache(file, model=model)
    # The last token is in the cache: the next one is given.
    assert tokens_of(loaded, [whole[40]], max_tokens=29, prompt_cache=cache, **kv) == whole[41:]
    with pytest.raises(UserError, match="max_kv_size is 30, but the prompt cache holds up to 24 positions"):
        tokens_of(loaded, [1], prompt_cache=cache, max_kv_size=30)


def test_the_limit_is_the_models(dense: Loaded) -> None:
    prompt = [i % 500 for i in range(1000)]
    assert len(tokens_of(dense, prompt, max_tokens=-1, max_kv_size=SIZE)) == 25
    assert len(tokens_of(dense, prompt[:10], max_tokens=-1, max_context=60, max_kv_size=SIZE)) == 51
    with pytest.raises(UserError, match="1025 tokens, but the context holds 1024"):
        tokens_of(dense, [1] * 1025, max_kv_size=SIZE)


def test_drafts_are_refused(dense: Loaded) -> None:
    for drafts in ({"prompt_lookup_num_tokens": 4}, {"draft_model": dense[0]}):
        with pytest.raises(UserError, match="max_kv_size: a cache that forgets cannot take back"):
            tokens_of(dense, PROMPT, max_tokens=90, max_kv_size=SIZE, **drafts)
    for options in ({"max_kv_size": 4}, {"max_kv_size": 0}):
        with pytest.raises(UserError, match="max_kv_size must be at least 5"):
            tokens_of(dense, PROMPT, **options)


# Conversations and files.


def test_a_conversation_goes_on(loaded: Loaded) -> None:
    model, tokenizer = loaded
    conversation = Conversation(model, tokenizer, kv=KVOptions(SIZE))
    for question in ("def f(x):", "return x + 7", "# plus"):
        tokens = [r.token for r in conversation.ask(question, max_tokens=20, temperature=0.0)]
        prompt = tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True)
        assert tokens == tokens_of(loaded, prompt, max_tokens=20, max_kv_size=SIZE)
    assert not conversation.full
    assert conversation.max_context == 1024


@pytest.mark.parametrize("made_with", [SIZE, None])
def test_prompt_files(loaded: Loaded, made_with: int | None, tmp_path: Path) -> None:
    model, tokenizer = loaded
    path, document = tmp_path / "document.safetensors", "def add_1(x): # one, two, three" * 4
    count = cache_prompt(model, tokenizer, document, path, kv=KVOptions(made_with), ignore_chat_template=True)
    file = PromptFile.open(path)
    assert (file.max_kv_size, file.sized(KVOptions())) == (made_with, KVOptions(made_with))
    tokens = [*tokenizer.encode(document), 7, 8]
    cache, kept = file.resume(model, tokens, 20, max_kv_size=None if made_with else SIZE)
    assert (kept, cache.ring, cache.max_context) == (count, Ring(SIZE), len(tokens) + 20)
    ours = tokens_of(loaded, tokens[kept:], max_tokens=20, prompt_cache=cache)
    if made_with:
        assert ours == tokens_of(loaded, tokens, max_tokens=20, max_kv_size=SIZE)
        with pytest.raises(UserError, match="has forgotten"):
            file.resume(model, tokens, 20, max_kv_size=SIZE + 1)
    # Another text from the same file: what it forgot cannot be wound back to.
    other = [*tokens[: count - 2], 9, 10]
    cache, kept = file.resume(model, other, 20, max_kv_size=SIZE)
    assert kept == 0
    assert tokens_of(loaded, other, max_tokens=20, prompt_cache=cache) == tokens_of(
        loaded, other, max_tokens=20, max_kv_size=SIZE
    )


def test_memory_is_planned_for_what_is_kept(dense: Loaded) -> None:
    model = dense[0].with_rotating_kv(100)
    plan, whole = remaining(model, slots=2), remaining(dense[0], slots=2)
    assert plan.positions == 200
    assert plan.longest == whole.longest == 1024
    assert plan.needed(plan.held(1024)) - plan.weights - plan.workspace == model.make_cache(1, 1024).nbytes
    # A layer's copy while a chunk goes round: keys and values of 2 heads of 64, twice, and what each row sees.
    assert plan.workspace - whole.workspace == (100 + 2048) * (2 * 2 * 2 * 64 * 4 + 4 * 2048)


def test_sequences_share_what_there_is(dense: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense[0].with_rotating_kv(100)
    plan = remaining(model, slots=4)
    monkeypatch.setattr(budgets, "available_bytes", lambda *_: plan.needed(room) - plan.weights)
    with tuning.override("pages", {"page_size": 16}):
        room = 400
        cache = budgets.make_cache(model, remaining(model, slots=4), 1000)
        assert (cache.pages, cache.max_context, cache.ring) == (None, 1000, Ring(100))
        room = 300
        cache = budgets.make_cache(model, remaining(model, slots=4), 1000)
        assert cache.pages is not None
        assert (cache.pages.count, cache.max_context, cache.ring) == (300 // 16, 1000, Ring(100))
        assert [cache.reserve(slot, 1000) for slot in range(3)] == [True, True, False]
        room = 90
        with pytest.raises(UserError, match=r"keys and values for 100 tokens.*what would fit: a context of 90 tokens"):
            budgets.make_cache(model, remaining(model, slots=4), 1000)
        # Too little for a ring, enough for a short context.
        model = dense[0].with_rotating_kv(400)
        plan, room = remaining(model, slots=4), 300
        with pytest.warns(UserWarning, match="shortened to 300 tokens instead of 1000"):
            cache = budgets.make_cache(model, remaining(model, slots=4), 1000)
        assert (cache.max_context, cache.ring) == (272, None)
