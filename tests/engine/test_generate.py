"""The engine and mlx-lm's generating functions: same text as mlx-lm, alone and in company, with every way to stop."""

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from inspect import Parameter, signature

import mlx.core as mx
import mlx_lm
import pytest
import torch
from mlx.utils import tree_map
from torch import Tensor

import gfxlm
from gfxlm import Engine, SamplingParams
from gfxlm.engine.generate import GenerationResponse
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import GenerationError, UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import make_prompt_cache, trim_prompt_cache
from tests.checkpoints import mlx_checkpoint

PROMPTS = ("def add_1(x):", "return x", "# plus 7, ünïcode")


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> tuple[CausalLM, Tokenizer]:
    return gfxlm.load(mlx_checkpoint(request.param), dtype=torch.float32)


@pytest.fixture(scope="module")
def dense(request: pytest.FixtureRequest) -> tuple[CausalLM, Tokenizer]:
    return gfxlm.load(mlx_checkpoint("qwen3"), dtype=torch.float32)


def responses(loaded: tuple[CausalLM, Tokenizer], prompt: str, **options: object) -> list[GenerationResponse]:
    return list(gfxlm.stream_generate(*loaded, prompt, **options))


def tokens_of(loaded: tuple[CausalLM, Tokenizer], prompt: str, **options: object) -> list[int]:
    return [response.token for response in responses(loaded, prompt, **options)]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next"])
def test_greedy_tokens_are_mlx_lms_while_the_margin_is_clear(family: str) -> None:
    folder = mlx_checkpoint(family)
    theirs, their_tokenizer = mlx_lm.load(str(folder))
    fp32 = tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, theirs.parameters())
    theirs.update(fp32)
    ours = gfxlm.load(folder, dtype=torch.float32)
    pairs = zip(
        responses(ours, PROMPTS[0], max_tokens=24),
        mlx_lm.stream_generate(theirs, their_tokenizer, PROMPTS[0], max_tokens=24),
        strict=True,
    )
    for count, (mine, other) in enumerate(pairs):
        assert mine.logprobs is not None
        best, second = mine.logprobs.topk(2).values
        if best - second < 1e-3:
            assert count > 0
            break
        assert (mine.token, mine.finish_reason) == (other.token, other.finish_reason)
        assert mine.generation_tokens == other.generation_tokens
        assert mine.prompt_tokens == other.prompt_tokens


def test_batch_gives_each_what_it_gets_alone(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    alone = [
        gfxlm.generate(model, tokenizer, prompt, max_tokens=n) for prompt, n in zip(prompts, (9, 5, 12), strict=True)
    ]
    for max_batch in (1, 2, 3):
        together = gfxlm.batch_generate(model, tokenizer, prompts, max_tokens=[9, 5, 12], max_batch=max_batch)
        assert together.texts == alone
    assert together.stats.prompt_tokens == sum(map(len, prompts))
    assert together.stats.generation_tokens == 26
    assert together.stats.generation_steps == 11
    assert together.stats.wall_time >= together.stats.prompt_time + together.stats.decode_time > 0


def test_batch_with_samplers_and_processors_of_mlx_lm(loaded: tuple[CausalLM, Tokenizer]) -> None:
    def forbid_seen(tokens: Tensor, logits: Tensor) -> Tensor:
        return logits.index_fill(1, tokens.unique(), -torch.inf)

    prompts = [loaded[1].encode(text) for text in PROMPTS]
    options = {"sampler": lambda p: p.argmin(-1).where(p.isfinite().all(-1), p.argmax(-1)), "max_tokens": 6}
    options["logits_processors"] = [forbid_seen]
    alone = [tokens_of(loaded, prompt, **options) for prompt in prompts]
    together = gfxlm.batch_generate(*loaded, prompts, return_token_ids=True, max_batch=2, **options)
    assert together.token_ids == alone
    assert all(not {*prompt} & {*answer} for prompt, answer in zip(prompts, alone, strict=True))


@pytest.mark.parametrize("name", ["GenerationResponse", "BatchResponse", "BatchStats"])
def test_responses_have_mlx_lms_fields(name: str) -> None:
    # The function of the same name hides the module.
    theirs, ours = (
        getattr(import_module("mlx_lm.generate"), name),
        getattr(import_module("gfxlm.engine.generate"), name),
    )
    assert [field.name for field in fields(ours)] == [field.name for field in fields(theirs)]


@pytest.mark.parametrize("name", ["load", "generate", "batch_generate", "convert"])
def test_positional_arguments_are_mlx_lms(name: str) -> None:
    def positional(function: Callable[..., object]) -> list[str]:
        parameters = signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]

    assert positional(getattr(gfxlm, name)) == positional(getattr(mlx_lm, name))


@pytest.mark.parametrize("step", [1, 2, 5, 2048])
def test_prompt_chunks_change_nothing(loaded: tuple[CausalLM, Tokenizer], step: int) -> None:
    seen: list[tuple[int, int]] = []
    prompt = PROMPTS[0] * 3
    chunked = tokens_of(
        loaded,
        prompt,
        max_tokens=6,
        prefill_step_size=step,
        prompt_progress_callback=lambda done, total: seen.append((done, total)),
    )
    assert chunked == tokens_of(loaded, prompt, max_tokens=6)
    total = len(loaded[1].encode(prompt))
    assert seen == [(min(n, total), total) for n in range(step, total + step, step)]


def test_prompt_cache_continues(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    first, second = tokenizer.encode(PROMPTS[0]), tokenizer.encode(PROMPTS[1])
    cache = make_prompt_cache(model, 128)
    before = tokens_of(loaded, first, max_tokens=4, prompt_cache=cache)
    assert cache.lengths == [len(first) + 4]
    continued = tokens_of(loaded, second, max_tokens=4, prompt_cache=cache)
    assert continued == tokens_of(loaded, first + before + second, max_tokens=4)
    kept = gfxlm.batch_generate(
        model, tokenizer, [first], max_tokens=4, return_prompt_caches=True, return_token_ids=True
    )
    assert kept.token_ids == [before]
    resumed = gfxlm.batch_generate(
        model, tokenizer, [second], prompt_caches=kept.caches, max_tokens=4, return_token_ids=True, return_logprobs=True
    )
    assert resumed.token_ids == [continued]
    assert resumed.logprobs is not None
    assert all(value < 0 for value in resumed.logprobs[0])


def test_trimmed_cache_forgets(dense: tuple[CausalLM, Tokenizer]) -> None:
    cache = make_prompt_cache(dense[0], 128)
    prompt = dense[1].encode(PROMPTS[0])
    expected = tokens_of(dense, prompt, max_tokens=4, prompt_cache=cache)
    assert trim_prompt_cache(cache, 100) == len(prompt) + 4
    assert tokens_of(dense, prompt, max_tokens=4, prompt_cache=cache) == expected


def test_stop_string_across_tokens(loaded: tuple[CausalLM, Tokenizer]) -> None:
    text = gfxlm.generate(*loaded, PROMPTS[0], max_tokens=24)
    middle = len(text) // 2
    stop = text[middle : middle + 4]
    last = responses(loaded, PROMPTS[0], max_tokens=24, stop=[stop])
    assert "".join(r.text for r in last) == text[: text.index(stop)]
    assert last[-1].finish_reason == "stop"
    batch = gfxlm.batch_generate(*loaded, [loaded[1].encode(PROMPTS[0])], max_tokens=24, stop=[stop])
    assert batch.texts == [text[: text.index(stop)]]


def test_stop_string_leaves_the_cache_in_order(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    prompt, more = tokenizer.encode(PROMPTS[0]), tokenizer.encode(PROMPTS[1])
    text = gfxlm.generate(model, tokenizer, prompt, max_tokens=24)
    cache = make_prompt_cache(model, 128)
    before = tokens_of(loaded, prompt, max_tokens=24, stop=[text[8:11]], prompt_cache=cache)
    assert cache.lengths == [len(prompt) + len(before)]
    continued = tokens_of(loaded, more, max_tokens=4, prompt_cache=cache)
    assert continued == tokens_of(loaded, prompt + before + more, max_tokens=4)


def test_end_of_text_stops_and_is_not_shown(loaded: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = loaded
    everything = responses(loaded, PROMPTS[0], max_tokens=12)
    stopping = Tokenizer(tokenizer._tokenizer, [everything[5].token])
    short = responses((model, stopping), PROMPTS[0], max_tokens=12)
    place = [r.token for r in everything].index(everything[5].token)
    assert [r.token for r in short] == [r.token for r in everything[: place + 1]]
    assert short[-1].finish_reason == "stop"
    assert "".join(r.text for r in short) == tokenizer.decode([r.token for r in everything[:place]])


def test_full_context_stops(dense: tuple[CausalLM, Tokenizer]) -> None:
    model, tokenizer = dense
    prompt = tokenizer.encode(PROMPTS[0])
    engine = Engine(model, max_context=len(prompt) + 3)
    request = engine.add(prompt, SamplingParams(max_tokens=-1))
    while engine.busy:
        engine.step()
    # The last token needs no place in the cache: nothing comes after it.
    assert (len(request.tokens), request.finish_reason) == (4, "length")


def test_samplers_and_processors_of_mlx_lm(dense: tuple[CausalLM, Tokenizer]) -> None:
    histories: list[Tensor] = []

    def forbid_best(tokens: Tensor, logits: Tensor) -> Tensor:
        histories.append(tokens)
        return logits.index_fill(1, logits.argmax(1), -torch.inf)

    prompt = dense[1].encode(PROMPTS[0])
    got = tokens_of(dense, prompt, max_tokens=3, sampler=lambda p: p.argmax(-1), logits_processors=[forbid_best])
    assert [h.tolist() for h in histories] == [prompt, prompt + got[:1], prompt + got[:2]]
    assert got[0] == int(responses(dense, prompt, max_tokens=1)[0].logprobs.topk(2).indices[1])


def test_seed_decides_and_defaults_come_from_the_model(dense: tuple[CausalLM, Tokenizer]) -> None:
    hot = {"temperature": 1.0, "max_tokens": 16}
    assert tokens_of(dense, PROMPTS[0], seed=1, **hot) == tokens_of(dense, PROMPTS[0], seed=1, **hot)
    assert tokens_of(dense, PROMPTS[0], seed=1, **hot) != tokens_of(dense, PROMPTS[0], seed=2, **hot)
    model, _ = dense
    model.generation_config = {"do_sample": True, "temperature": 1.0}
    try:
        assert tokens_of(dense, PROMPTS[0], seed=1, max_tokens=16) == tokens_of(dense, PROMPTS[0], seed=1, **hot)
        greedy = tokens_of(dense, PROMPTS[0], temperature=0.0, max_tokens=16)
    finally:
        model.generation_config = {}
    assert greedy == tokens_of(dense, PROMPTS[0], max_tokens=16)


def test_nan_names_the_module() -> None:
    model, tokenizer = gfxlm.load(mlx_checkpoint("qwen3", "dense"))
    model.layers.get_submodule("1.mlp.down_proj").weight.tensor[3, 5] = float("nan")
    with pytest.raises(GenerationError, match=r"model\.layers\.1\.mlp\.down_proj"):
        gfxlm.generate(model, tokenizer, PROMPTS[0], max_tokens=4)
    with pytest.raises(GenerationError, match=r"model\.layers\.1\.mlp\.down_proj"):
        gfxlm.batch_generate(model, tokenizer, [[1, 2, 3]], max_tokens=4)


def test_what_is_missing_is_said(dense: tuple[CausalLM, Tokenizer]) -> None:
    with pytest.raises(UserError, match="input_embeddings: not supported"):
        gfxlm.generate(*dense, "x", input_embeddings=8)
    for name in ("input_embeddings", "num_draft_tokens"):
        with pytest.raises(UserError, match=f"{name}: not supported"):
            gfxlm.batch_generate(*dense, [[1]], **{name: 8})
    with pytest.raises(TypeError, match=r"'heat'; known are .*temperature"):
        gfxlm.generate(*dense, "x", heat=1.0)


def test_bad_prompts(dense: tuple[CausalLM, Tokenizer]) -> None:
    with pytest.raises(UserError, match="empty"):
        gfxlm.generate(*dense, [], max_tokens=4)
    with pytest.raises(UserError, match="token 512, the vocabulary has 512"):
        gfxlm.generate(*dense, [1, 512], max_tokens=4)
    with pytest.raises(UserError, match="1025 tokens, but the context holds 1024"):
        gfxlm.generate(*dense, [1] * 1025, max_tokens=4)
    with pytest.raises(UserError, match="do not match"):
        gfxlm.batch_generate(*dense, [[1], [2]], max_tokens=[1])
