"""MLX-format language models, fast on AMD GPUs, NVIDIA GPUs and plain CPUs, with mlx-lm's names and habits."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gfxlm.engine.convert import convert
    from gfxlm.engine.engine import Engine
    from gfxlm.engine.generate import batch_generate, generate, stream_generate
    from gfxlm.engine.grammar import Grammar
    from gfxlm.engine.load import load
    from gfxlm.engine.params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "Grammar",
    "SamplingParams",
    "batch_generate",
    "convert",
    "generate",
    "load",
    "stream_generate",
]

# Imported on first use: `gfxlm --help` must not wait for torch.
_HOMES = {
    "Engine": "gfxlm.engine.engine",
    "Grammar": "gfxlm.engine.grammar",
    "SamplingParams": "gfxlm.engine.params",
    "batch_generate": "gfxlm.engine.generate",
    "convert": "gfxlm.engine.convert",
    "generate": "gfxlm.engine.generate",
    "load": "gfxlm.engine.load",
    "stream_generate": "gfxlm.engine.generate",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'gfxlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
