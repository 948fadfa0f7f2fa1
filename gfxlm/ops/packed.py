"""What is done on a GPU with a quantised matrix: products, and looking up its rows."""

from collections.abc import Callable

import torch
from torch import Tensor

from gfxlm.kernels.packed import Packed
from gfxlm.ops.activation import swiglu

KERNEL_TYPES = (torch.bfloat16, torch.float16, torch.float32)  # of x


def packed_matmul(x: Tensor, packed: Packed, *, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`x @ w.T + bias + residual` on a GPU, in fp32 and rounded once where a kernel does it all.

    x (..., K) of a type in KERNEL_TYPES, bias (N,), residual and the result (..., N), all of x's type.
    """
    _check_matrix(packed)
    _check_product(x, packed)
    shape = (*x.shape[:-1], packed.rows)
    for name, given, wanted in (("bias", bias, shape[-1:]), ("residual", residual, shape)):
        if given is not None and (given.shape != wanted or given.dtype != x.dtype):
            raise ValueError(f"{name}: must be {x.dtype} {wanted}, got {given.dtype} {tuple(given.shape)}")
    flat = x.reshape(-1, packed.columns)
    bias = None if bias is None else bias.contiguous()
    flat_residual = None if residual is None else residual.reshape(-1, packed.rows)
    from gfxlm.kernels.linear.wide import wide

    kernel = _for_few_rows(flat, packed) or wide
    return kernel(flat, packed, bias=bias, residual=flat_residual).view(shape)


def packed_swiglu(x: Tensor, packed: Packed) -> Tensor:
    """`silu(gate) * up` on a GPU, the first N / 2 rows of w giving gate and the rest up: (..., K) to (..., N / 2)."""
    _check_matrix(packed)
    _check_product(x, packed)
    if packed.rows % 2:
        raise ValueError(f"w: needs as many rows of gate as of up, got {packed.rows}")
    flat = x.reshape(-1, packed.columns)
    kernel = _for_few_rows(flat, packed)
    y = swiglu(*packed_matmul(flat, packed).chunk(2, dim=-1)) if kernel is None else kernel(flat, packed, swiglu=True)
    return y.view(*x.shape[:-1], packed.rows // 2)


def packed_rows(indices: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """Rows of w on a GPU, (*indices.shape, K). An index outside of [0, N) gives the nearest row."""
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices: must be integers, got {indices.dtype}")
    _check_matrix(packed)
    flat = indices.reshape(-1)
    if packed.whole_units:
        from gfxlm.kernels.linear.rows import rows

        found = rows(flat, packed, dtype)
    else:
        from gfxlm.kernels.linear.dequantize import dequantize

        found = dequantize(packed.at(flat.long().clamp(0, packed.rows - 1)), dtype)
    return found.view(*indices.shape, packed.columns)


def packed_gather(x: Tensor, packed: Packed, lhs: Tensor, rhs: Tensor) -> Tensor:
    """Products of x[lhs] and w[rhs].T on a GPU: x (B, M, K), w a stack (E, N, K), lhs and rhs of one shape.

    Returns (*lhs.shape, M, N). Nobody reads an index back: the products of one that is out of range are zero.
    """
    _check_product(x, packed)
    from gfxlm.kernels.moe.grouped import grouped_matmul

    there = (lhs >= 0) & (lhs < x.shape[0])
    rows = x[torch.where(there, lhs, 0).flatten()]  # (n, M, K)
    matrices = torch.where(there, rhs, -1).flatten().repeat_interleave(x.shape[1])
    y = grouped_matmul(rows.flatten(0, 1), matrices[:, None], packed)
    return y.view(*lhs.shape, x.shape[1], packed.rows)


def _for_few_rows(x: Tensor, packed: Packed) -> Callable[..., Tensor] | None:
    """The kernel for so few rows x (M, K), on the vector units or the matrix units; None where `wide` is the one."""
    if not packed.whole_units:  # these two read units
        return None
    from gfxlm.kernels.linear.matvec import matvec
    from gfxlm.kernels.linear.skinny import skinny, skinny_takes
    from gfxlm.kernels.tuning import config

    facts = {"n": packed.rows, "k": packed.columns, "bits": packed.bits, "skinny": skinny_takes(packed, x.dtype)}
    limits = config("linear", x.device, **facts)
    if x.shape[0] <= limits["matvec_rows"]:
        return matvec
    return skinny if x.shape[0] <= limits["skinny_rows"] else None


def _check_matrix(packed: Packed) -> None:
    if packed.words.ndim != 2:
        raise ValueError(f"w: must be one matrix, got a stack of words {tuple(packed.words.shape)}")


def _check_product(x: Tensor, packed: Packed) -> None:
    if x.dtype not in KERNEL_TYPES:
        raise ValueError(f"x: must be one of {', '.join(map(str, KERNEL_TYPES))}, got {x.dtype}")
    if x.shape[-1] != packed.columns:
        raise ValueError(
            f"x: last dimension {x.shape[-1]} does not match the {packed.columns} columns of w (x {tuple(x.shape)})"
        )
