"""Products of a few rows on the matrix units, against float64."""

import pytest
import torch

from gfxlm.kernels.linear import skinny as module
from gfxlm.kernels.linear.skinny import skinny, skinny_takes
from tests.kernels.linear.quantised import FLOATS, check, check_swiglu, inputs, matrix

FORMATS = [(4, 32, "affine"), (4, 64, "affine"), (4, 128, "affine"), (8, 32, "affine"), (8, 64, "affine")]
FORMATS += [(2, 32, "affine"), (2, 128, "affine")]
TYPES = [torch.bfloat16, torch.float16]


def tuned(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """Tiles other than the portable table's."""
    chosen = {"codes": 32, "least_blocks": 1, "blocks": 1, "tiles": 1, "splits": 2, "spans": 1, "num_stages": 1}
    monkeypatch.setattr(module, "config", lambda *_, **__: chosen | values)


@pytest.mark.parametrize("codes", [16, 32])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: tuple[int, int, str], dtype: torch.dtype, codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of w that do not fill a tile, spans of K that do not fill a step."""
    tuned(monkeypatch, codes=codes)
    w = matrix(19, 640, kind, dtype)
    x = inputs(3, 640, dtype)
    check(x, w, skinny(x, w.packed), w.product(x))


@pytest.mark.parametrize("rows", [1, 4, 5, 9, 33])
def test_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(monkeypatch, blocks=4, tiles=2)
    w = matrix(33, 192, (4, 64, "affine"), torch.bfloat16)
    x = inputs(rows, 192, torch.bfloat16)
    check(x, w, skinny(x, w.packed), w.product(x))


@pytest.mark.parametrize("tuning", [{"splits": 1, "spans": 1}, {"splits": 4, "spans": 2}, {"spans": 3}])
def test_many_steps(tuning: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(monkeypatch, codes=16, **tuning)
    w = matrix(16, 2112, (4, 64, "affine"), torch.bfloat16)
    x = inputs(2, 2112, torch.bfloat16)
    check(x, w, skinny(x, w.packed), w.product(x))


def test_bias_and_residual() -> None:
    """By the portable table, with gaps between the rows of x and of the residual."""
    w = matrix(20, 128, (4, 64, "affine"), torch.float16)
    x = inputs(18, 200, torch.float16)[:, 8:136]
    bias = inputs(1, 20, torch.float16)[0]
    residual = inputs(18, 24, torch.float16)[:, 1:21]
    check(x, w, skinny(x, w.packed, bias=bias, residual=residual), w.product(x), bias, residual)
    turned = x.mT.contiguous().mT
    check(x, w, skinny(turned, w.packed, residual=residual.mT.contiguous().mT), w.product(x), residual)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tiles", [1, 2])
def test_swiglu(tiles: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(monkeypatch, tiles=tiles)
    w = matrix(46, 256, (4, 64, "affine"), dtype)
    x = inputs(3, 256, dtype)
    y = skinny(x, w.packed, swiglu=True)
    assert y.shape == (3, 23)
    check_swiglu(x, w, y)


def test_scales_apart() -> None:
    w = matrix(16, 128, (4, 64, "affine"), torch.bfloat16, beside=False)
    x = inputs(2, 128, torch.bfloat16)
    check(x, w, skinny(x, w.packed), w.product(x))


def test_nothing() -> None:
    w = matrix(4, 64, (4, 64, "affine"), torch.bfloat16)
    assert skinny(inputs(0, 64, torch.bfloat16), w.packed).shape == (0, 4)


def test_what_it_takes() -> None:
    for kind in FORMATS:
        packed = matrix(2, 128, kind, torch.bfloat16).packed
        assert skinny_takes(packed, torch.bfloat16)
        assert not skinny_takes(packed, torch.float32)
    for kind in [*FLOATS, (3, 64, "affine")]:
        assert not skinny_takes(matrix(2, 128, kind, torch.bfloat16).packed, torch.bfloat16)
