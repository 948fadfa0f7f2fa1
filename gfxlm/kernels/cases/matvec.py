"""Products with few rows, and rows looked up, at the sizes that models have."""

from dataclasses import replace
from functools import partial

import torch

from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.linear.matvec import matvec
from gfxlm.kernels.linear.rows import rows
from gfxlm.kernels.linear.skinny import skinny
from gfxlm.kernels.packed import Packed

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
_Format = tuple[int, int, str]  # bits, group size, mode
_AFFINE4: _Format = (4, 64, "affine")
# qkv, o, gate and up, down, head of Qwen3-8B; qkvz and ba of Qwen3-Coder-Next, its router, qkv of Qwen3-30B-A3B.
_SHAPES = (
    (6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096), (12352, 2048), (512, 2048), (5120, 2048),
)  # fmt: skip
_HEADLINES = ((4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096))
_HEADLINE_PRODUCTS = {
    *(("matvec", 1, shape) for shape in _HEADLINES),
    ("skinny", 8, (4096, 4096)),
}
_FORMATS: tuple[_Format, ...] = (
    (2, 64, "affine"), (3, 64, "affine"), (4, 32, "affine"), (4, 128, "affine"), (5, 64, "affine"), (6, 64, "affine"),
    (8, 64, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8"),
)  # fmt: skip
_PRODUCTS = {"matvec": matvec, "skinny": skinny} | {
    "matvec_swiglu": partial(matvec, swiglu=True),
    "skinny_swiglu": partial(skinny, swiglu=True),
}


def cases() -> list[Case]:
    """Every shape in the commonest format, every format and type at one shape, and ragged ones."""
    found = [_product("matvec", 1, shape, _AFFINE4, BF16) for shape in _SHAPES]
    found += [_product("matvec", m, (4096, 4096), _AFFINE4, BF16) for m in (2, 4)]
    found += [_product("matvec", 1, (4096, 4096), kind, BF16) for kind in _FORMATS]
    found += [_product("matvec", 1, (4096, 4096), _AFFINE4, dtype) for dtype in (F16, F32)]
    found += [_product("matvec_swiglu", 1, shape, _AFFINE4, BF16) for shape in ((24576, 4096), (1024, 2048))]
    # Not held to a share of their bytes' time: three rows, and a third of the last step is past the end.
    ragged = [_product("matvec", 3, (1001, 2080), kind, F16) for kind in ((4, 32, "affine"), (3, 32, "affine"))]
    found += [replace(case, nbytes=0) for case in ragged]
    found += [_product("skinny", m, shape, _AFFINE4, BF16) for m in (1, 8, 16, 32) for shape in _HEADLINES]
    found += [_product("skinny", 16, (4096, 4096), kind, F16) for kind in ((2, 64, "affine"), (4, 32, "affine"))]
    found += [_product("skinny", 16, (4096, 4096), (8, 64, "affine"), dtype) for dtype in (BF16, F16)]
    found += [_product("skinny_swiglu", m, (24576, 4096), _AFFINE4, BF16) for m in (1, 16)]
    found.append(_product("skinny", 5, (1001, 2080), (4, 32, "affine"), BF16))
    found += [_rows(count, (151936, 4096), kind) for count in (1, 2048) for kind in (_AFFINE4, (6, 64, "affine"))]
    return found


def _product(op: str, m: int, shape: tuple[int, int], kind: _Format, dtype: torch.dtype) -> Case:
    bits, group_size, mode = kind
    n, k = shape
    name = f"{op}/{n}x{k}/{_name(kind)}/{str(dtype).removeprefix('torch.')}/m{m}"
    nbytes = n * k * bits // 8 + n * k // group_size * _scale_bytes(mode, dtype)
    headline = kind == _AFFINE4 and dtype == BF16 and (op, m, shape) in _HEADLINE_PRODUCTS
    return Case(name, partial(_call, op, m, shape, kind, dtype), nbytes, 2 * m * n * k, headline)


def _name(kind: _Format) -> str:
    bits, group_size, mode = kind
    return f"affine{bits}g{group_size}" if mode == "affine" else mode


def _scale_bytes(mode: str, dtype: torch.dtype) -> int:
    return 2 * dtype.itemsize if mode == "affine" else 1


def _call(op: str, m: int, shape: tuple[int, int], kind: _Format, dtype: torch.dtype, device: torch.device) -> Call:
    x = torch.randn(m, shape[1], dtype=dtype, device=device)
    return partial(_PRODUCTS[op], x, _packed(shape, kind, dtype, device))


def _packed(shape: tuple[int, int], kind: _Format, dtype: torch.dtype, device: torch.device) -> Packed:
    """Random codes; scales about 1, and biases beside them where there are any."""
    (n, k), (bits, group_size, mode) = shape, kind
    words = torch.randint(-(2**31), 2**31 - 1, (n, k * bits // 32), dtype=torch.int32, device=device)
    if mode == "affine":
        scales, biases = torch.randn(n, k // group_size, 2, dtype=dtype, device=device).unbind(-1)
        return Packed(words, scales, biases, group_size, bits, mode)
    one = 56 if mode == "nvfp4" else 127
    scales = torch.full((n, k // group_size), one, dtype=torch.uint8, device=device)
    return Packed(words, scales, None, group_size, bits, mode)


def _rows(count: int, shape: tuple[int, int], kind: _Format) -> Case:
    name = f"rows/{shape[0]}x{shape[1]}/{_name(kind)}/{count}"
    nbytes = count * shape[1] * (kind[0] + 32 // kind[1] + 16) // 8
    return Case(name, partial(_look_up, count, shape, kind), nbytes)


def _look_up(count: int, shape: tuple[int, int], kind: _Format, device: torch.device) -> Call:
    indices = torch.randint(0, shape[0], (count,), device=device)
    return partial(rows, indices, _packed(shape, kind, BF16, device), BF16)
