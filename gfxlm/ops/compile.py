"""Fused elementwise expressions: `torch.compile`, with float32 inside and errors that can be read."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_HALF = (torch.bfloat16, torch.float16)
_NO_COMPILER = ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton")
_LAST_LINES = 10
_BACKEND = "inductor"


class CompileError(RuntimeError):
    """A function could not be compiled. The message names it and ends with the compiler's last lines."""


def compile(function: Callable[P, R]) -> Callable[P, R]:
    """A function that means the same as `function`, compiled on its first call; a decorator, as `mx.compile` is.

    `function` is pure: from tensors and numbers to tensors, or to tuples, lists and dicts of them. bfloat16 and float16
    arguments are computed with in float32, and each result is rounded once to the type that `function` itself gives it.
    Without a compiler for the tensors' device the function runs uncompiled, in float32 all the same, and warns once.

    Raises CompileError if the compiler fails, and what `function` raises for arguments that it does not take.
    """
    wide = _in_float32(function)
    compiled = torch.compile(wide, backend=_BACKEND)
    name = getattr(function, "__qualname__", repr(function))
    uncompiled: list[str] = []  # why, once it is so

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if uncompiled:
            return wide(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = _cause(error)
            if type(cause).__name__ in _NO_COMPILER:
                uncompiled.append(str(cause))
                warnings.warn(f"{name} runs uncompiled: {_first_line(cause)}", stacklevel=2)
            elif isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise CompileError(_message(name, cause)) from None
        # Either uncompiled from now on, or wrong arguments: then this says so in the function's own words.
        return wide(*args, **kwargs)

    return call


def _in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """The function computed in float32, its results in the types that it gives by itself."""

    @functools.wraps(function)
    def wide(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(t.dtype in _HALF for t in _tensors([args, kwargs])):
            return function(*args, **kwargs)
        # Compiled, nothing is left of this call but the types of its results.
        narrow = function(*args, **kwargs)
        result: R = _cast(function(*_widen(args), **_widen(kwargs)), narrow)
        return result

    return wide


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    if isinstance(value, dict):
        return {key: _widen(item) for key, item in value.items()}
    return type(value)(map(_widen, value)) if type(value) in (tuple, list) else value


def _cast(value: Any, like: Any) -> Any:
    """Tensors of `value` in the types of their counterparts."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    if isinstance(value, dict):
        return {key: _cast(item, like[key]) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_cast(item, other) for item, other in zip(value, like, strict=True))
    return value


def _cause(error: BaseException) -> BaseException:
    """What the compiler raised, out of torch's wrappings."""
    while (inner := getattr(error, "inner_exception", None)) is not None:
        error = inner
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _message(name: str, error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    shown = lines[-_LAST_LINES:]
    left_out = f" ({len(lines) - len(shown)} lines before these left out)" if len(lines) > len(shown) else ""
    return "\n".join([f"{name} could not be compiled: {type(error).__name__}{left_out}", *shown])
