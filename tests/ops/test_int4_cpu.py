"""The nibble planes hold MLX's codes exactly, and their products stay within bfloat16's rounding."""

import pytest
import torch

from gfxlm.ops.formats import unpack_codes
from gfxlm.ops.int4_cpu import int4_applies, int4_codes, int4_dense, int4_matmul, int4_pack, int4_rows
from gfxlm.ops.quantized import dequantize, quantize

pytestmark = pytest.mark.skipif(not int4_applies(64, torch.bfloat16), reason="this CPU has no vectorised int4 kernel")
BITS = (2, 3, 4, 5, 6, 8)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_planes_give_back_what_they_hold(bits: int, group_size: int) -> None:
    w = torch.randn(2, 200, 256).bfloat16()
    w_q, scales, biases = quantize(w, group_size, bits)
    codes = unpack_codes(w_q, bits)
    stack = int4_pack(codes, scales, biases, group_size, bits)
    for ours, theirs in zip(int4_codes(stack), (codes, scales, biases), strict=True):
        assert torch.equal(ours, theirs)
    matrix, dense = stack.matrix(1), dequantize(w_q[1], scales[1], biases[1], group_size, bits)
    assert torch.equal(int4_dense(matrix), dense.mT)
    assert matrix.shape == (200, 256)
    rows = torch.tensor([[0, 31, 32], [63, 64, 199]])
    assert torch.equal(int4_rows(matrix, rows), dense[rows])


@pytest.mark.parametrize("rows", [1, 3, 400])
@pytest.mark.parametrize("bits", BITS)
def test_product_against_float64(bits: int, rows: int) -> None:
    w_q, scales, biases = quantize(torch.randn(100, 512).bfloat16() + 0.5, 64, bits)
    x = torch.randn(rows, 512).bfloat16()
    exact = x.double() @ dequantize(w_q, scales, biases, 64, bits, dtype=torch.float64).mT
    ours = int4_matmul(x, int4_pack(unpack_codes(w_q, bits), scales, biases, 64, bits))
    assert (ours.double() - exact).norm() / exact.norm() < 2**-8
