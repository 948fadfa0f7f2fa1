"""MLX's quantised operations: quantize, dequantize, quantized_matmul, gather_mm, gather_qmm."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from gfxlm.kernels.packed import Packed
from gfxlm.ops._common import check_devices, on_gpu
from gfxlm.ops.formats import Quantization, pack_codes, unpack_codes
from gfxlm.ops.matrix import Matrix, MatrixStack
from gfxlm.ops.packed import KERNEL_TYPES, packed_gather, packed_matmul

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E2M1_MAX, _E4M3_MAX = 6.0, 448.0


def quantize(
    w: Tensor,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    *,
    global_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Quantise groups of `group_size` neighbours along the last axis, with MLX's own algorithm.

    `w` is (..., K) floating, ndim >= 2. Returns `(w_q, scales, biases)` for affine, `(w_q, scales)` otherwise:
    w_q uint32 (..., K * bits / 32); scales and biases (..., K / group_size), in w's dtype for affine, uint8 otherwise.
    `global_scale`, nvfp4 only, is the float32 maximum that the group scales are relative to.
    """
    q = Quantization.resolve(group_size, bits, mode)
    if not w.is_floating_point():
        raise ValueError(f"w: only floating types can be quantised, got {w.dtype}")
    if w.ndim < 2 or w.shape[-1] == 0 or w.shape[-1] % q.group_size:
        raise ValueError(
            f"w: needs 2 dimensions or more and a last one divisible by {q.group_size}, got {tuple(w.shape)}"
        )
    _check_global_scale(q, global_scale, w)
    groups = w.unflatten(-1, (-1, q.group_size))  # (..., G, group_size)
    if q.affine:
        codes, scales, biases = _affine_codes(groups.float(), q.bits)
        return pack_codes(codes.flatten(-2), q.bits), scales.to(w.dtype), biases.to(w.dtype)
    codes, scales = _float_codes(groups, q, global_scale)
    return pack_codes(codes.flatten(-2), q.bits), scales


def _affine_codes(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., G, group_size), scale and bias (..., G).

    The larger edge and zero come out exact; with one bit, both edges do.
    """
    n_bins = (1 << bits) - 1
    low, high = groups.amin(-1), groups.amax(-1)
    scale, bias = ((high - low) / n_bins).clamp(min=1e-7), low
    if bits > 1:
        from_low = low.abs() > high.abs()
        scale = torch.where(from_low, scale, -scale)
        edge = torch.where(from_low, low, high)
        steps = torch.round(edge / scale)
        exact = steps != 0
        scale = torch.where(exact, edge / steps, scale)
        bias = torch.where(exact, edge, 0.0)
    codes = torch.round((groups - bias[..., None]) / scale[..., None]).clamp(0, n_bins)
    return codes.to(torch.uint8), scale, bias


def _float_codes(groups: Tensor, q: Quantization, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """E2M1 or E4M3 codes (..., G, group_size) and their uint8 scales (..., G). Rounds where MLX does: in w's dtype."""
    scale = groups.abs().amax(-1) / torch.tensor(_E2M1_MAX if q.bits == 4 else _E4M3_MAX, dtype=groups.dtype)
    if q.mode == "nvfp4":
        encode = torch.ones(()) if global_scale is None else _E4M3_MAX * _E2M1_MAX / global_scale.float()
        stored = _to_e4m3(scale * encode)
        scaled = groups / stored.to(groups.dtype)[..., None] * encode
        # A group too small for E4M3 has scale 0: nothing is near its quotients, and its codes are 0.
        scaled = torch.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)
        scales = stored.view(torch.uint8)
    else:
        exponent = torch.where(scale == 0, 0.0, torch.ceil(torch.log2(scale.float())))
        scaled = groups / torch.exp2(exponent)[..., None]
        scales = (exponent.int() + 127).clamp(0, 255).to(torch.uint8)
    if q.bits == 8:
        return _to_e4m3(scaled).view(torch.uint8), scales
    return _nearest_e2m1(scaled), scales


def _nearest_e2m1(x: Tensor) -> Tensor:
    """The code of the nearest E2M1 value; where two are equally near, the one nearer to zero, as in MLX."""
    magnitude = x.float().abs().contiguous()  # torch warns of any other
    code = torch.bucketize(magnitude, torch.tensor(_E2M1_MIDDLES, device=x.device), out_int32=True)
    return (code | ((x < 0) & (code > 0)) << 3).to(torch.uint8)


def _to_e4m3(x: Tensor) -> Tensor:
    """Round to E4M3, saturating: torch's own conversion turns what is out of range into NaN."""
    return x.float().clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(
    w: Tensor,
    scales: Tensor,
    biases: Tensor | None = None,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The matrix that the codes stand for: uint32 (..., K * bits / 32) to (..., K).

    Rounded once. `dtype` defaults to the scales' for affine, bfloat16 otherwise.
    """
    q = Quantization.resolve(group_size, bits, mode)
    scales = _check_triple(w, scales, biases, q)
    _check_global_scale(q, global_scale, w)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: must be floating, got {dtype}")
    codes = unpack_codes(w, q.bits).unflatten(-1, (-1, q.group_size))  # (..., G, group_size)
    if q.affine:
        assert biases is not None
        out_dtype = dtype or scales.dtype
        return torch.addcmul(biases.float()[..., None], codes, scales.float()[..., None]).flatten(-2).to(out_dtype)
    values = _code_values(codes, q) * decode_scales(scales, q)[..., None]
    if global_scale is not None:
        values = values * _align(global_scale.float() / (_E4M3_MAX * _E2M1_MAX), values)
    return values.flatten(-2).to(dtype or torch.bfloat16)


def _align(per_matrix: Tensor, values: Tensor) -> Tensor:
    """Append axes until a scalar, or one number a matrix, broadcasts over the values."""
    return per_matrix.reshape(per_matrix.shape + (1,) * (values.ndim - per_matrix.ndim))


def _code_values(codes: Tensor, q: Quantization) -> Tensor:
    if q.bits == 8:
        return codes.view(torch.float8_e4m3fn).float()
    return torch.tensor(_E2M1, device=codes.device)[codes.int()]


def decode_scales(scales: Tensor, q: Quantization) -> Tensor:
    """The float32 value of uint8 group scales: E4M3 for nvfp4, otherwise the power of two `2 ** (s - 127)`."""
    if q.mode == "nvfp4":
        return scales.view(torch.float8_e4m3fn).float()
    # The exponent field of a float32; s = 0 stands for 2**-127, a subnormal.
    return torch.where(scales == 0, 1 << 22, scales.int() << 23).view(torch.float32)


def quantized_matmul(
    x: Tensor,
    w: Tensor | Matrix,
    scales: Tensor | None = None,
    biases: Tensor | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
) -> Tensor:
    """`x @ w.T` (or `x @ w`) with a quantised `w`.

    x (..., M, K); w packed (..., N, K * bits / 32), or (..., K, N * bits / 32) with `transpose=False`; batch axes
    broadcast. Result (..., M, N) in the type x, scales and biases promote to (affine), or x's.
    A `PackedWeight` in the place of `w` knows its own scales and format, and is multiplied transposed.
    """
    if not isinstance(w, Tensor):
        return w.matmul(x)
    q = Quantization.resolve(group_size, bits, mode)
    scales = _check_triple(w, scales, biases, q)
    check_devices("quantized_matmul", x=x, w=w)
    dtype = _result_dtype(x, scales, biases, q)
    inner = w.shape[-1] * 32 // q.bits if transpose else w.shape[-2]
    if x.shape[-1:] != (inner,):
        raise ValueError(
            f"x: last dimension {x.shape[-1] if x.ndim else 0} does not match the {inner} of w "
            f"(x {tuple(x.shape)}, w {tuple(w.shape)}, bits {q.bits}, transpose {transpose})"
        )
    if transpose and w.ndim == 2 and x.dtype == dtype and on_gpu(x) and dtype in KERNEL_TYPES:
        return packed_matmul(x, Packed.of(w, scales, biases, q.group_size, q.bits, q.mode))
    if any(1 != m != n != 1 for m, n in zip(x.shape[-3::-1], w.shape[-3::-1], strict=False)):
        raise ValueError(f"x: batch axes do not broadcast against those of w (x {tuple(x.shape)}, w {tuple(w.shape)})")
    matrix = dequantize(w, scales, biases, q.group_size, q.bits, q.mode, dtype=dtype)
    return x.to(dtype) @ (matrix.mT if transpose else matrix)


def gather_mm(
    a: Tensor,
    b: Tensor,
    lhs_indices: Tensor | None = None,
    rhs_indices: Tensor | None = None,
    *,
    sorted_indices: bool = False,
) -> Tensor:
    """Products of matrices picked by index: `a[lhs_indices] @ b[rhs_indices]`.

    a (..., M, K) and b (..., K, N); indices are flat over their batch axes and broadcast against each other; result
    (*indices, M, N). Raises IndexError for an index out of range. `sorted_indices` is a hint that is not needed here.
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a, b: inner dimensions differ: {tuple(a.shape)} and {tuple(b.shape)}")
    check_devices("gather_mm", a=a, b=b, lhs_indices=lhs_indices, rhs_indices=rhs_indices)
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, stack = a.to(dtype), b.to(dtype).reshape(-1, *b.shape[-2:])
    return _gather(a, b.shape[:-2], b.shape[-1], lhs_indices, rhs_indices, lambda rows, e: rows @ stack[e])


def gather_qmm(
    x: Tensor,
    w: Tensor | MatrixStack,
    scales: Tensor | None = None,
    biases: Tensor | None = None,
    lhs_indices: Tensor | None = None,
    rhs_indices: Tensor | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: Tensor | None = None,
    *,
    sorted_indices: bool = False,
) -> Tensor:
    """`gather_mm` with a quantised right side, of which only the matrices that are asked for are dequantised.

    x (..., M, K); w packed (..., N, K * bits / 32), or (..., K, N * bits / 32) with `transpose=False`; result
    (*indices, M, N). Raises IndexError for an index out of range; on a GPU, where kernels read the indices, its rows
    are zero. A stacked `PackedWeight` in the place of `w` knows its own scales and format, and is transposed.
    """
    if not isinstance(w, Tensor):
        experts, rows, _ = w.shape
        if on_gpu(x) and x.dtype in KERNEL_TYPES and (packed := getattr(w, "packed", None)) is not None:
            return packed_gather(
                x.reshape(-1, *x.shape[-2:]), packed, *_index_pair(x, (experts,), lhs_indices, rhs_indices)
            )
        return _gather(x, (experts,), rows, lhs_indices, rhs_indices, lambda a, e: w.matrix(e).matmul(a))
    q = Quantization.resolve(group_size, bits, mode)
    scales = _check_triple(w, scales, biases, q)
    _check_global_scale(q, global_scale, w)
    check_devices("gather_qmm", x=x, w=w, lhs_indices=lhs_indices, rhs_indices=rhs_indices)
    dtype = _result_dtype(x, scales, biases, q)
    columns = w.shape[-1] * 32 // q.bits
    inner, outer = (columns, w.shape[-2]) if transpose else (w.shape[-2], columns)
    if x.ndim < 2 or x.shape[-1] != inner:
        raise ValueError(f"x: must be (..., M, {inner}) for w {tuple(w.shape)}, got {tuple(x.shape)}")
    flat_w = w.reshape(-1, *w.shape[-2:])
    flat_scales = scales.reshape(-1, *scales.shape[-2:])
    flat_biases = None if biases is None else biases.reshape(-1, *biases.shape[-2:])
    flat_global = None if global_scale is None else global_scale.expand(w.shape[:-2]).reshape(-1)
    if transpose and global_scale is None and on_gpu(x) and dtype in KERNEL_TYPES:
        packed = Packed.of(flat_w, flat_scales, flat_biases, q.group_size, q.bits, q.mode)
        indices = _index_pair(x, w.shape[:-2], lhs_indices, rhs_indices)
        return packed_gather(x.to(dtype).reshape(-1, *x.shape[-2:]), packed, *indices)

    def multiply(rows: Tensor, e: int) -> Tensor:
        matrix = dequantize(
            flat_w[e],
            flat_scales[e],
            None if flat_biases is None else flat_biases[e],
            q.group_size,
            q.bits,
            q.mode,
            None if flat_global is None else flat_global[e],
            dtype,
        )
        return rows @ (matrix.mT if transpose else matrix)

    return _gather(x.to(dtype), w.shape[:-2], outer, lhs_indices, rhs_indices, multiply)


def _gather(
    a: Tensor,
    stack: Sequence[int],
    columns: int,
    lhs_indices: Tensor | None,
    rhs_indices: Tensor | None,
    multiply: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Visit every matrix of the right side that is asked for once, and multiply all the rows of a that ask for it.

    `stack` is the right side's batch axes, and `multiply` is a product with its matrix of a flat number.
    """
    lhs, rhs = _index_pair(a, stack, lhs_indices, rhs_indices)
    for side, indices, batch in (("lhs", lhs, a.shape[:-2]), ("rhs", rhs, stack)):
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < prod(batch)):
            raise IndexError(
                f"{side}_indices: values must lie in [0, {prod(batch)}), the batch axes are {tuple(batch)}"
            )
    flat_a = a.reshape(-1, *a.shape[-2:])
    wanted, chosen = rhs.flatten(), lhs.flatten()
    out = torch.empty(wanted.numel(), a.shape[-2], columns, dtype=a.dtype, device=a.device)
    for e in wanted.unique().tolist():
        rows = (wanted == e).nonzero().squeeze(-1)
        out[rows] = multiply(flat_a[chosen[rows]], e)
    return out.reshape(*rhs.shape, a.shape[-2], columns)


def _index_pair(x: Tensor, stack: Sequence[int], lhs: Tensor | None, rhs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flat indices of both sides in one shape, without a look at their values."""
    pair = []
    for side, indices, batch in (("lhs", lhs, x.shape[:-2]), ("rhs", rhs, stack)):
        if indices is None:
            indices = torch.arange(prod(batch), device=x.device).reshape(tuple(batch))
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"{side}_indices: must be integers, got {indices.dtype}")
        pair.append(indices.long())
    first, second = pair
    if any(1 != m != n != 1 for m, n in zip(first.shape[::-1], second.shape[::-1], strict=False)):
        raise ValueError(
            f"lhs_indices, rhs_indices: {tuple(first.shape)} and {tuple(second.shape)} do not broadcast against each "
            "other; those that are not given count the batch axes"
        )
    first, second = torch.broadcast_tensors(first, second)
    return first, second


def _result_dtype(x: Tensor, scales: Tensor, biases: Tensor | None, q: Quantization) -> torch.dtype:
    if not x.is_floating_point():
        raise ValueError(f"x: must be floating, got {x.dtype}")
    if not q.affine:
        return x.dtype
    assert biases is not None
    return torch.promote_types(x.dtype, torch.promote_types(scales.dtype, biases.dtype))


def _check_triple(w: Tensor, scales: Tensor | None, biases: Tensor | None, q: Quantization) -> Tensor:
    """The scales, if w, scales and biases fit each other and the format."""
    if scales is None:
        raise ValueError("scales: a packed w needs them")
    if w.dtype != torch.uint32:
        raise ValueError(f"w: must be packed uint32, got {w.dtype}")
    if q.affine != (biases is not None):
        raise ValueError(f"biases: mode {q.mode!r} {'needs them' if q.affine else 'has none'}")
    if biases is not None and biases.shape != scales.shape:
        raise ValueError(f"biases: shape {tuple(biases.shape)} differs from the scales' {tuple(scales.shape)}")
    if biases is not None and not (scales.is_floating_point() and biases.is_floating_point()):
        raise ValueError(f"scales, biases: must be floating, got {scales.dtype} and {biases.dtype}")
    if not q.affine and scales.dtype != torch.uint8:
        raise ValueError(f"scales: mode {q.mode!r} stores them as uint8, got {scales.dtype}")
    if w.ndim < 2 or w.shape[:-1] != scales.shape[:-1] or w.shape[-1] * 32 != scales.shape[-1] * q.group_size * q.bits:
        raise ValueError(
            f"scales: shape {tuple(scales.shape)} does not match w {tuple(w.shape)} "
            f"with group_size {q.group_size} and bits {q.bits}"
        )
    check_devices("a packed w", w=w, scales=scales, biases=biases)
    return scales


def _check_global_scale(q: Quantization, global_scale: Tensor | None, w: Tensor) -> None:
    if global_scale is None:
        return
    if q.mode != "nvfp4":
        raise ValueError(f"global_scale: only mode 'nvfp4' has one, not {q.mode!r}")
    if global_scale.numel() != 1 and global_scale.shape != w.shape[:-2]:
        raise ValueError(f"global_scale: must be one number, or {tuple(w.shape[:-2])}, got {tuple(global_scale.shape)}")
    check_devices("a packed w", w=w, global_scale=global_scale)
