"""The index of each row's first best number."""

import math

import numpy as np
import pytest
import torch

from gfxlm import ops
from gfxlm.device.arch import named
from gfxlm.kernels.basic.select import select
from gfxlm.kernels.launch import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (9, 7), (3, 1024), (2, 3000), (11, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smallest", [False, True])
def test_first_best(shape: tuple[int, int], dtype: torch.dtype, smallest: bool) -> None:
    pool = np.array([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, 0.25])
    for kind in range(3):
        rng = np.random.default_rng(kind)
        a = rng.choice(pool[: 7 - 2 * kind], shape)  # with infinities, with one of them, with neither
        if kind == 1:
            a[::2, shape[1] // 2 :: 3] = -math.nan
        x = torch.from_numpy(a).to(dtype)
        wide = x.float().numpy()
        expected = (np.argmin if smallest else np.argmax)(wide, 1) if shape[0] else []
        assert select(x.to(DEVICE), smallest=smallest).tolist() == list(expected)


def test_any_strides() -> None:
    x = torch.randn(40, 60).to(DEVICE)
    for view in (x.T, x[::3, 1::2], x[:1].expand(5, 60), x[:, :1].expand(40, 2000)):
        assert select(view).tolist() == view.cpu().argmax(1).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_many_rows() -> None:
    x = torch.randn(200_000, 33, device="cuda")
    assert torch.equal(select(x), x.argmax(1))


def test_rows_longer_than_indices_count_are_torchs() -> None:
    with recording(named("gfx1151")) as launches:
        assert ops.argmax(torch.empty(1 << 31, device="meta")).shape == ()
        assert not launches
        ops.argmax(torch.empty((1 << 31) - 1, device="meta"))
    assert launches
