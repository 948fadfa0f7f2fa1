import math
import shutil
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gfxlm import ops
from gfxlm.ops.compile import CompileError, _in_float32

HALF_TYPES = [torch.bfloat16, torch.float16]
HAS_COMPILER = shutil.which("g++") is not None or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poison_uninitialised_memory() -> None:
    """Not here: the compiler allocates parameters of its own, which cannot be filled."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expression(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    return torch.sigmoid(x * scale) * y - x / 3 + 0.25


def rounded_once(out: Tensor, exact: Tensor) -> bool:
    """Whether `out` is `exact` rounded, but for values next to a boundary."""
    return bool((out == exact.to(out.dtype)).float().mean() > 0.99)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a compiler")
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_compiled_is_rounded_once(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 3000, device=DEVICE).to(dtype).unbind()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = ops.compile(expression)(x, y, scale=1.5)
    assert out.dtype == dtype
    assert rounded_once(out, expression(x.double(), y.double(), 1.5))
    assert not rounded_once(expression(x, y, 1.5), expression(x.double(), y.double(), 1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    x, y = (10 * torch.randn(2, 50)).to(dtype).unbind()
    out, expected = _in_float32(expression)(x, y), expression(x, y)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)


def test_results_have_the_types_of_the_plain_function() -> None:
    def many(x: Tensor, parts: dict[str, Tensor], n: int) -> dict[str, object]:
        return {
            "half": x * 2.5 + n,
            "with float": x + parts["float"],
            "scalar": x * parts["zero-dimensional"],
            "mixed": [x + parts["other half"], (x > 0, x.argmax())],
            "asked for": x.float(),
            "number": n,
        }

    x = torch.randn(7).bfloat16()
    parts = {"float": torch.randn(7), "zero-dimensional": torch.tensor(2.0), "other half": torch.randn(7).half()}
    out, expected = _in_float32(many)(x, parts, 3), many(x, parts, 3)
    assert [t.dtype for t in flat(out)] == [t.dtype for t in flat(expected)]
    assert out["number"] == 3
    assert torch.equal(out["mixed"][1][0], x > 0)


def flat(value: object) -> list[Tensor]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value] if isinstance(value, Tensor) else [t for item in inner for t in flat(item)]


def test_without_a_compiler_it_warns_once_and_means_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    x, y = torch.randn(2, 300).bfloat16().unbind()

    @ops.compile
    def named(x: Tensor, y: Tensor) -> Tensor:
        return expression(x, y)

    with pytest.warns(UserWarning, match="named runs uncompiled: No working C\\+\\+ compiler"):
        out = named(x, y)
    assert rounded_once(out, expression(x.double(), y.double()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(named(x, y), out)


def test_errors_are_short_and_name_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("\n".join(f"line {i}" for i in range(5000)))

    # The name gfxlm.ops.compile is the function's.
    monkeypatch.setattr(sys.modules["gfxlm.ops.compile"], "_BACKEND", broken)
    failing = ops.compile(expression)
    for _ in range(2):
        with pytest.raises(CompileError) as caught:
            failing(torch.ones(3), torch.ones(3))
        lines = str(caught.value).splitlines()
        assert lines[0] == "expression could not be compiled: RuntimeError (4990 lines before these left out)"
        assert lines[1:] == [f"line {i}" for i in range(4990, 5000)]


def test_wrong_arguments_raise_what_the_function_raises() -> None:
    with pytest.raises(RuntimeError, match=r"^The size of tensor a \(3\) must match"):
        ops.compile(expression)(torch.ones(3), torch.ones(2))

    def picky(x: Tensor) -> Tensor:
        if x.ndim != 1:
            raise ValueError("one dimension, please")
        return x + 1

    with pytest.raises(ValueError, match="one dimension, please"):
        ops.compile(picky)(torch.ones(2, 2))


def test_it_looks_like_the_function() -> None:
    compiled = ops.compile(expression)
    assert compiled.__name__ == "expression"
    assert compiled.__doc__ == expression.__doc__
    assert math.isclose(_in_float32(lambda x: x + 1)(torch.zeros(1)).item(), 1.0)
