"""How many tokens there were, in OpenAI's words."""

from collections.abc import Sequence
from typing import Any

from gfxlm.server.generation import Generation


def usage(generations: Sequence[Generation], texts_per_prompt: int = 1) -> dict[str, Any]:
    """The `usage` of all these texts so far; a prompt that has several of them counts once."""
    prompts = generations[::texts_per_prompt]
    prompt = sum(generation.prompt_tokens for generation in prompts)
    generated = sum(generation.generated_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(generation.cached_tokens for generation in prompts)},
    }
