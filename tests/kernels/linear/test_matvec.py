"""Products of a few rows on the vector units, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from gfxlm.device.arch import assume, named
from gfxlm.kernels.launch import launch, recording
from gfxlm.kernels.linear import matvec as module
from gfxlm.kernels.linear.matvec import matvec
from gfxlm.kernels.linear.pairs import as_float16
from gfxlm.kernels.linear.units import load_inputs
from gfxlm.kernels.tuning import override
from gfxlm.ops.quantized import quantize
from tests.kernels.linear.quantised import AFFINE, DEVICE, FLOATS, check, check_swiglu, inputs, matrix

TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", AFFINE + FLOATS)
def test_formats(kind: tuple[int, int, str], dtype: torch.dtype) -> None:
    """Without the multiplication of pairs."""
    w = matrix(3, 384 if kind[1] == 128 else 192, kind, dtype)
    x = inputs(1, w.packed.columns, dtype)
    check(x, w, matvec(x, w.packed), w.product(x))


@pytest.mark.parametrize("dtype", TYPES[:2])
@pytest.mark.parametrize("kind", AFFINE + FLOATS)
def test_pairs(kind: tuple[int, int, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What AMD's GPUs run, with the instructions' twins."""
    monkeypatch.setattr(module, "dot2_type", lambda *_: "twin")
    w = matrix(3, 384 if kind[1] == 128 else 192, kind, dtype)
    x = inputs(1, w.packed.columns, dtype)
    check(x, w, matvec(x, w.packed), w.product(x))


@pytest.mark.parametrize("kind", [(4, 32, "affine"), (3, 32, "affine")])
def test_many_steps(kind: tuple[int, int, str]) -> None:
    """Four turns of the loop, the last of them not full."""
    w = matrix(2, 6240, kind, torch.bfloat16)
    x = inputs(1, 6240, torch.bfloat16)
    check(x, w, matvec(x, w.packed), w.product(x))


AHEAD = {"block_m": 2, "block_n": 2, "block_u": 64, "num_warps": 1, "ahead": True}


@pytest.mark.parametrize("columns", [96, 4096, 6240])
@pytest.mark.parametrize("kind", [(4, 32, "affine"), (3, 32, "affine"), (4, 16, "nvfp4")])
def test_weights_ahead(kind: tuple[int, int, str], columns: int) -> None:
    """Steps whose weights were read in the one before: one that is not full, whole ones, and these with a rest."""
    w = matrix(3, columns, kind, torch.bfloat16, beside=columns != 96)
    x = inputs(3, columns, torch.bfloat16)
    with override("matvec", AHEAD):
        check(x, w, matvec(x, w.packed), w.product(x))


def test_rows_bias_and_residual() -> None:
    """Rows of x and of the residual with gaps between them, rows of w that do not fill a block."""
    w = matrix(6, 128, (4, 64, "affine"), torch.float16)
    x = inputs(3, 200, torch.float16)[:, 8:136]
    bias = inputs(1, 6, torch.float16)[0]
    residual = inputs(3, 9, torch.float16)[:, 1:7]
    check(x, w, matvec(x, w.packed, bias=bias, residual=residual), w.product(x), bias, residual)
    turned = x.mT.contiguous().mT
    check(x, w, matvec(turned, w.packed, residual=residual.mT.contiguous().mT), w.product(x), residual)


@pytest.mark.parametrize("arch", ["gfx1100", "gfx942"])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_several_rows_at_a_time(rows: int, arch: str) -> None:
    """The blocks that tables ask for where a load of a weight serves several rows of x."""
    w = matrix(5, 96, (4, 32, "affine"), torch.float32)
    x = inputs(rows, 96, torch.float32)
    with recording(named(arch)) as launches:
        y = matvec(x, w.packed)
    assert launches[0].constants["BLOCK_M"] >= 1
    constants = {**launches[0].constants, "native": "", "BLOCK_M": 4}
    launch(launches[0].kernel, (-(-rows // 4) * 2,), *launches[0].arguments, **constants)
    check(x, w, y, w.product(x))


@pytest.mark.parametrize("dtype", TYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    w = matrix(10, 96, (4, 32, "affine"), dtype)
    x = inputs(2, 96, dtype)
    y = matvec(x, w.packed, swiglu=True)
    assert y.shape == (2, 5)
    check_swiglu(x, w, y)


def test_scales_apart() -> None:
    w = matrix(4, 128, (4, 64, "affine"), torch.bfloat16, beside=False)
    assert w.packed.pairs is None
    x = inputs(1, 128, torch.bfloat16)
    check(x, w, matvec(x, w.packed), w.product(x))


def test_nothing() -> None:
    w = matrix(4, 64, (4, 64, "affine"), torch.bfloat16)
    assert matvec(inputs(0, 64, torch.bfloat16), w.packed).shape == (0, 4)
    assert matvec(inputs(0, 64, torch.bfloat16), w.packed, swiglu=True).shape == (0, 2)


@triton.jit
def _to_float16(p_x, p_y):
    o_u = tl.arange(0, 4)[None, :]
    scaled, power = as_float16(load_inputs(p_x, o_u * 32, None))
    for i in tl.static_range(32):
        tl.store(p_y + o_u * 32 + i, scaled[i].to(tl.float32) * power)


def test_bfloat16_as_float16() -> None:
    """Where a unit's inputs lie within 2**14 of each other nothing is lost, however large or small they are."""
    x = torch.randn(4, 32).clamp(min=0.01) * torch.tensor([[1e-30], [1.0], [1e30], [0.0]])
    x = x.to(DEVICE, torch.bfloat16)
    y = torch.empty(4, 32, device=DEVICE)
    launch(_to_float16, (1,), x, y)
    assert torch.equal(y, x.float())


def test_what_is_launched_for_amd() -> None:
    """Recorded on meta tensors: pairs and the multiplication of pairs where the architecture has it."""
    w_q, scales, biases = (t.to("meta") for t in quantize(torch.randn(64, 128).bfloat16(), 64, 4))
    scales, biases = torch.stack((scales, biases), -1).unbind(-1)
    from gfxlm.kernels.packed import Packed

    packed = Packed.of(w_q, scales, biases, 64, 4)
    x = torch.empty(1, 128, dtype=torch.bfloat16, device="meta")
    for arch, native in (("gfx1100", "bfloat16"), ("gfx942", "float16_wait"), ("gfx950", "bfloat16"), ("sm_90", "ptx")):
        with assume(named(arch)), recording(named(arch)) as launches:
            matvec(x, packed)
        assert launches[0].constants["native"] == native
        assert launches[0].constants["layout"] == "bfloat16"
