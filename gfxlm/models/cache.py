"""mlx-lm's functions on prompt caches."""

from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache

_DEFAULT_CONTEXT = 32768


def make_prompt_cache(model: CausalLM, max_kv_size: int | None = None) -> Cache:
    """An empty cache for one conversation, of `max_kv_size` positions (the model's own limit, at most 32768).

    Unlike mlx-lm's, a full one forgets nothing: it ends the text.
    """
    return model.make_cache(1, max_kv_size or min(model.config.max_position_embeddings, _DEFAULT_CONTEXT))


def can_trim_prompt_cache(cache: Cache) -> bool:
    """True unless a layer has a recurrent state, which cannot be wound back."""
    return cache.trimmable


def trim_prompt_cache(cache: Cache, num_tokens: int) -> int:
    """Forget the last `num_tokens` positions; returns how many were there to forget, 0 where trimming is impossible."""
    if num_tokens < 0:
        raise UserError(f"num_tokens must not be negative, but is {num_tokens}")
    if not cache.trimmable:
        return 0
    trimmed = min(num_tokens, cache.lengths[0])
    cache.lengths[0] -= trimmed
    return trimmed
