"""`kv_bits` through mlx-lm's functions: when it takes hold, what it changes, and what is refused."""

from typing import Any

import pytest
import torch

import gfxlm
from gfxlm.engine.conversation import Conversation
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import KVOptions, make_prompt_cache
from gfxlm.nn.cache import Cache, QuantizedKVCache, RecurrentCache
from tests.checkpoints import mlx_checkpoint

Loaded = tuple[CausalLM, Tokenizer]
PROMPTS = ("def add_1(x):", "return x", "# plus 7, ünïcode")
AT_ONCE = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return gfxlm.load(mlx_checkpoint(request.param), dtype=torch.float32)


@pytest.fixture(scope="module")
def quantising(loaded: Loaded) -> Loaded:
    return loaded[0].with_quantized_kv(4, 32), loaded[1]


def tokens_of(loaded: Loaded, prompt: str | list[int], **options: Any) -> list[int]:
    return [r.token for r in gfxlm.stream_generate(*loaded, prompt, **{"max_tokens": 12, **options})]


def quantised(cache: Cache) -> bool:
    kinds = {type(layer) for layer in cache.layers} - {RecurrentCache}
    assert len(kinds) == 1
    return kinds == {QuantizedKVCache}


def test_every_function_takes_it(loaded: Loaded, quantising: Loaded) -> None:
    expected = [tokens_of(quantising, prompt) for prompt in PROMPTS]
    assert expected != [tokens_of(loaded, prompt) for prompt in PROMPTS]
    assert [tokens_of(loaded, prompt, **AT_ONCE) for prompt in PROMPTS] == expected
    texts = [gfxlm.generate(*loaded, prompt, max_tokens=12, **AT_ONCE) for prompt in PROMPTS]
    prompts = [loaded[1].encode(prompt) for prompt in PROMPTS]
    options = {"max_tokens": 12, "max_batch": 2, "return_token_ids": True, "return_prompt_caches": True}
    together = gfxlm.batch_generate(*loaded, prompts, **options, **AT_ONCE)
    assert (together.texts, together.token_ids) == (texts, expected)
    assert together.caches is not None
    assert all(quantised(cache) for cache in together.caches)
    conversation = Conversation(*loaded, kv=KVOptions(**AT_ONCE))
    prompt = loaded[1].apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert [r.token for r in conversation.ask("x", max_tokens=12)] == tokens_of(quantising, prompt)


def test_quantised_from_the_first_position_or_not_at_all(loaded: Loaded) -> None:
    cache = make_prompt_cache(loaded[0], 64)
    prompt = loaded[1].encode(PROMPTS[0])
    reach = len(prompt) + 12
    plain = tokens_of(loaded, prompt)
    start = {"kv_bits": 8, "kv_group_size": 64}
    assert tokens_of(loaded, prompt, **start) == plain  # 5000 is far
    assert tokens_of(loaded, prompt, prompt_cache=cache, **start, quantized_kv_start=reach) == plain
    assert not quantised(cache)
    # What the cache holds already counts; now it may become longer, and all of it is quantised.
    tokens_of(loaded, prompt, prompt_cache=cache, **start, quantized_kv_start=reach)
    assert quantised(cache)
    assert cache.lengths == [2 * reach]
    # Quantised it stays, unless in another way.
    tokens_of(loaded, prompt[:1], max_tokens=1, prompt_cache=cache)
    for other in ({"kv_bits": 4}, {"kv_bits": 8, "kv_group_size": 32}):
        with pytest.raises(UserError, match="has 8 bits in groups of 64, not "):
            tokens_of(loaded, prompt[:1], prompt_cache=cache, **other)


def test_a_cache_that_is_quantised_later_goes_on(loaded: Loaded, quantising: Loaded) -> None:
    first, second = (loaded[1].encode(text) for text in PROMPTS[:2])
    cache, copied = make_prompt_cache(loaded[0], 128), make_prompt_cache(quantising[0], 128)
    tokens_of(loaded, first, prompt_cache=cache)
    copied.copy_slot(0, cache, 0)
    expected = tokens_of(quantising, second, prompt_cache=copied)
    # Of a plain prefix, a batch makes its own quantised copy.
    together = gfxlm.batch_generate(*loaded, [second] * 2, [cache] * 2, max_tokens=12, return_token_ids=True, **AT_ONCE)
    assert together.token_ids == [expected] * 2
    assert not quantised(cache)
    assert tokens_of(loaded, second, prompt_cache=cache, **AT_ONCE) == expected
    assert quantised(cache)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_bits": 3}, "4 or 8 bits and groups of 32, 64 or 128, not 3 and 64"),
        ({"kv_bits": 8, "kv_group_size": 16}, "groups of 32, 64 or 128, not 8 and 16"),
        ({"kv_bits": 8, "kv_group_size": 128}, "heads of 64 features cannot .* groups of 32 or 64 fit"),
        ({"kv_bits": 8, "quantized_kv_start": -1}, "quantized_kv_start must not be negative, but is -1"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str, loaded: Loaded) -> None:
    with pytest.raises(UserError, match=said):
        tokens_of(loaded, "x", **options)
    with pytest.raises(UserError, match=said):
        gfxlm.batch_generate(*loaded, [[1]], **options)
    with pytest.raises(UserError, match=said):
        Conversation(*loaded, kv=KVOptions(**options))


def test_another_models_cache_is_refused(loaded: Loaded) -> None:
    other, _ = gfxlm.load(mlx_checkpoint("qwen3_moe"))
    cache = make_prompt_cache(other, 64)
    with pytest.raises(UserError, match=r"another's|another model's: its layer 0 is a KVCache .*bfloat16"):
        tokens_of(loaded, "x", prompt_cache=cache)
    with pytest.raises(UserError, match=r"another's|another model's"):
        gfxlm.batch_generate(*loaded, [[1]], [cache])


@pytest.mark.parametrize(("bits", "margin"), [(8, 0.25), (4, 1.0)])
def test_text_of_the_builtin_model_parts_only_where_the_choice_is_close(bits: int, margin: float) -> None:
    loaded = gfxlm.load("builtin")
    options = {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": 0}
    equal, count = 0, 0
    for prompt in ("def fibonacci(n):", "import os\n\nclass Parser:\n", "if __name__ ==", "    return self."):
        exact = list(gfxlm.stream_generate(*loaded, prompt, max_tokens=40, temperature=0.0))
        ours = tokens_of(loaded, prompt, max_tokens=40, temperature=0.0, **options)
        for mine, response in zip(ours, exact, strict=False):
            count += 1
            if mine != response.token:
                assert response.logprobs is not None
                best, chosen = response.logprobs.max(), response.logprobs[mine]
                assert best - chosen < margin, (prompt, bits, best - chosen)
                break
            equal += 1
    assert equal >= 0.9 * count
