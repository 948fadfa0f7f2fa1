"""Products of many rows with quantised matrices, and writing such matrices out."""

from functools import partial

import torch

from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.linear.dequantize import dequantize
from gfxlm.kernels.linear.wide import wide
from gfxlm.kernels.packed import Packed

BF16 = torch.bfloat16
AFFINE4 = (64, 4, "affine")
FORMATS = [
    (128, 2, "affine"),
    (64, 3, "affine"),
    (32, 4, "affine"),
    (64, 5, "affine"),
    (64, 6, "affine"),
    (64, 8, "affine"),
    (32, 4, "mxfp4"),
    (32, 8, "mxfp8"),
    (16, 4, "nvfp4"),
]
# Qwen3-8B: qkv, o, gate and up, down, the output layer; Qwen3-Coder-Next: qkvz, o, the shared expert.
SHAPES = [
    (6144, 4096),
    (4096, 4096),
    (24576, 4096),
    (4096, 12288),
    (151936, 4096),
    (12288, 2048),
    (2048, 4096),
    (1024, 2048),
    (2048, 512),
]


def cases() -> list[Case]:
    """The linear layers of Qwen3-8B and Qwen3-Coder-Next over 24 to 2048 rows; every format; odd sizes."""
    found = []
    for n, k in SHAPES:
        for m in (128, 512, 2048):
            headline = (n, k) == (24576, 4096)
            found.append(_wide(f"{n}x{k}/affine4/m{m}", m, n, k, AFFINE4, BF16, headline=headline))
    for fmt in FORMATS:
        name = _name(fmt)
        found += [_wide(f"4096x4096/{name}/m{m}", m, 4096, 4096, fmt, BF16) for m in (100, 300)]
        found.append(_dequantize(f"4096x4096/{name}", 4096, 4096, fmt))
    # Few rows, whose programs share K.
    for n, k in ((4096, 4096), (6144, 4096), (12288, 2048)):
        found += [_wide(f"{n}x{k}/affine4/m{m}", m, n, k, AFFINE4, BF16) for m in (24, 64)]
    found += [
        _wide("4096x12288/affine4/added/m24", 24, 4096, 12288, AFFINE4, BF16, added=True),
        _wide("1000x320/affine4/float16/added/m40", 40, 1000, 320, AFFINE4, torch.float16, added=True),
        _wide("4096x4096/mxfp4/m24", 24, 4096, 4096, (32, 4, "mxfp4"), BF16),
        _wide("24576x4096/affine4/float16/m256", 256, 24576, 4096, AFFINE4, torch.float16, headline=True),
        _wide("4096x4096/affine4/float32/m128", 128, 4096, 4096, AFFINE4, torch.float32),
        _wide("4096x4096/affine8/float16/m128", 128, 4096, 4096, (64, 8, "affine"), torch.float16),
        _wide("200x320/affine4/added/m77", 77, 200, 320, AFFINE4, BF16, added=True),
        _dequantize("24576x4096/affine4", 24576, 4096, AFFINE4, headline=True),
        _dequantize("200x320/affine4", 200, 320, AFFINE4),
    ]
    return found


def _name(fmt: tuple[int, int, str]) -> str:
    return f"{fmt[2]}{fmt[1]}" if fmt[2] == "affine" else fmt[2]


def packed(shape: tuple[int, ...], fmt: tuple[int, int, str], dtype: torch.dtype, device: torch.device) -> Packed:
    """Random codes (..., N, K), scales and biases as they lie on a GPU."""
    group_size, bits, mode = fmt
    *rows, columns = shape
    # 16-bit codes are drawn: torch draws no other type as fast, and they are words all the same.
    halves = torch.randint(-(1 << 15), 1 << 15, (*rows, columns * bits // 16), dtype=torch.int16, device=device)
    words, groups = halves.view(torch.int32), columns // group_size
    if mode != "affine":
        scales = torch.randint(100, 121, (*rows, groups), dtype=torch.uint8, device=device)
        return Packed(words, scales, None, group_size, bits, mode)
    scales, biases = ((torch.rand(*rows, groups, 2, device=device) - 0.5) * 0.02).to(dtype).unbind(-1)
    return Packed(words, scales, biases, group_size, bits, mode)


def packed_bytes(shape: tuple[int, ...], fmt: tuple[int, int, str], itemsize: int = 2) -> int:
    """Bytes of codes, scales and biases."""
    group_size, bits, mode = fmt
    numbers = 1
    for length in shape:
        numbers *= length
    return numbers * bits // 8 + numbers // group_size * (2 * itemsize if mode == "affine" else 1)


def _wide(
    name: str,
    m: int,
    n: int,
    k: int,
    fmt: tuple[int, int, str],
    dtype: torch.dtype,
    *,
    added: bool = False,
    headline: bool = False,
) -> Case:
    nbytes = packed_bytes((n, k), fmt, dtype.itemsize) + m * (n + k) * dtype.itemsize
    return Case(f"wide/{name}", partial(_call, m, n, k, fmt, dtype, added), nbytes, 2 * m * n * k, headline)


def _call(
    m: int, n: int, k: int, fmt: tuple[int, int, str], dtype: torch.dtype, added: bool, device: torch.device
) -> Call:
    weight = packed((n, k), fmt, dtype, device)
    x = torch.randn(m, k, dtype=dtype, device=device)
    bias = torch.randn(n, dtype=dtype, device=device) if added else None
    residual = torch.randn(m, n, dtype=dtype, device=device) if added else None
    return lambda: wide(x, weight, bias=bias, residual=residual)


def _dequantize(name: str, n: int, k: int, fmt: tuple[int, int, str], *, headline: bool = False) -> Case:
    def make(device: torch.device) -> Call:
        weight = packed((n, k), fmt, BF16, device)
        out = torch.empty(n, k, dtype=BF16, device=device)
        return lambda: dequantize(weight, BF16, out)

    return Case(f"dequantize/{name}", make, packed_bytes((n, k), fmt) + 2 * n * k, headline=headline)
