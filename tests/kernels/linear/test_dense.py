"""Products with unquantised matrices against float64, by the kernel and by whoever else answers."""

import pytest
import torch
from torch import Tensor

from gfxlm.device import gemm
from gfxlm.kernels import tuning
from gfxlm.kernels.linear import dense as module
from gfxlm.kernels.linear.dense import dense, product
from gfxlm.kernels.linear.wide import by_blas
from gfxlm.kernels.packed import Packed
from gfxlm.ops.quantized import dequantize, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOISE = 2e-6  # of fp32 sums, relative to the sum of their terms' sizes
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = {"block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 2}


def check(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, *, roundings: int = 1) -> None:
    """y is x @ w.T + bias, summed in fp32 and rounded."""
    added = 0.0 if bias is None else bias.double()
    expected = x.double() @ w.double().T + added
    size = x.double().abs() @ w.double().abs().T + expected.abs()
    assert y.dtype == x.dtype
    unit = torch.finfo(x.dtype).eps / 2
    # What is rounded before the last sum is no larger than that sum's terms.
    assert ((y.double() - expected).abs() <= unit * expected.abs() + (NOISE + (roundings - 1) * unit) * size).all()


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, w = torch.randn(m, k, device=DEVICE).to(dtype), torch.randn(n, k, device=DEVICE).to(dtype)
    return x, w, torch.randn(n, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 40, 64), (16, 16, 48), (17, 33, 50), (40, 20, 31), (5, 64, 80), (3, 200, 15)]
)
def test_sizes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(m, n, k, dtype)
    with tuning.override("dense", SMALL):
        check(dense(x, w), x, w)
        check(dense(x, w, bias=bias), x, w, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 40, 70])
def test_tiles_of_the_tables(m: int, dtype: torch.dtype) -> None:
    x, w, bias = operands(m, 70, 400, dtype)
    check(dense(x, w, bias=bias), x, w, bias)


@pytest.mark.parametrize("k", [48, 50])
def test_rows_that_lie_apart(k: int) -> None:
    x, w, bias = (torch.randn(9, 3, 100, device=DEVICE).bfloat16()[:, 1, 7 : 7 + k] for _ in range(3))
    out = torch.full((9, 40), 7.0, device=DEVICE).bfloat16()
    with tuning.override("dense", SMALL):
        found = dense(x, w[:5], bias=bias[0, :5].contiguous(), out=out[:, 30:35])
    assert found.data_ptr() == out[:, 30:35].data_ptr()
    check(out[:, 30:35], x, w[:5], bias[0, :5])
    assert out[:, :30].eq(7).all()
    assert out[:, 35:].eq(7).all()


def test_nothing() -> None:
    x, w, bias = operands(3, 5, 8, torch.float32)
    assert dense(x[:0], w).shape == (0, 5)
    assert dense(x, w[:0]).shape == (3, 0)
    assert torch.equal(dense(x[:, :0], w[:, :0], bias=bias), bias.expand(3, 5))


def test_the_same_every_time() -> None:
    x, w, _ = operands(20, 30, 100, torch.float16)
    assert torch.equal(dense(x, w), dense(x, w))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(5, 9)}, r"x: must be \(M, 9\).*\(3, 8\)"),
        ({"w": torch.zeros(8, 5).mT}, r"w: must be \(N, K\) of adjacent"),
        ({"w": torch.zeros(1, 5, 8)}, r"w: must be \(N, K\)"),
        ({"x": torch.zeros(8, 3).mT}, r"x: must be \(M, 8\)"),
        ({"bias": torch.zeros(4)}, r"bias: must be \(5,\), got \(4,\)"),
        ({"bias": torch.zeros(5).bfloat16()}, r"bias: must be torch.float32 as x is, got torch.bfloat16"),
        ({"w": torch.zeros(5, 8).half()}, r"w: must be torch.float32"),
        ({"out": torch.zeros(3, 4)}, r"out: must be \(3, 5\)"),
        ({"out": torch.zeros(3, 5).half()}, r"out: must be torch.float32"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    given: dict[str, Tensor | None] = {
        "x": torch.zeros(3, 8),
        "w": torch.zeros(5, 8),
        "bias": None,
        "out": None,
        **change,
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        dense(given["x"], given["w"], bias=given["bias"], out=given["out"])  # type: ignore[arg-type]


@pytest.mark.parametrize("library", [gemm.TRITON, gemm.ROCBLAS, gemm.HIPBLASLT, gemm.CUBLAS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whoever_answers(monkeypatch: pytest.MonkeyPatch, library: str, dtype: torch.dtype) -> None:
    calls: list[Tensor] = []

    def counted(*args: Tensor, **kwargs: Tensor) -> Tensor:
        calls.append(args[0])
        return dense(*args, **kwargs)

    monkeypatch.setattr(gemm, "prefer", lambda device, dtype, rows: library)
    monkeypatch.setattr(module, "dense", counted)
    x, w, bias = operands(7, 20, 33, dtype)
    out = torch.zeros(7, 50, dtype=dtype, device=DEVICE)
    for added in (None, bias):
        check(product(x, w, bias=added), x, w, added, roundings=2)
        assert product(x, w, bias=added, out=out[:, 5:25]) is not None
        check(out[:, 5:25], x, w, added, roundings=2)
    assert len(calls) == (4 if library == gemm.TRITON else 0)
    assert out.count_nonzero() <= 7 * 20


def test_a_quantised_matrix_where_no_library_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "prefer", lambda device, dtype, rows: gemm.TRITON)
    x, w, bias = operands(20, 300, 128, torch.float32)
    w_q, scales, biases = quantize(w.cpu(), 64, 4)
    packed = Packed.of(w_q.to(DEVICE), scales.to(DEVICE), biases.to(DEVICE), 64, 4)
    found = by_blas(x, packed, 128, bias=bias, residual=x[:, :1].expand(20, 300))
    check(found, x, dequantize(w_q, scales, biases, 64, 4).to(DEVICE), bias + x[:, :1])


def test_any_rows_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLAS takes every layout, and the kernel adjacent numbers: it is given a copy of others."""
    monkeypatch.setattr(gemm, "prefer", lambda device, dtype, rows: gemm.TRITON)
    x, w, _ = operands(20, 30, 128, torch.float32)
    check(product(x.mT.contiguous().mT, w), x, w)
