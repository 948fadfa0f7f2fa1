"""Quantised matrices for tests, with the float64 matrix that they stand for and what fp32 may lose of a product."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.kernels.packed import Packed
from gfxlm.ops.quantized import dequantize, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bits, group size, mode
AFFINE = [(bits, 64, "affine") for bits in (1, 2, 3, 4, 5, 6, 8)] + [(4, 32, "affine"), (4, 128, "affine")]
FLOATS = [(4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")]


@dataclass(frozen=True)
class Matrix:
    packed: Packed
    exact: Tensor  # float64 (N, K)
    noise: Tensor  # what an input of 1 may add to the sum's rounding error, relative to fp32's step

    def product(self, x: Tensor) -> Tensor:
        return x.cpu().double() @ self.exact.mT

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        """One rounding to x's type, and fp32's of a sum whose terms may be as large as `noise` says."""
        half = torch.finfo(x.dtype).eps / 2
        return half * 1.001 * y.abs() + 2**-24 * 4 * (x.cpu().double().abs() @ self.noise.mT)


def matrix(
    n: int, k: int, kind: tuple[int, int, str], dtype: torch.dtype, *, beside: bool = True, device: str = DEVICE
) -> Matrix:
    """A random matrix. Where there are biases they lie beside the scales, as on a GPU, if `beside` says so."""
    bits, group_size, mode = kind
    w_q, scales, *rest = quantize(torch.randn(n, k).to(dtype), group_size, bits, mode)
    biases = rest[0] if rest else None
    exact = dequantize(w_q, scales, biases, group_size, bits, mode, dtype=torch.float64)
    noise = exact.abs()
    if biases is not None:
        # A code is added to a power of two, and that is taken off again.
        offset = {torch.bfloat16: 128 * 17, torch.float16: 2048}.get(dtype, 1 << bits)
        noise = (scales.double().abs() * offset + biases.double().abs()).repeat_interleave(group_size, -1)
    w_q, scales = w_q.to(device), scales.to(device)
    biases = None if biases is None else biases.to(device)
    if beside and biases is not None:
        scales, biases = torch.stack((scales, biases), -1).unbind(-1)
    return Matrix(Packed.of(w_q, scales, biases, group_size, bits, mode), exact, noise)


def inputs(m: int, k: int, dtype: torch.dtype, device: str = DEVICE) -> Tensor:
    return torch.randn(m, k).to(device, dtype)


def check(x: Tensor, w: Matrix, y: Tensor, exact: Tensor, *added: Tensor) -> None:
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    for term in added:
        exact = exact + term.cpu().double()
    assert ((y.cpu().double() - exact).abs() <= w.bound(x, exact)).all()


def swiglu(exact: Tensor) -> Tensor:
    gate, up = exact.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def check_swiglu(x: Tensor, w: Matrix, y: Tensor) -> None:
    exact, eps = w.product(x), torch.finfo(x.dtype).eps
    gate, up = exact.chunk(2, -1)
    d_gate, d_up = (w.bound(x, exact) - eps / 2 * 1.001 * exact.abs()).chunk(2, -1)
    wanted = swiglu(exact)
    # The slope of silu is at most 1.1.
    bound = eps * wanted.abs() + 1.1 * d_gate * up.abs() + d_up * gate.abs() + 1e-7
    assert y.shape == wanted.shape
    assert ((y.cpu().double() - wanted).abs() <= bound).all()
