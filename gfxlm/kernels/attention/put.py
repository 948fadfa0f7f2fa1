"""Rows of a cache as they are stored: numbers, or MLX's affine codes of them."""

import triton
import triton.language as tl


@triton.jit
def _round(x):
    """To the nearest integer, of two the even one."""
    magic: tl.constexpr = 8388608.0  # 2**23, from where on floats are integers
    near = (tl.abs(x) + magic) - magic
    return tl.where(tl.abs(x) < magic, tl.where(x < 0, -near, near), x)


@triton.jit
def put(
    p_store, p_scales, o_store, m_rows, b_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, bits: tl.constexpr, group_size: tl.constexpr,
):  # fmt: skip
    """Store rows (BLOCK_R, BLOCK_D) as numbers or as MLX's affine codes of them, at o_store in units of `strides`."""
    if bits == 16:
        o_d = tl.arange(0, BLOCK_D)
        m = m_rows[:, None] & (o_d < D)[None, :]
        tl.store(p_store + o_store[:, None] + o_d[None, :], b_rows, mask=m)
    else:
        rows: tl.constexpr = b_rows.shape[0]
        groups: tl.constexpr = BLOCK_D // group_size
        bins: tl.constexpr = (1 << bits) - 1
        b_x = tl.reshape(b_rows.to(tl.float32), [rows, groups, group_size])
        low, high = tl.min(b_x, 2), tl.max(b_x, 2)
        scale = tl.maximum(tl.div_rn(high - low, tl.full(low.shape, bins, tl.float32)), 1e-7)
        from_low = tl.abs(low) > tl.abs(high)
        scale = tl.where(from_low, scale, -scale)
        edge = tl.where(from_low, low, high)
        steps = _round(tl.div_rn(edge, scale))
        scale = tl.where(steps != 0, tl.div_rn(edge, tl.where(steps != 0, steps, 1.0)), scale)
        bias = tl.where(steps != 0, edge, 0.0)
        b_codes = _round(tl.div_rn(b_x - bias[:, :, None], tl.broadcast_to(scale[:, :, None], b_x.shape)))
        b_codes = tl.minimum(tl.maximum(b_codes, 0.0), bins).to(tl.int32)
        columns: tl.constexpr = BLOCK_D // 2 if bits == 4 else D
        if bits == 4:
            first, second = tl.split(tl.permute(tl.reshape(b_codes, [rows, 2, BLOCK_D // 2]), [0, 2, 1]))
            b_codes = first | second << 4
        else:
            b_codes = tl.reshape(b_codes, [rows, BLOCK_D])
        o_c, o_g = tl.arange(0, BLOCK_D * bits // 8), tl.arange(0, groups)
        m = m_rows[:, None] & (o_c < columns)[None, :]
        tl.store(p_store + (o_store * columns)[:, None] + o_c[None, :], b_codes.to(tl.uint8), mask=m)
        p_pair = p_scales + 2 * ((o_store * (D // group_size))[:, None] + o_g[None, :])
        m = m_rows[:, None] & (o_g < D // group_size)[None, :]
        tl.store(p_pair, scale.to(p_scales.dtype.element_ty), mask=m)
        tl.store(p_pair + 1, bias.to(p_scales.dtype.element_ty), mask=m)
