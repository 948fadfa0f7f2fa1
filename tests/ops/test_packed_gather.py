"""Gathered products by the GPU's route, against the CPU's; zeros where an index is out of range."""

import torch

from gfxlm.kernels.packed import Packed
from gfxlm.ops.packed import packed_gather
from gfxlm.ops.quantized import gather_qmm, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_against_one_matrix_after_the_other() -> None:
    w_q, scales, biases = quantize(torch.randn(5, 24, 64))
    x = torch.randn(6, 2, 64)
    lhs, rhs = torch.randint(0, 6, (4, 3)), torch.randint(0, 5, (4, 3))
    exact = gather_qmm(x.double(), w_q, scales.double(), biases.double(), lhs, rhs)
    packed = Packed.of(w_q.to(DEVICE), scales.to(DEVICE), biases.to(DEVICE), 64, 4)
    y = packed_gather(x.to(DEVICE), packed, lhs.to(DEVICE), rhs.to(DEVICE)).cpu()
    assert y.shape == (4, 3, 2, 24)
    assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_indices_out_of_range_give_zeros() -> None:
    w_q, scales, biases = (t.to(DEVICE) for t in quantize(torch.randn(2, 16, 64)))
    x = torch.randn(3, 1, 64, device=DEVICE)
    lhs, rhs = (torch.tensor(i, device=DEVICE) for i in ([0, 3, -1, 1, 2], [0, 0, 1, 2, -7]))
    y = packed_gather(x, Packed.of(w_q, scales, biases, 64, 4), lhs, rhs)
    assert (y[1:] == 0).all()
    assert (y[0] != 0).any()
