"""Model families: what their layers are and how their configs read."""

from importlib import import_module

from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM

_FAMILIES = {
    "llama": ("llama", "Llama"),
    "mistral": ("llama", "Llama"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "qwen3_moe": ("qwen3_moe", "Qwen3Moe"),
    "qwen3_next": ("qwen3_next", "Qwen3Next"),
}


def model_class(model_type: str) -> type[CausalLM]:
    """The class of a config's `model_type`. Raises UserError that lists the known ones."""
    if model_type not in _FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; known are {', '.join(sorted(_FAMILIES))}")
    module, name = _FAMILIES[model_type]
    found: type[CausalLM] = getattr(import_module(f"gfxlm.models.{module}"), name)
    return found
