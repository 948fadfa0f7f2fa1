"""Norm, rope and the write into a cache, against the same on plain tensors."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gfxlm.kernels.attention.angles import angles
from gfxlm.kernels.attention.store import Quantized, row_bytes
from gfxlm.kernels.attention.write import write
from gfxlm.ops import rms_norm, rope_angles, rotate
from gfxlm.ops.kv import read, write_rows
from gfxlm.ops.quantized import dequantize, quantize
from tests.kernels.attention.oracle import DEVICE, table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POSITIONS, SLOTS = torch.tensor([3, 0, 7, 100, 5, 12]), torch.tensor([1, 0, 2, 1, -1, 0])


def ulps(dtype: torch.dtype) -> float:
    """A bound on one rounding, as a share of the number."""
    eps = torch.finfo(dtype).eps
    return eps if DEVICE == "cpu" and dtype == torch.bfloat16 else eps / 2  # the interpreter cuts, a GPU rounds


def assert_turned(out: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, traditional: bool) -> None:
    """Within the roundings that there are: after the norm, after its weight, and of the result."""
    exact = x.double() if weight is None else rms_norm(x.double(), weight.double(), 1e-6)
    roundings = 1 if weight is None else 3
    turned = rotate(exact, cos.double(), sin.double(), traditional=traditional)
    size = rotate(exact.abs(), cos.abs().double(), -sin.abs().double(), traditional=traditional)
    size = torch.maximum(size, rotate(exact.abs(), cos.abs().double(), sin.abs().double(), traditional=traditional))
    assert ((out.double() - turned).abs() <= 1.05 * roundings * ulps(out.dtype) * size + 2e-6).all()


@dataclass(frozen=True)
class Shape:
    size: int
    rotary: int
    traditional: bool = False
    gated: bool = False
    normed: bool = True
    page: int = 0


SHAPES = [
    Shape(64, 64),
    Shape(80, 32, gated=True),
    Shape(96, 96, traditional=True, page=16),
    Shape(128, 128, normed=False),
    Shape(256, 64, traditional=True, gated=True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(shape: Shape, dtype: torch.dtype) -> None:
    size = shape.size
    widths = [5 * size * (1 + shape.gated), 2 * size, 2 * size]
    q, k, v = torch.randn(6, sum(widths)).to(dtype).to(DEVICE).split(widths, -1)
    q, k, v = q.unflatten(-1, (5, -1))[..., :size], k.unflatten(-1, (2, -1)), v.unflatten(-1, (2, -1))
    weights = tuple(torch.randn(2, size).to(dtype).to(DEVICE).unbind()) if shape.normed else None
    pages = table(3, -(-101 // shape.page)) if shape.page else None
    places = (3, 101) if pages is None else (pages.numel(), shape.page)
    keys, values = (torch.full((*places, 2, size), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    cos, sin = (x.to(DEVICE) for x in rope_angles(POSITIONS, shape.rotary, base=1e4))
    out = write(
        q, k, v, keys, values, POSITIONS.to(DEVICE), SLOTS.to(DEVICE),
        weights=weights, eps=1e-6, angles=(cos, sin), traditional=shape.traditional, pages=pages,
    )  # fmt: skip
    assert out is not None
    cos, sin = cos[:, None], sin[:, None]
    assert_turned(out, q, weights and weights[0], cos, sin, shape.traditional)
    at: tuple[Tensor, Tensor] = (SLOTS[SLOTS >= 0].to(DEVICE), POSITIONS[SLOTS >= 0].to(DEVICE))
    if pages is not None:
        at = (pages[at[0], at[1] // shape.page].long(), at[1] % shape.page)
    kept = SLOTS >= 0
    assert_turned(keys[at], k[kept], weights and weights[1], cos[kept], sin[kept], shape.traditional)
    assert torch.equal(values[at], v[kept])
    for cache in (keys, values):
        cache[at] = torch.nan
        assert cache.isnan().all()  # nothing was written elsewhere


@pytest.mark.parametrize(("size", "bits", "group_size"), [(128, 8, 64), (64, 4, 32), (96, 4, 32), (256, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_are_those_of_quantize(size: int, bits: int, group_size: int, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 6, 3, size).mul(3).to(dtype)
    v[0], v[1], v[2] = 0, 3.3, -1e-6 * torch.rand(3, size)  # all equal, or nearly
    v[3] = v[3].abs() + 100
    keys, values = (
        Quantized(
            torch.zeros(3, 101, 3, row_bytes(size, bits), dtype=torch.uint8, device=DEVICE),
            torch.zeros(3, 101, 3, size // group_size, 2, dtype=dtype, device=DEVICE),
            bits,
            group_size,
        )
        for _ in range(2)
    )
    assert write(None, k.to(DEVICE), v.to(DEVICE), keys, values, POSITIONS.to(DEVICE), SLOTS.to(DEVICE)) is None
    kept = SLOTS >= 0
    for store, rows in ((keys, k), (values, v)):
        expected = Quantized(
            torch.zeros_like(store.codes).cpu(), torch.zeros_like(store.scales).cpu(), bits, group_size
        )
        write_rows(expected, rows[kept], POSITIONS[kept], SLOTS[kept], None)
        assert torch.equal(store.codes.cpu(), expected.codes)
        assert torch.equal(store.scales.cpu(), expected.scales)
        for row, position, slot in zip(rows[kept], POSITIONS[kept].tolist(), SLOTS[kept].tolist(), strict=True):
            assert torch.equal(
                read(expected, slot, position, position + 1)[0],
                dequantize(*quantize(row, group_size, bits), group_size, bits),
            )


def test_many_rows_in_one_program() -> None:
    n = 700
    q, k, v = (torch.randn(n, heads, 64, device=DEVICE) for heads in (2, 1, 1))
    keys, values = torch.full((2, 1, n, 1, 64), torch.nan, device=DEVICE)
    positions, slots = torch.arange(n, device=DEVICE), torch.zeros(n, dtype=torch.int64, device=DEVICE)
    cos, sin = rope_angles(positions, 64, base=1e4)
    out = write(q, k, v, keys, values, positions, slots, angles=(cos, sin))
    assert out is not None
    assert_turned(out, q, None, cos[:, None], sin[:, None], False)
    assert_turned(keys[0], k, None, cos[:, None], sin[:, None], False)
    assert torch.equal(values[0], v)


def test_nothing() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    rows, cache = torch.empty(0, 2, 64, device=DEVICE), torch.empty(1, 8, 2, 64, device=DEVICE)
    out = write(rows, rows, rows, cache, cache, none, none)
    assert out is not None
    assert out.shape == (0, 2, 64)


@pytest.mark.parametrize("n", [0, 1, 70])
def test_angles(n: int) -> None:
    positions, freqs = torch.arange(n) * 1001, 1e4 ** (torch.arange(0, 48, 2) / 48)
    pair = angles(positions.to(DEVICE), freqs.to(DEVICE), 0.5, 1.25)
    for ours, exact in zip(pair, rope_angles(positions, 48, freqs=freqs, scale=0.5), strict=True):
        # An ulp of the angle, whose product may be rounded otherwise, and two of the function.
        bound = 1.25 * (positions[:, None] * 0.5 / freqs * 1.2e-7 + 2.4e-7)
        assert ((ours.cpu() - 1.25 * exact).abs() <= bound).all()
