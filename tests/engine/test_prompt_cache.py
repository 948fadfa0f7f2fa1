"""A prompt read once, into a file: what goes on from it is what a fresh start says, for fewer tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gfxlm
from gfxlm.engine.conversation import Conversation
from gfxlm.engine.prompt_cache import PromptFile, cache_prompt
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import KVOptions, load_prompt_cache, make_prompt_cache, save_prompt_cache
from gfxlm.nn.cache import kv_format
from tests.checkpoints import mlx_checkpoint

Loaded = tuple[CausalLM, Tokenizer]
DOCUMENT, QUESTION = "def add_1(x):\n    return x + 1\n", "# plus 7"


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return gfxlm.load(mlx_checkpoint(request.param), dtype=torch.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.safetensors"


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward pass takes in."""
    counts: list[int] = []
    forward = CausalLM.forward

    def counting(self: CausalLM, tokens: Tensor, *rest: Any) -> Tensor:
        counts.append(len(tokens))
        return forward(self, tokens, *rest)

    monkeypatch.setattr(CausalLM, "forward", counting)
    return counts


def chat_tokens(tokenizer: Tokenizer, *messages: tuple[str, str]) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], add_generation_prompt=True
    )


def test_file_says_what_it_holds(loaded: Loaded, path: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = {"prefill_step_size": 10, "progress": lambda *counts: seen.append(counts)}
    count = cache_prompt(*loaded, DOCUMENT, path, model_name="name", system_prompt="Be brief.", **options)
    file = PromptFile.open(path)
    assert (file.model, file.prompt, file.system_prompt) == ("name", DOCUMENT, "Be brief.")
    assert loaded[1].decode(file.tokens) == "<|system|>Be brief.<|end|><|user|>" + DOCUMENT
    assert seen == [(min(n, count), count) for n in range(10, count + 10, 10)]
    cache = load_prompt_cache(path, model=loaded[0])
    assert (cache.lengths, cache.max_context) == ([count], 1024)


def test_request_goes_on_from_it(loaded: Loaded, path: Path, fed: list[int]) -> None:
    count = cache_prompt(*loaded, DOCUMENT, path)
    tokens = chat_tokens(loaded[1], ("user", DOCUMENT + QUESTION))
    expected = gfxlm.generate(*loaded, tokens, max_tokens=12)
    for _ in range(2):
        cache, kept = PromptFile.open(path).resume(loaded[0], tokens, 12)
        assert kept == count
        fed.clear()
        assert gfxlm.generate(*loaded, tokens[kept:], max_tokens=12, prompt_cache=cache) == expected
        assert fed[0] == len(tokens) - count
        assert cache.max_context == len(tokens) + 12


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_bits_are_those_of_a_prompt_cut_at_the_same_place(family: str, path: Path) -> None:
    model, tokenizer = gfxlm.load(mlx_checkpoint(family))
    assert model.dtype == torch.bfloat16
    count = cache_prompt(model, tokenizer, DOCUMENT, path)
    tokens = chat_tokens(tokenizer, ("user", DOCUMENT + QUESTION))
    assert len(tokens) <= 2 * count
    cache, kept = PromptFile.open(path).resume(model, tokens, 12)
    ours = gfxlm.stream_generate(model, tokenizer, tokens[kept:], max_tokens=12, prompt_cache=cache)
    fresh = gfxlm.stream_generate(model, tokenizer, tokens, max_tokens=12, prefill_step_size=count)
    for mine, other in zip(ours, fresh, strict=True):
        assert mine.token == other.token
        assert mine.logprobs is not None
        assert other.logprobs is not None
        assert torch.equal(mine.logprobs, other.logprobs)


def test_another_beginning_is_read_anew(loaded: Loaded, path: Path) -> None:
    cache_prompt(*loaded, DOCUMENT, path)
    tokens = chat_tokens(loaded[1], ("user", DOCUMENT[:10] + QUESTION))
    cache, kept = PromptFile.open(path).resume(loaded[0], tokens, 12)
    assert 0 < kept < 10 if cache.trimmable else kept == 0
    answer = gfxlm.generate(*loaded, tokens[kept:], max_tokens=12, prompt_cache=cache)
    assert answer == gfxlm.generate(*loaded, tokens, max_tokens=12)


def test_conversation_goes_on_from_it(loaded: Loaded, path: Path, fed: list[int]) -> None:
    count = cache_prompt(*loaded, DOCUMENT, path, system_prompt="Be brief.")
    ours = Conversation(*loaded, prompt_file=PromptFile.open(path))
    fresh = Conversation(*loaded, system_prompt="Be brief.")
    for turn, question in enumerate((QUESTION, "again", None, QUESTION)):
        if question is None:
            ours.reset()
            fresh.reset()
            continue
        fed.clear()
        said = "".join(response.text for response in ours.ask(question, max_tokens=6))
        if turn == 0:
            assert fed[0] == len(chat_tokens(loaded[1], ("system", "Be brief."), ("user", DOCUMENT + question))) - count
        begun = question if turn == 1 else DOCUMENT + question
        assert said == "".join(response.text for response in fresh.ask(begun, max_tokens=6))
    with pytest.raises(UserError, match="system_prompt: comes before the prompt in"):
        Conversation(*loaded, system_prompt="x", prompt_file=PromptFile.open(path))


def test_quantised(loaded: Loaded, path: Path) -> None:
    cache_prompt(*loaded, DOCUMENT, path, kv=KVOptions(kv_bits=4, kv_group_size=32, quantized_kv_start=0))
    tokens = chat_tokens(loaded[1], ("user", DOCUMENT + QUESTION))
    cache, kept = PromptFile.open(path).resume(loaded[0], tokens, 12)
    assert kv_format(cache.layers[-1]) is not None
    quantising = loaded[0].with_quantized_kv(4, 32)
    answer = gfxlm.generate(*loaded, tokens[kept:], max_tokens=12, prompt_cache=cache)
    assert answer == gfxlm.generate(quantising, loaded[1], tokens, max_tokens=12)
    # A short prompt is not long enough by mlx-lm's default, but who uses it may quantise it.
    cache_prompt(*loaded, DOCUMENT, path, kv=KVOptions(kv_bits=4, kv_group_size=32))
    assert kv_format(load_prompt_cache(path).layers[-1]) is None
    conversation = Conversation(
        *loaded, kv=KVOptions(kv_bits=8, quantized_kv_start=99), prompt_file=PromptFile.open(path)
    )
    assert str(kv_format(conversation._cache.layers[-1])) == "8 bits in groups of 64"


@pytest.mark.parametrize("kv", [{}, {"kv_bits": 8, "quantized_kv_start": 0}])
def test_caches_of_a_batch_go_into_files(kv: dict[str, Any], loaded: Loaded, path: Path) -> None:
    first, second = (loaded[1].encode(text) for text in (DOCUMENT, QUESTION))
    (cache,) = gfxlm.batch_generate(*loaded, [first], max_tokens=4, return_prompt_caches=True, **kv).caches or ()
    save_prompt_cache(path, cache)
    again = load_prompt_cache(path, model=loaded[0], max_context=128)
    wanted = gfxlm.batch_generate(*loaded, [second], [cache], max_tokens=12, **kv).texts
    assert [gfxlm.generate(*loaded, second, max_tokens=12, prompt_cache=again)] == wanted


def test_conversation_without_a_template_goes_on(loaded: Loaded, path: Path) -> None:
    _, tokenizer = gfxlm.load(mlx_checkpoint("qwen3"))
    tokenizer._tokenizer.chat_template = None
    cache_prompt(loaded[0], tokenizer, DOCUMENT, path)
    conversation = Conversation(loaded[0], tokenizer, prompt_file=PromptFile.open(path))
    said = "".join(response.text for response in conversation.ask(QUESTION, max_tokens=6))
    assert said == gfxlm.generate(loaded[0], tokenizer, DOCUMENT + QUESTION, max_tokens=6)


def test_plain_text_without_a_template(loaded: Loaded, path: Path) -> None:
    cache_prompt(*loaded, DOCUMENT, path, ignore_chat_template=True)
    assert PromptFile.open(path).tokens == loaded[1].encode(DOCUMENT)
    with pytest.raises(UserError, match="needs a chat template"):
        cache_prompt(*loaded, DOCUMENT, path, system_prompt="x", ignore_chat_template=True)


def test_bad_prompts_and_files(loaded: Loaded, path: Path) -> None:
    for prompt, count in (("", 0), ("漢 " * 1100, r"\d+")):
        with pytest.raises(UserError, match=f"has {count} tokens, but must have from 1 to the context's 1024"):
            cache_prompt(*loaded, prompt, path, ignore_chat_template=True)
    assert not path.exists()
    cache = make_prompt_cache(loaded[0], 8)
    save_prompt_cache(path, cache)
    with pytest.raises(UserError, match="does not say which prompt it holds"):
        PromptFile.open(path)
    save_prompt_cache(path, cache, {"model": "", "prompt": "ab", "tokens": "[1, 2]"})
    with pytest.raises(UserError, match="corrupt: 0 positions of 2 tokens"):
        PromptFile.open(path).load(loaded[0], 8)
