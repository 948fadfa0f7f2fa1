"""A chat of many turns over one cache."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from gfxlm.engine.generate import GenerationResponse, stream_generate
from gfxlm.engine.prompt_cache import PromptFile, reuse
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import GenerationError, UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import KVOptions, default_context


class Conversation:
    """Questions and answers, and a cache that follows them from turn to turn.

    Every turn writes the whole conversation anew, through the chat template, and feeds the model what the cache does
    not hold yet. Without a template the messages are one running text, each question on a new line.
    `max_context` is how many positions it may have in all; `template_kwargs` go to the template. `kv` says whether keys
    and values are quantised, and whether the oldest of them are forgotten. With a `prompt_file`, the first question
    goes on in the message that the file begins, after the system prompt that it was made with.
    Raises UserError for more positions than the model was made for, and for another model's file.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        system_prompt: str | None = None,
        max_context: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
        kv: KVOptions | None = None,
        prompt_file: PromptFile | None = None,
    ) -> None:
        limit = model.config.max_position_embeddings
        if max_context is not None and not 1 <= max_context <= limit:
            raise UserError(f"max_context must be from 1 to the model's {limit}, but is {max_context}")
        self._model = model
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._template_kwargs = template_kwargs or {}
        self._opening = ""  # what the first question goes on from
        self._cached: list[int] = []  # the tokens that the cache holds
        kv = (kv or KVOptions()) if prompt_file is None else prompt_file.sized(kv or KVOptions())
        context = max_context or default_context(kv.model_for(model, 0))
        if prompt_file is None:
            self._cache = kv.model_for(model, context).make_cache(1, context)
        else:
            if system_prompt is not None:
                raise UserError(f"system_prompt: comes before the prompt in {prompt_file.path}, which has its own")
            self._system_prompt, self._opening = prompt_file.system_prompt, prompt_file.prompt
            self._cached = list(prompt_file.tokens)
            self._cache = prompt_file.load(model, context, kv.max_kv_size)
            kv.prepare(self._cache, model, self._cache.max_context)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt and what a file began with."""
        prompt = self._system_prompt
        self.messages = [] if prompt is None else [{"role": "system", "content": prompt}]

    @property
    def full(self) -> bool:
        """True where the cache has no room for another token."""
        return self._cache.lengths[0] == self._cache.max_context

    @property
    def max_context(self) -> int:
        """Positions that the conversation can have."""
        return self._cache.max_context

    def ask(self, question: str, **options: Any) -> Generator[GenerationResponse, None, None]:
        """Answer a question; `options` are those of `stream_generate`. Closing the iterator keeps what has come.

        Raises UserError for a conversation that does not fit into the context. A question that got no answer at all
        is taken back.
        """
        first = not any(message["role"] == "user" for message in self.messages)
        self.messages.append({"role": "user", "content": self._opening + question if first else question})
        answer: list[str] = []
        tokens: list[int] = []
        try:
            tokens = self._tokens()
            kept = reuse(self._cache, self._cached, tokens)
            responses = stream_generate(
                self._model,
                self._tokenizer,
                tokens[kept:],
                prompt_cache=self._cache,
                cached_tokens=tokens[:kept],
                **options,
            )
            with contextlib.closing(responses):  # which brings the cache in order
                for response in responses:
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
        return self._tokenizer.encode(plain_text(self.messages))


def plain_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages as one running text, for a model without a chat template: each question on a new line."""
    text = ""
    for message in messages:
        new_line = message["role"] != "assistant" and text and not text.endswith("\n")
        text += ("\n" if new_line else "") + message["content"]
    return text
