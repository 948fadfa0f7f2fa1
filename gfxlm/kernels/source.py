"""A hash of what a kernel computes: its source and that of all it calls, without comments and docstrings."""

import functools
import hashlib
import io
import tokenize
from types import CodeType, ModuleType
from typing import Any

from triton.language import constexpr
from triton.runtime.jit import JITFunction


@functools.lru_cache(maxsize=1024)
def source_hash(kernel: JITFunction[Any]) -> str:
    """Twelve digits. Unlike Triton's own they depend on no version and not on where in its file a kernel stands."""
    parts: dict[str, Any] = {}
    _collect(kernel, parts)
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:12]


def _collect(value: object, parts: dict[str, Any]) -> None:
    """Add what the value's code depends on, by its name in full."""
    if not isinstance(value, JITFunction):
        return
    name = f"{value.fn.__module__}.{value.fn.__qualname__}"
    if name in parts or not name.startswith(("gfxlm.", "tests.")):
        return
    parts[name] = _bare(value.src)
    words = _names(value.fn.__code__)
    found = {word: value.fn.__globals__[word] for word in words if word in value.fn.__globals__}
    for module in [other for other in found.values() if isinstance(other, ModuleType)]:
        if module.__name__.startswith("gfxlm."):
            found |= {f"{module.__name__}.{word}": getattr(module, word) for word in words if hasattr(module, word)}
    for word, other in found.items():
        _collect(other, parts)
        if isinstance(other, int | float | str | tuple | constexpr):
            parts[f"{name}:{word}"] = repr(other)


def _names(code: CodeType) -> list[str]:
    nested = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *(name for inner in nested for name in _names(inner))]


def _bare(source: str) -> list[str]:
    """The words of the source but for comments, docstrings and how its lines are broken."""
    words: list[str] = []
    at_start = True  # of a statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL) or (at_start and token.type == tokenize.STRING):
            continue
        starts = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if not (starts and at_start and token.type == tokenize.NEWLINE):
            words.append(tokenize.tok_name[token.type] if starts else token.string)
        at_start = starts
    return words
