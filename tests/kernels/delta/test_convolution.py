"""The convolution of a dense batch, against float64."""

import pytest
import torch

from gfxlm.kernels.delta.convolution import convolution
from tests.kernels.delta.oracle import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"),
    [(2, 1, 130, 4), (1, 40, 24, 2), (3, 2, 5, 4), (2, 3, 16, 7), (1, 5, 8, 1), (2, 0, 8, 4)],
)
@pytest.mark.parametrize("activate", [False, True])
def test_against_float64(batch: int, length: int, channels: int, taps: int, activate: bool, dtype: torch.dtype) -> None:
    shapes = ((batch, length, channels), (channels, taps), (channels,), (batch, taps - 1, channels))
    x, weight, bias, state = (torch.randn(shape).to(dtype).to(DEVICE) for shape in shapes)
    for given_bias, given_state in ((bias, state), (None, None)):
        y, last = (t.cpu() for t in convolution(x, weight, given_bias, given_state, activate))
        before = torch.zeros_like(state) if given_state is None else given_state
        line = torch.cat((before, x), 1).cpu()
        taken = line.double().unfold(1, taps, 1)[:, :length] if length else torch.zeros(batch, 0, channels, taps)
        exact = (taken * weight.double().cpu()).sum(-1)
        size = (taken * weight.double().cpu()).abs().sum(-1)
        if given_bias is not None:
            exact = exact + given_bias.double().cpu()
        if activate:
            exact = exact * exact.sigmoid()
        # One rounding of the result, and fp32's own in the sum.
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (1 + size)
        assert ((y.double() - exact).abs() <= bound).all()
        assert torch.equal(last, line[:, length:])


def test_strided_inputs() -> None:
    x, state = torch.randn(2, 6, 9, device=DEVICE), torch.randn(2, 3, 9, device=DEVICE)
    weight = torch.randn(9, 4, device=DEVICE)
    expected = convolution(x, weight, None, state, True)
    turned = convolution(x.mT.contiguous().mT, weight.mT.contiguous().mT, None, state.mT.contiguous().mT, True)
    assert all(torch.equal(a, b) for a, b in zip(turned, expected, strict=True))
