"""Two gathered matrix-vector products: the rows of the experts that each token has chosen.

The first writes the activations of a token's experts side by side, TOP_K * INNER of them and then the shared expert's.
To the second they are a single long row, of which every lane takes units of 32 with the expert and the score that they
belong to: one sum gives routing, shared expert and residual.
"""

import triton
import triton.language as tl

from gfxlm.kernels.early import after_the_last, before_the_next
from gfxlm.kernels.linear.codes import load_unit
from gfxlm.kernels.linear.units import load_inputs, unit_products, unit_scales


@triton.jit
def _either(condition, p_true, p_false):
    """Pointers to one tensor or another, by lanes. As addresses: AMD's 32-bit offsets end with a tensor."""
    element: tl.constexpr = p_true.dtype.scalar
    return tl.where(condition, p_true.to(tl.int64), p_false.to(tl.int64)).to(element)


@triton.jit
def gate_up_kernel(
    p_x,  # (T, K)
    p_experts,  # int64 (T, TOP_K)
    p_words,  # int32 (E, 2 INNER, K * bits / 32)
    p_scales,  # (E, 2 INNER, K / group_size): `Packed.pairs`, or its scales
    p_biases,
    p_shared_words,  # int32 (2 SHARED, K * bits / 32), or None
    p_shared_scales,
    p_shared_biases,
    p_h,  # (T, TOP_K * INNER + SHARED)
    n_experts,
    stride_x,
    stride_expert,  # of the scales
    stride_row,
    stride_group,
    stride_shared_row,
    K: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    mode: tl.constexpr,
    layout: tl.constexpr,
    native: tl.constexpr,
    early: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """BLOCK_N of one expert's activations `silu(gate x) * (up x)` for one token."""
    n_units: tl.constexpr = K // 32
    blocks: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    t = tl.program_id(1).to(tl.int64)
    slot = tl.minimum(tl.program_id(0) // blocks, TOP_K)
    i_n = (tl.program_id(0) - slot * blocks) * BLOCK_N
    after_the_last(early)
    expert = tl.load(p_experts + t * TOP_K + slot, mask=slot < TOP_K, other=0)
    if (expert < 0) | (expert >= n_experts):
        return  # nobody reads these activations
    p_words += expert * (2 * INNER * n_units * bits)
    p_scales += expert * stride_expert
    if layout == "apart":
        p_biases += expert * stride_expert
    n_inner = INNER
    if SHARED:
        routed = slot < TOP_K
        p_words = _either(routed, p_words, p_shared_words)
        p_scales = _either(routed, p_scales, p_shared_scales)
        if layout == "apart":
            p_biases = _either(routed, p_biases, p_shared_biases)
        stride_row = tl.where(routed, stride_row, stride_shared_row)
        n_inner = tl.where(routed, INNER, SHARED)
    sums = ()
    for _ in tl.static_range(2 * BLOCK_N):
        sums = sums + (tl.zeros([1, BLOCK_U], tl.float32),)  # noqa: RUF005
    for start in range(0, n_units, BLOCK_U):
        # Units past the end are read again, not masked; their inputs are zeros.
        o_u = start + tl.arange(0, BLOCK_U)[None, :]
        m_u = o_u < n_units if n_units % BLOCK_U else None
        if n_units % BLOCK_U:
            o_u = tl.minimum(o_u, n_units - 1)
        inputs = load_inputs(p_x + t * stride_x, o_u * 32, m_u)
        added = ()
        for i in tl.static_range(2 * BLOCK_N):
            row = tl.minimum(i_n + i // 2, n_inner - 1) + i % 2 * n_inner
            p_row = tl.multiple_of(p_words + row * (n_units * bits), [4 * (bits & -bits)])
            words = load_unit(p_row, o_u * bits, None, bits)
            stored = unit_scales(p_scales, p_biases, row * stride_row, o_u * 32, stride_group, group_size, layout)
            products = unit_products(words, inputs, stored, bits, group_size, mode, layout, native)
            added = added + (sums[i] + products,)  # noqa: RUF005
        sums = added
    before_the_next(early)
    o_n = tl.arange(0, BLOCK_N)
    gate = tl.zeros([BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(BLOCK_N):
        gate = tl.where(o_n == i, tl.sum(sums[2 * i]), gate)
        up = tl.where(o_n == i, tl.sum(sums[2 * i + 1]), up)
    h = gate * tl.sigmoid(gate) * up
    p_out = p_h + t * (TOP_K * INNER + SHARED) + slot * INNER + i_n
    tl.store(p_out + o_n, h.to(p_h.dtype.element_ty), mask=i_n + o_n < n_inner)


@triton.jit
def down_kernel(
    p_h,  # (T, TOP_K * INNER + SHARED)
    p_experts,  # int64 (T, TOP_K)
    p_scores,  # fp32 (T, TOP_K)
    p_words,  # int32 (E, D, INNER * bits / 32)
    p_scales,  # (E, D, INNER / group_size)
    p_biases,
    p_shared_words,  # int32 (D, SHARED * bits / 32), or None
    p_shared_scales,
    p_shared_biases,
    p_logits,  # (T, 1) of the shared expert's gate, or None
    p_residual,  # (T, D), or None
    p_y,  # (T, D)
    n_experts,
    stride_expert,  # of the scales
    stride_row,
    stride_group,
    stride_shared_row,
    stride_logits,
    stride_residual,
    D: tl.constexpr,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    mode: tl.constexpr,
    layout: tl.constexpr,
    native: tl.constexpr,
    early: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """BLOCK_N outputs of one token."""
    n_units: tl.constexpr = INNER // 32
    shared_units: tl.constexpr = SHARED // 32
    routed_units: tl.constexpr = TOP_K * n_units
    t = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(0) * BLOCK_N
    after_the_last(early)
    sums = ()
    for _ in tl.static_range(BLOCK_N):
        sums = sums + (tl.zeros([1, BLOCK_U], tl.float32),)  # noqa: RUF005
    for start in range(0, routed_units + shared_units, BLOCK_U):
        o_u = start + tl.arange(0, BLOCK_U)[None, :]
        slot = o_u // n_units
        unit = o_u % n_units
        expert = tl.load(p_experts + t * TOP_K + slot, mask=slot < TOP_K, other=-1)
        m_u = (expert >= 0) & (expert < n_experts)
        expert = tl.where(m_u, expert, 0)  # read, not used
        score = tl.load(p_scores + t * TOP_K + slot, mask=m_u, other=0.0)
        p_unit = p_words + expert * (D * n_units * bits)
        p_scale, p_bias = p_scales + expert * stride_expert, p_biases
        if layout == "apart":
            p_bias += expert * stride_expert
        row_words, row_scales = n_units * bits, stride_row
        if SHARED:
            m_shared = (o_u >= routed_units) & (o_u < routed_units + shared_units)
            m_u |= m_shared
            unit = tl.where(m_shared, o_u - routed_units, unit)
            score = tl.where(m_shared, tl.sigmoid(tl.load(p_logits + t * stride_logits).to(tl.float32)), score)
            p_unit = _either(m_shared, p_shared_words, p_unit)
            p_scale = _either(m_shared, p_shared_scales, p_scale)
            if layout == "apart":
                p_bias = _either(m_shared, p_shared_biases, p_bias)
            if SHARED != INNER:
                row_words = tl.where(m_shared, shared_units * bits, row_words)
            row_scales = tl.where(m_shared, stride_shared_row, stride_row)
        inputs = load_inputs(p_h + t * (TOP_K * INNER + SHARED), o_u * 32, m_u)
        added = ()
        for i in tl.static_range(BLOCK_N):
            row = tl.minimum(i_n + i, D - 1)
            p_row = tl.multiple_of(p_unit + row * row_words, [4 * (bits & -bits), 4 * (bits & -bits)])
            words = load_unit(p_row, unit * bits, None, bits)
            stored = unit_scales(p_scale, p_bias, row * row_scales, unit * 32, stride_group, group_size, layout)
            products = unit_products(words, inputs, stored, bits, group_size, mode, layout, native)
            added = added + (sums[i] + tl.where(m_u, products * score, 0.0),)  # noqa: RUF005
        sums = added
    before_the_next(early)
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n + o_n < D
    y = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(BLOCK_N):
        y = tl.where(o_n == i, tl.sum(sums[i]), y)
    if p_residual is not None:
        y += tl.load(p_residual + t * stride_residual + i_n + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + t * D + i_n + o_n, y.to(p_y.dtype.element_ty), mask=m_n)
