"""Rows of quantised matrices by index."""

import pytest
import torch

from gfxlm.kernels.linear.rows import rows
from tests.kernels.linear.quantised import AFFINE, DEVICE, FLOATS, matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", AFFINE + FLOATS)
def test_formats(kind: tuple[int, int, str], dtype: torch.dtype) -> None:
    w = matrix(7, 1408, kind, dtype, beside=kind[0] % 2 == 0)
    indices = torch.tensor([3, 0, 6, 3], device=DEVICE)
    y = rows(indices, w.packed, dtype)
    exact = w.exact[indices.cpu()]
    assert y.dtype == dtype
    # Scale times code is rounded to fp32, and so is the bias added to it: both may be larger than the sum.
    noise = 2**-23 * w.exact.abs().max()
    assert ((y.cpu().double() - exact).abs() <= torch.finfo(dtype).eps / 2 * 1.001 * exact.abs() + noise).all()


def test_indices() -> None:
    """Any integer type, none at all, and those out of range, which a kernel cannot refuse."""
    w = matrix(5, 64, (4, 64, "affine"), torch.bfloat16)
    exact = w.exact.to(torch.bfloat16)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(rows(torch.tensor([-3, 4, 9], dtype=dtype, device=DEVICE), w.packed, torch.bfloat16).cpu(),
                           exact[[0, 4, 4]])  # fmt: skip
    strided = torch.arange(10, device=DEVICE)[::4]
    assert torch.equal(rows(strided, w.packed, torch.bfloat16).cpu(), exact[[0, 4, 4]])
    assert rows(strided[:0], w.packed, torch.bfloat16).shape == (0, 64)
