"""Which kernel a product with a quantised matrix gets on a GPU, and what is refused."""

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import named
from gfxlm.kernels.launch import recording
from gfxlm.kernels.packed import Packed
from gfxlm.ops.formats import Quantization
from gfxlm.ops.packed import packed_matmul, packed_rows, packed_swiglu
from gfxlm.ops.quantized import dequantize, quantize, quantized_matmul
from gfxlm.weights.weight import PackedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weight(n: int = 64, k: int = 128, bits: int = 4, mode: str = "affine") -> PackedWeight:
    """On the meta device, as it would lie on a GPU."""
    q = Quantization.resolve(None, bits, mode)
    w, scales, *biases = (t.to("meta") for t in quantize(torch.randn(n, k).bfloat16(), q.group_size, bits, mode))
    return PackedWeight.from_mlx(w, scales, biases[0] if biases else None, q, torch.bfloat16)


def packed(**facts: int) -> Packed:
    return weight(**facts).packed


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def kernels(arch: str, x: Tensor, w: PackedWeight) -> list[str]:
    with recording(named(arch)) as launches:
        y = w.matmul(x)
    assert y.shape == (*x.shape[:-1], w.shape[0])
    return [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100", "gfx1151", "gfx1201", "sm_80", "sm_90"])
def test_regimes(arch: str, rows: int) -> None:
    """Matrix units where there are rows enough for them; in the formats that are for the vector units alone, those."""
    assert kernels(arch, meta(rows, 128), weight()) == ["matvec_kernel" if rows == 1 else "skinny_kernel"]
    if rows <= 8:
        assert kernels(arch, meta(rows, 128), weight(bits=3)) == ["matvec_kernel"]
        assert kernels(arch, meta(rows, 128), weight(mode="mxfp4")) == ["matvec_kernel"]
        assert kernels(arch, meta(rows, 128, dtype=torch.float32), weight()) == ["matvec_kernel"]


def test_batches_and_swiglu() -> None:
    with recording(named("gfx1100")) as launches:
        assert weight().swiglu(meta(2, 2, 128)).shape == (2, 2, 32)
        assert weight().matmul(meta(2, 1, 128), bias=meta(64), residual=meta(2, 1, 64)).shape == (2, 1, 64)
        assert weight().rows(torch.empty(3, 5, dtype=torch.int64, device="meta")).shape == (3, 5, 128)
        w = weight().to_mlx()
        assert quantized_matmul(meta(1, 128), *w, group_size=64, bits=4).shape == (1, 64)
    assert [launch.kernel.__name__ for launch in launches] == ["matvec_kernel"] * 2 + ["rows_kernel", "matvec_kernel"]
    assert launches[0].constants["swiglu"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x: last dimension 64 does not match the 128 columns of w \(x \(1, 64\)\)"):
        packed_matmul(meta(1, 64), packed())
    with pytest.raises(ValueError, match=r"x: must be one of .*, got torch.int8"):
        packed_swiglu(meta(1, 128, dtype=torch.int8), packed())
    with pytest.raises(ValueError, match=r"bias: must be torch.bfloat16 \(64,\), got torch.bfloat16 \(1, 64\)"):
        packed_matmul(meta(1, 128), packed(), bias=meta(1, 64))
    with pytest.raises(ValueError, match=r"residual: must be torch.bfloat16 \(1, 64\), got torch.float32 \(1, 64\)"):
        packed_matmul(meta(1, 128), packed(), residual=meta(1, 64, dtype=torch.float32))
    stack = Packed(*(x[None] if isinstance(x, Tensor) else x for x in vars(packed()).values()))
    with pytest.raises(ValueError, match=r"w: must be one matrix, got a stack of words \(1, 64, 16\)"):
        packed_matmul(meta(1, 128), stack)
    with pytest.raises(ValueError, match="as many rows of gate as of up, got 63"):
        packed_swiglu(meta(1, 128), packed(n=63))
    with pytest.raises(ValueError, match=r"indices: must be integers, got torch.float32"):
        packed_rows(meta(3, dtype=torch.float32), packed(), torch.bfloat16)


def test_half_a_unit() -> None:
    """Rows of nvfp4 may end in the middle of the 32 codes that most kernels read at a time."""
    w, scales = quantize(torch.randn(8, 48), 16, 4, "nvfp4")
    dense = dequantize(w, scales, None, 16, 4, "nvfp4", dtype=torch.float32).to(DEVICE)
    half = Packed.of(w.to(DEVICE), scales.to(DEVICE), None, 16, 4, "nvfp4")
    x = torch.randn(3, 48, device=DEVICE)
    y = x.double() @ dense.double().T
    assert (packed_matmul(x, half) - y).abs().max() <= 1e-6 * (x.abs() @ dense.abs().T).max()
    gate, up = y.chunk(2, -1)
    assert torch.allclose(packed_swiglu(x, half).double(), torch.nn.functional.silu(gate) * up, atol=1e-4)
    found = packed_rows(torch.tensor([[7, 0], [-1, 99]], device=DEVICE), half, torch.float32)
    assert torch.equal(found, dense[torch.tensor([[7, 0], [0, 7]])])


def test_any_strides() -> None:
    w, scales, biases = (t.to(DEVICE) for t in quantize(torch.randn(24, 64)))
    matrix = Packed.of(w, scales, biases, 64, 4)
    x, bias, residual = (torch.randn(*shape, device=DEVICE) for shape in ((64, 3), (24, 2), (24, 3)))
    plain = packed_matmul(x.T.contiguous(), matrix, bias=bias[:, 1].contiguous(), residual=residual.T.contiguous())
    assert torch.equal(packed_matmul(x.T, matrix, bias=bias[:, 1], residual=residual.T), plain)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_cpu_adds_what_it_is_given(bits: int) -> None:
    w = PackedWeight.from_mlx(
        *quantize(torch.randn(64, 128).bfloat16(), 64, bits), Quantization.resolve(64, bits), torch.bfloat16
    )
    x, bias, residual = torch.randn(2, 128).bfloat16(), torch.randn(64).bfloat16(), torch.randn(2, 64).bfloat16()
    y = w.matmul(x)
    assert torch.equal(w.matmul(x, bias=bias, residual=residual), residual + (y + bias))
    gate, up = y.float().chunk(2, -1)
    assert torch.equal(w.swiglu(x), (torch.nn.functional.silu(gate) * up).bfloat16())
