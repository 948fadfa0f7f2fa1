"""What the attention kernels share: how keys and values are read, and the walk of the running softmax.

A store is a tuple: pointers to numbers or codes and to pairs of scale and bias, then strides of slot, key and head as
`store.strides` gives them. `places` says where in it keys are.
"""

import triton
import triton.language as tl

from gfxlm.kernels.attention.places import locate, page_at

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc):
    if _INTERPRETED:  # where bf16 is its bits to a product
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _load_pairs(p_pairs, o_pairs, m_pairs, dtype: tl.constexpr):
    """Scales and biases as fp32, from words of two half-precision numbers or from two fp32 numbers."""
    if dtype == tl.float32:
        b_scales = tl.load(p_pairs + 2 * o_pairs, mask=m_pairs, other=0.0)
        return b_scales, tl.load(p_pairs + 2 * o_pairs + 1, mask=m_pairs, other=0.0)
    else:
        words = tl.load(p_pairs + o_pairs, mask=m_pairs, other=0)
        if dtype == tl.bfloat16:
            return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
        else:
            b_scales = (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return b_scales, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_tile(
    store, pages, slot, i_head, start, last, begin,
    half: tl.constexpr, dtype: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, columns: tl.constexpr,
    bits: tl.constexpr, group_size: tl.constexpr, page_size: tl.constexpr, in_one: tl.constexpr,
    masked: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, WIDTH) of the keys from `start` on: of each one's numbers or bytes those from `begin` on.

    Zeros beyond all the columns and, if `masked`, from the key `last` on. Bytes of two codes give the lower or upper
    `half` of them.
    """
    first, o_rows = locate(store, pages, slot, i_head, start, last, page_size, in_one, BLOCK_N)
    m_rows = start + tl.arange(0, BLOCK_N) < last
    o_c = begin + tl.arange(0, WIDTH)
    unit: tl.constexpr = 1 if bits == 16 else columns
    p_tile = store[0] + first * unit + (o_rows * unit)[:, None] + o_c[None, :]
    if masked:
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & (o_c < columns)[None, :], other=0)
    elif columns % WIDTH != 0:
        b_tile = tl.load(p_tile, mask=(o_c < columns)[None, :], other=0)
    else:
        b_tile = tl.load(p_tile)
    if bits == 16:
        return b_tile
    else:
        size: tl.constexpr = min(group_size, WIDTH)
        groups: tl.constexpr = D // group_size
        o_group = (begin + half * columns + size * tl.arange(0, WIDTH // size)) // group_size
        m_pairs = (o_group < groups)[None, :]
        if masked:
            m_pairs = m_rows[:, None] & m_pairs
        o_pairs = first * groups + (o_rows * groups)[:, None] + o_group[None, :]
        b_scales, b_biases = _load_pairs(store[1], o_pairs, m_pairs, dtype)
        if bits == 4:
            b_tile = b_tile >> 4 if half == 1 else b_tile & 15
        # 1 + code / 2**bits: a code put into a float's mantissa, where converting it runs at a fraction of the rate.
        b_tile = ((b_tile.to(tl.int32) << (23 - bits)) | 0x3F800000).to(tl.float32, bitcast=True)
        b_scales = b_scales * (1 << bits)
        b_tile = tl.reshape(b_tile, [BLOCK_N, WIDTH // size, size])
        b_tile = b_tile * b_scales[:, :, None] + (b_biases - b_scales)[:, :, None]
        return tl.reshape(b_tile, [BLOCK_N, WIDTH]).to(dtype)


@triton.jit
def _soften(b_scores, b_max, b_sum, factor: tl.constexpr, added: tl.constexpr):
    """One step of the running softmax: weights, maximum, sum, and by what all that was summed before shrinks.

    Scores times `factor`, which is positive, are logarithms to base 2. Scores that a mask was added to keep its units,
    in which the finite minimum is a score. The running maximum starts there: -inf hides a key and gives no NaN.
    """
    if added:
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp2((b_scores - b_new[:, None]) * factor)
        b_decay = tl.exp2((b_max - b_new) * factor)
    else:
        b_new = tl.maximum(b_max, tl.max(b_scores, 1) * factor)
        b_weights = tl.exp2(b_scores * factor - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
    return b_weights, b_new, b_sum * b_decay + tl.sum(b_weights, 1), b_decay


@triton.jit
def walk(
    query,
    state,
    keys,
    values,
    pages,
    mask,
    slot,
    i_head,
    first,
    last,
    o_position,
    scale: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    causal: tl.constexpr,
    ends: tl.constexpr,
    window: tl.constexpr,
    mask_kind: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    page_size: tl.constexpr,
    hiding: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys first ... last - 1 for rows at their positions.

    query is a tuple of tiles (BLOCK_M, BLOCK_D), or, with a CHUNK of it at a time, (pointers to rows, their bounds).
    state is (maximum, sum, accumulator, and another). There are two halves, of query and accumulator, where a byte
    holds two codes. mask is (pointer, offset of each row, their bounds, stride of keys). If `causal`, rows see keys up
    to their positions, and as far back as a window reaches; `ends`: not from `last` on, whatever else they would see.
    Without `hiding` the keys are whole tiles, of which every row sees every key.
    """
    b_max, b_sum, b_acc, b_upper = state
    dtype: tl.constexpr = query[0].dtype if CHUNK >= BLOCK_D else query[0].dtype.element_ty
    added: tl.constexpr = mask_kind == "added"
    halves: tl.constexpr = 2 if bits == 4 else 1
    WIDTH: tl.constexpr = BLOCK_D // halves
    WIDTH_V: tl.constexpr = BLOCK_DV // halves
    columns: tl.constexpr = WIDTH if bits == 4 else D
    columns_v: tl.constexpr = WIDTH_V if bits == 4 else DV
    # Tiles begin at multiples of their size, but for those of a window.
    in_one: tl.constexpr = page_size == 0 or (page_size % BLOCK_N == 0 and window == 0)
    paged: tl.constexpr = in_one and page_size > 0
    place = slot
    if paged:
        place = page_at(pages, slot, first, last, page_size)
    for start in range(first, last, BLOCK_N):
        if paged:  # a tile ahead, or the loads of keys would wait for it
            following = page_at(pages, slot, start + BLOCK_N, last, page_size)
        b_scores = tl.zeros([b_max.shape[0], BLOCK_N], tl.float32)
        if CHUNK >= BLOCK_D:
            for half in tl.static_range(halves):
                b_k = _load_tile(
                    keys, pages, place, i_head, start, last, 0, half,
                    dtype, D, WIDTH, columns, bits, group_size, page_size, in_one, hiding, BLOCK_N,
                )  # fmt: skip
                b_scores = _dot(query[half], tl.trans(b_k), b_scores)
        else:
            # Where registers cannot hold the whole query beside the rest, it is read again from the cache nearby.
            for begin in tl.range(0, WIDTH, CHUNK // halves, loop_unroll_factor=1, disable_licm=True):
                for half in tl.static_range(halves):
                    o_d = begin + half * WIDTH + tl.arange(0, CHUNK // halves)
                    b_q = tl.load(query[0] + o_d[None, :], mask=query[1][:, None] & (o_d < D)[None, :], other=0.0)
                    b_k = _load_tile(
                        keys, pages, place, i_head, start, last, begin, half,
                        dtype, D, CHUNK // halves, columns, bits, group_size, page_size, in_one, hiding, BLOCK_N,
                    )  # fmt: skip
                    b_scores = _dot(b_q, tl.trans(b_k), b_scores)
        if hiding:
            o_key = start + tl.arange(0, BLOCK_N)
            m_seen = (o_key < last)[None, :]
            if causal:
                # How far back a key lies is one comparison: a negative distance is a large unsigned one.
                o_back = (o_position[:, None] - o_key[None, :]).to(tl.uint32, bitcast=True)
                m_back = o_back < (window if window > 0 else 1 << 31)
                m_seen = m_seen & m_back if ends else m_back
            if mask_kind != "none":
                p_mask = mask[0] + mask[1][:, None] + o_key[None, :].to(tl.int64) * mask[3]
                b_mask = tl.load(p_mask, mask=mask[2][:, None] & (o_key < last)[None, :], other=0)
                if added:
                    b_scores = b_scores * scale + b_mask.to(tl.float32)
                else:
                    m_seen = m_seen & (b_mask != 0)
            b_scores = tl.where(m_seen, b_scores, float("-inf"))
        factor: tl.constexpr = 1.4426950408889634 * (1.0 if added else scale)
        b_weights, b_max, b_sum, b_decay = _soften(b_scores, b_max, b_sum, factor, added)
        b_weights = b_weights.to(dtype)
        b_v = _load_tile(
            values, pages, place, i_head, start, last, 0, 0,
            dtype, DV, WIDTH_V, columns_v, bits, group_size, page_size, in_one, hiding, BLOCK_N,
        )  # fmt: skip
        b_acc = _dot(b_weights, b_v, b_acc * b_decay[:, None])
        if bits == 4:
            b_v = _load_tile(
                values, pages, place, i_head, start, last, 0, 1,
                dtype, DV, WIDTH_V, columns_v, bits, group_size, page_size, in_one, hiding, BLOCK_N,
            )  # fmt: skip
            b_upper = _dot(b_weights, b_v, b_upper * b_decay[:, None])
        if paged:
            place = following
    return b_max, b_sum, b_acc, b_upper


@triton.jit
def load_query(p_rows, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, bits: tl.constexpr):
    """The query as `walk` takes it, from pointers to its rows (BLOCK_M, 1)."""
    if CHUNK < BLOCK_D:
        return p_rows, m_rows
    elif bits == 4:
        o_d = tl.arange(0, BLOCK_D // 2)
        b_lower = tl.load(p_rows + o_d[None, :], mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
        o_d += BLOCK_D // 2
        return b_lower, tl.load(p_rows + o_d[None, :], mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
    else:
        o_d = tl.arange(0, BLOCK_D)
        return (tl.load(p_rows + o_d[None, :], mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0),)


@triton.jit
def begin(p_sinks, o_head, m_head, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, unit: tl.constexpr, sinks: tl.constexpr):
    """The state before the first key: nothing, or the sink of each row's head as a key without a value.

    `unit` turns a sink into the scores' units: log2(e), or 1 where a mask is added.
    """
    b_max = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks:
        b_sink = tl.load(p_sinks + o_head, mask=m_head, other=float("-inf")).to(tl.float32)
        b_sum = tl.where(b_sink == float("-inf"), 0.0, 1.0)
        b_max = tl.maximum(b_max, b_sink * unit)
    b_acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    return b_max, b_sum, b_acc, b_acc


@triton.jit
def gated(b_out, p_gate, o_gate, m_gate):
    """b_out * sigmoid(gate)."""
    b_gate = tl.load(p_gate + o_gate, mask=m_gate, other=0.0).to(tl.float32)
    return b_out / (1.0 + tl.exp2(b_gate * -1.4426950408889634))
