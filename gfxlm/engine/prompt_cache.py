"""Prompts that the model has read once and for all: into a file, and out of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from gfxlm.engine.budget import remaining
from gfxlm.engine.generate import context_for
from gfxlm.engine.prefill import PrefillStep
from gfxlm.engine.tokenizer import Tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import (
    KVOptions,
    default_context,
    load_prompt_cache,
    prompt_cache_metadata,
    prompt_cache_size,
    save_prompt_cache,
)
from gfxlm.nn.cache import Cache


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A file that `cache_prompt` wrote: which prompt, of which tokens, for which model.

    What goes on from it is the text that comes after `prompt`, in the same message where there is a chat template.
    """

    path: Path
    model: str
    prompt: str
    system_prompt: str | None
    tokens: list[int]
    max_kv_size: int | None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read everything but the cache. Raises UserError for a file that is none of `cache_prompt`'s."""
        file = Path(path).expanduser()
        metadata: dict[str, Any] = dict(prompt_cache_metadata(file))
        try:
            tokens = json.loads(metadata["tokens"])
            made_with = metadata["model"], metadata["prompt"], metadata.get("system_prompt")
        except (KeyError, ValueError) as error:
            raise UserError(f"{file}: does not say which prompt it holds; `gfxlm cache-prompt` makes one") from error
        return cls(file, *made_with, tokens, prompt_cache_size(file))

    def sized(self, kv: KVOptions) -> KVOptions:
        """With the `max_kv_size` that the file was made with, where these options have none."""
        return replace(kv, max_kv_size=kv.max_kv_size or self.max_kv_size)

    def load(self, model: CausalLM, max_context: int, max_kv_size: int | None = None) -> Cache:
        """The cache, with room for so many positions or at least what it holds.

        UserError for another model's, and where it has forgotten what a larger `max_kv_size` would hold.
        """
        context = max(max_context, len(self.tokens))
        cache = load_prompt_cache(self.path, model=model, max_context=context, max_kv_size=max_kv_size)
        if cache.lengths[0] != len(self.tokens):
            raise UserError(f"{self.path}: corrupt: {cache.lengths[0]} positions of {len(self.tokens)} tokens")
        return cache

    def resume(
        self,
        model: CausalLM,
        tokens: Sequence[int],
        max_tokens: int,
        max_context: int | None = None,
        max_kv_size: int | None = None,
    ) -> tuple[Cache, int]:
        """The cache for a request of those tokens in all, and how many of them it holds; see `load`.

        UserError where the tokens, or a context that `max_context` asks for, do not fit into memory.
        """
        wanted = context_for(model, [len(tokens)], [max_tokens], max_context)
        least = max(len(tokens) + 1, len(self.tokens))
        sized = self.sized(KVOptions(max_kv_size)).model_for(model, wanted)
        context = remaining(sized).fit(wanted, least=least, exact=max_context is not None)
        cache = self.load(model, context, max_kv_size)
        return cache, reuse(cache, self.tokens, tokens)


def cache_prompt(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    file: str | Path,
    *,
    model_name: str = "",
    system_prompt: str | None = None,
    ignore_chat_template: bool = False,
    kv: KVOptions | None = None,
    prefill_step_size: int = 2048,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Let the model read a prompt and write its cache to a file; returns how many tokens that is.

    With a chat template the prompt is the beginning of the first user message. What the context may grow to is known
    to those who use the file, so `kv` goes by the prompt's length. Raises UserError for a prompt that does not fit.
    """
    tokens = _tokens(tokenizer, prompt, system_prompt, ignore_chat_template)
    limit = model.config.max_position_embeddings
    if not 0 < len(tokens) <= limit:
        raise UserError(f"the prompt has {len(tokens)} tokens, but must have from 1 to the context's {limit}")
    model = (kv or KVOptions()).model_for(model, len(tokens))
    wanted = max(len(tokens), default_context(model))
    context = remaining(model, prefill_step_size=prefill_step_size).fit(wanted, least=len(tokens))
    cache = model.make_cache(1, context)
    prefill(model, cache, tokens, prefill_step_size, progress)
    metadata = {"model": model_name, "prompt": prompt, "tokens": json.dumps(tokens)}
    save_prompt_cache(file, cache, metadata | ({} if system_prompt is None else {"system_prompt": system_prompt}))
    return len(tokens)


def _tokens(tokenizer: Tokenizer, prompt: str, system_prompt: str | None, ignore_chat_template: bool) -> list[int]:
    if not tokenizer.has_chat_template or ignore_chat_template:
        if system_prompt is not None:
            raise UserError("a system prompt needs a chat template")
        return tokenizer.encode(prompt)
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    messages.append({"role": "user", "content": prompt})
    tokens: list[int] = tokenizer.apply_chat_template(messages, continue_final_message=True)
    return tokens


@torch.inference_mode()
def prefill(
    model: CausalLM, cache: Cache, tokens: Sequence[int], step: int, progress: Callable[[int, int], None]
) -> None:
    """Let a cache's only slot take in more tokens, `step` at a time."""
    prefill_step = PrefillStep(model, cache, step)
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        prefill_step.run(part, [0], [len(part)])
        progress(start + len(part), len(tokens))


def reuse(cache: Cache, cached: Sequence[int], tokens: Sequence[int]) -> int:
    """Wind a cache that holds `cached` back to what `tokens` share with them; returns how many that is."""
    # The last token is fed in any case: its logits are wanted.
    pairs = zip(cached, tokens[:-1], strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(cached), len(tokens) - 1))
    if shared < len(cached) and not cache.trimmable:
        shared = 0
    cache.lengths[0] = shared
    return shared
