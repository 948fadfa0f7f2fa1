"""Texts as vectors: the model's last hidden states, pooled."""

from collections.abc import Generator, Sequence
from typing import Literal

import torch
from torch import Tensor

from gfxlm.engine.budget import is_out_of_memory
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache
from gfxlm.ops.ragged import ragged

Pooling = Literal["mean", "last"]
_CHUNK = 2048


def embedded(
    model: CausalLM, prompts: Sequence[Sequence[int]], pooling: Pooling, *, chunk: int = _CHUNK
) -> Generator[None, None, list[list[float]]]:
    """A vector of `hidden_size` numbers and length 1 for each prompt, returned at the end of the generator.

    The normed hidden states, their mean in fp32 or the last token's, are divided by their norm. Each `next` runs up to
    `chunk` tokens. Raises UserError for an empty prompt, and where a prompt's keys and values find no memory.
    """
    vectors = []
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty")
        pooled = yield from _pooled(model, prompt, pooling, chunk)
        vectors.append((pooled / pooled.norm().clamp_min(torch.finfo(torch.float32).tiny)).tolist())
    return vectors


def _pooled(model: CausalLM, prompt: Sequence[int], pooling: Pooling, chunk: int) -> Generator[None, None, Tensor]:
    total = last = torch.zeros(model.config.hidden_size, device=model.device)
    try:
        cache = model.make_cache(1, len(prompt))
        for start in range(0, len(prompt), chunk):
            hidden = _fed(model, prompt[start : start + chunk], cache)
            total, last = total + hidden.sum(0), hidden[-1]
            yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: there is none for a text of {len(prompt)} tokens at the moment") from None
    return last if pooling == "last" else total / len(prompt)


@torch.inference_mode()
def _fed(model: CausalLM, tokens: Sequence[int], cache: Cache) -> Tensor:
    """The hidden states (N, hidden_size), fp32, of the next tokens."""
    positions, slots = ragged([0], [len(tokens)], cache.lengths, model.device)
    hidden = model.forward(torch.tensor(tokens, device=model.device), positions, slots, cache)
    cache.lengths[0] += len(tokens)
    return hidden.float()
