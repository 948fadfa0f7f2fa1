"""A conversation over one cache: the answers of a fresh start, for fewer tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gfxlm
from gfxlm.engine.conversation import Conversation
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import GenerationError, UserError
from gfxlm.models.base import CausalLM
from tests.checkpoints import mlx_checkpoint

Loaded = tuple[CausalLM, Tokenizer]


@pytest.fixture(scope="module", params=["qwen3", "qwen3_next"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return gfxlm.load(mlx_checkpoint(request.param), dtype=torch.float32)


@pytest.fixture(scope="module")
def attention_only() -> Loaded:
    return gfxlm.load(mlx_checkpoint("qwen3"), dtype=torch.float32)


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


def say(conversation: Conversation, question: str, **options: Any) -> str:
    return "".join(response.text for response in conversation.ask(question, **{"max_tokens": 6, **options}))


def prompt_tokens(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """What a fresh start would feed for the last question."""
    return tokenizer.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True)


def scripted(tokenizer: Tokenizer) -> dict[str, Any]:
    """Options that make the answer " plus": the tokenizer cuts that as the model put it out, whatever comes after."""
    (token,) = tokenizer.encode(" plus")
    script = iter([token, tokenizer.convert_tokens_to_ids("<|end|>")])
    return {"sampler": lambda logprobs: torch.tensor([next(script)])}


def stopping_at_end(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a model that ends its messages as the template does."""
    return Tokenizer(tokenizer._tokenizer, [tokenizer.convert_tokens_to_ids("<|end|>")])


def test_answers_are_those_of_a_fresh_start(loaded: Loaded) -> None:
    conversation = Conversation(*loaded, system_prompt="Be brief.")
    for question in ("def add_1(x):", "return x + 2", "again"):
        answer = say(conversation, question)
        assert answer == gfxlm.generate(*loaded, prompt_tokens(conversation, loaded[1]), max_tokens=6)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]


def test_attention_feeds_only_what_is_new(attention_only: Loaded, fed: list[int]) -> None:
    conversation = Conversation(*attention_only)
    say(conversation, "def add_1(x):")
    before = list(conversation._cached)
    fed.clear()
    say(conversation, "return x + 2")
    tokens = prompt_tokens(conversation, attention_only[1])
    shared = next(i for i, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b)
    first_turn = len(attention_only[1].apply_chat_template(conversation.messages[:1], add_generation_prompt=True))
    assert shared >= first_turn
    assert fed[0] == len(tokens) - shared


def test_recurrent_state_goes_on_only_from_a_whole_prefix(fed: list[int]) -> None:
    model, tokenizer = gfxlm.load(mlx_checkpoint("qwen3_next"), dtype=torch.float32)
    conversation = Conversation(model, stopping_at_end(tokenizer))
    say(conversation, "hello", **scripted(tokenizer))
    cached = len(conversation._cached)
    fed.clear()
    say(conversation, "more", **scripted(tokenizer))
    assert fed[0] == len(prompt_tokens(conversation, tokenizer)) - cached
    # With another last answer, the state has seen what was not said.
    conversation.messages[-1]["content"] = "changed"
    fed.clear()
    say(conversation, "and more", **scripted(tokenizer))
    assert fed[0] == len(prompt_tokens(conversation, tokenizer))


@pytest.mark.parametrize("steps", [1, 3])
def test_closing_keeps_what_has_come(loaded: Loaded, steps: int) -> None:
    conversation = Conversation(*loaded)
    answer = conversation.ask("def add_1(x):", max_tokens=50)
    part = "".join(next(answer).text for _ in range(steps))
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": part}
    assert say(conversation, "more") == gfxlm.generate(*loaded, prompt_tokens(conversation, loaded[1]), max_tokens=6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, GenerationError])
def test_a_broken_step_costs_the_cache_and_nothing_else(
    loaded: Loaded, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(loaded[0], stopping_at_end(loaded[1]))
    say(conversation, "def add_1(x):", **scripted(loaded[1]))
    with monkeypatch.context() as patch:
        layer = loaded[0].layers.get_submodule("1")
        forward = type(layer).forward

        def failing(self: torch.nn.Module, *arguments: Any) -> Tensor:
            if self is layer:
                raise error
            result: Tensor = forward(self, *arguments)
            return result

        patch.setattr(type(layer), "forward", failing)
        with pytest.raises(error):
            say(conversation, "more")
    assert [message["content"] for message in conversation.messages] == ["def add_1(x):", " plus"]
    assert say(conversation, "more") == gfxlm.generate(*loaded, prompt_tokens(conversation, loaded[1]), max_tokens=6)


def test_question_without_an_answer_is_taken_back(loaded: Loaded) -> None:
    conversation = Conversation(*loaded, max_context=64)
    first = say(conversation, "short")
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens.*, but the context holds 64"):
        say(conversation, "long " * 100)
    assert [message["content"] for message in conversation.messages] == ["short", first]

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        say(conversation, "a question", prefill_step_size=4, prompt_progress_callback=stop)
    assert len(conversation.messages) == 2
    assert say(conversation, "more") == gfxlm.generate(*loaded, prompt_tokens(conversation, loaded[1]), max_tokens=6)


def test_full_context(loaded: Loaded) -> None:
    conversation = Conversation(*loaded, max_context=32)
    responses = list(conversation.ask("short", max_tokens=-1))
    assert (responses[-1].finish_reason, conversation.full, conversation.max_context) == ("length", True, 32)
    conversation.reset()
    assert say(conversation, "short", max_tokens=3) == "".join(r.text for r in responses[:3])
    assert not conversation.full


def test_reset_keeps_the_system_prompt(loaded: Loaded) -> None:
    conversation = Conversation(*loaded, system_prompt="Be brief.")
    first = say(conversation, "def add_1(x):")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert say(conversation, "def add_1(x):") == first


def test_template_arguments(attention_only: Loaded) -> None:
    model, tokenizer = attention_only
    conversation = Conversation(
        model, tokenizer, template_kwargs={"chat_template": "{{ shout }}{{ messages[0].content }}", "shout": "HEY"}
    )
    assert say(conversation, " you") == gfxlm.generate(model, tokenizer, "HEY you", max_tokens=6)


def test_without_a_template_the_text_goes_on(loaded: Loaded) -> None:
    model, _ = loaded
    _, tokenizer = gfxlm.load(mlx_checkpoint("qwen3"))
    tokenizer._tokenizer.chat_template = None
    conversation = Conversation(model, tokenizer)
    first = say(conversation, "def add_1(x):")
    assert first == gfxlm.generate(model, tokenizer, "def add_1(x):", max_tokens=6)
    second = say(conversation, "def add_2(x):")
    text = "def add_1(x):" + first + ("" if first.endswith("\n") else "\n") + "def add_2(x):"
    assert second == gfxlm.generate(model, tokenizer, text, max_tokens=6)


def test_no_more_context_than_the_model_has(attention_only: Loaded) -> None:
    for context in (0, 1025):
        with pytest.raises(UserError, match=f"from 1 to the model's 1024, but is {context}"):
            Conversation(*attention_only, max_context=context)
