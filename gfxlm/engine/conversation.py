"""A chat of many turns over one cache."""

from collections.abc import Generator, Sequence
from typing import Any

from gfxlm.engine.generate import GenerationResponse, stream_generate
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import GenerationError, UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import make_prompt_cache


class Conversation:
    """Questions and answers, and a cache that follows them from turn to turn.

    Every turn writes the whole conversation anew, through the chat template, and feeds the model what the cache does
    not hold yet. Without a template the messages are one running text, each question on a new line.
    `max_context` is how many positions the cache has, as `make_prompt_cache` takes it; `template_kwargs` go to the
    template. Raises UserError for more positions than the model was made for.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        system_prompt: str | None = None,
        max_context: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        limit = model.config.max_position_embeddings
        if max_context is not None and not 1 <= max_context <= limit:
            raise UserError(f"max_context must be from 1 to the model's {limit}, but is {max_context}")
        self._model = model
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._template_kwargs = template_kwargs or {}
        self._cache = make_prompt_cache(model, max_context)
        self._cached: list[int] = []  # the tokens that the cache holds
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        prompt = self._system_prompt
        self.messages = [] if prompt is None else [{"role": "system", "content": prompt}]

    @property
    def full(self) -> bool:
        """True where the cache has no room for another token."""
        return self._cache.lengths[0] == self._cache.max_context

    @property
    def max_context(self) -> int:
        """Positions that the cache has."""
        return self._cache.max_context

    def ask(self, question: str, **options: Any) -> Generator[GenerationResponse, None, None]:
        """Answer a question; `options` are those of `stream_generate`. Closing the iterator keeps what has come.

        Raises UserError for a conversation that does not fit into the context. A question that got no answer at all
        is taken back.
        """
        self.messages.append({"role": "user", "content": question})
        answer: list[str] = []
        tokens: list[int] = []
        try:
            tokens = self._tokens()
            kept = self._reuse(tokens)
            for response in stream_generate(
                self._model, self._tokenizer, tokens[kept:], prompt_cache=self._cache, **options
            ):
                answer.append(response.text)
                tokens.append(response.token)
                yield response
        except (GenerationError, KeyboardInterrupt):
            # In the middle of a step: nobody knows what the layers have taken in.
            self._cache.lengths[0] = 0
            raise
        finally:
            self._cached = tokens[: self._cache.lengths[0]]
            if answer:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.messages.pop()

    def _tokens(self) -> list[int]:
        if self._tokenizer.has_chat_template:
            tokens: list[int] = self._tokenizer.apply_chat_template(
                self.messages, **{"add_generation_prompt": True, **self._template_kwargs}
            )
            return tokens
        text = ""
        for message in self.messages:
            new_line = message["role"] != "assistant" and text and not text.endswith("\n")
            text += ("\n" if new_line else "") + message["content"]
        return self._tokenizer.encode(text)

    def _reuse(self, tokens: Sequence[int]) -> int:
        """Wind the cache back to what it shares with `tokens`; returns how many of them it still holds."""
        # The last token is fed in any case: its logits are wanted.
        shared = _shared_length(self._cached, tokens[:-1])
        if shared < len(self._cached) and not self._cache.trimmable:
            shared = 0
        self._cache.lengths[0] = shared
        return shared


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
