"""Spans of a quantised matrix and their inputs as operands of matrix units, without a number moving between lanes.

Tensors are loaded along one axis, from the fastest on: four lanes of a quad, eight rows, C splits of K, blocks of
eight rows. Triton deals such an axis out to lanes, warps and registers in that order, as NVIDIA's operands have it.
"""

import triton
import triton.language as tl

from gfxlm.kernels.inline import exact_code


@triton.jit
def span_inputs(x, columns: tl.constexpr, splits: tl.constexpr, codes: tl.constexpr, bits: tl.constexpr):
    """Inputs (codes / 8 * columns * C * 4, 8), as operands (C, K, columns), a tuple of one for each plane of codes."""
    planes: tl.constexpr = 16 // bits
    halves: tl.constexpr = codes // planes  # what a lane has of a row of w, in units of 16 bits
    x = tl.permute(tl.reshape(x, [codes // 8, columns // 8, splits, 8, 4, 8]), (1, 2, 3, 4, 0, 5))
    x = tl.permute(tl.reshape(x, [columns // 8, splits, 8, 4, halves // 2, 2, planes]), (1, 4, 3, 5, 0, 2, 6))
    return _deal(tl.reshape(x, [splits, 4 * halves, columns, planes]))


@triton.jit
def _deal(x):
    """The last of four axes as a tuple."""
    n: tl.constexpr = x.shape[3] // 2
    if n == 1:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], n, 2]))
        evens, odds = _deal(even), _deal(odd)
        dealt = ()
        for i in tl.static_range(n):
            dealt = dealt + (evens[i], odds[i])  # noqa: RUF005
        return dealt


@triton.jit
def _plane(
    words, rows: tl.constexpr, shift: tl.constexpr, mask: tl.constexpr, dtype: tl.constexpr, native: tl.constexpr
):
    """A plane of the codes of int16 (rows * C * 4, halves), as an operand (C, rows, K) in `span_inputs`' order."""
    halves: tl.constexpr = words.shape[1]
    splits: tl.constexpr = words.shape[0] // (rows * 4)
    plane = tl.reshape(exact_code(words, shift, mask, dtype, native), [rows // 8, splits, 8, 4, halves // 2, 2])
    return tl.reshape(tl.permute(plane, (1, 0, 2, 4, 3, 5)), [splits, rows, 4 * halves])


@triton.jit
def span_dot(
    words, inputs, rows: tl.constexpr, shift: tl.constexpr, mask: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr,
    native: tl.constexpr,
):  # fmt: skip
    """The planes' products, added up: (C, rows, columns)."""
    acc = tl.dot(_plane(words, rows, shift, mask, dtype, native), inputs[0])
    for i in tl.static_range(1, len(inputs)):
        acc = tl.dot(_plane(words, rows, shift + i * bits, mask, dtype, native), inputs[i], acc)
    return acc


@triton.jit
def span_sums(inputs):
    """Sums of the inputs, in each of 16 rows: (C, 16, columns)."""
    ones = tl.full([inputs[0].shape[0], 16, inputs[0].shape[1]], 1.0, inputs[0].dtype)
    acc = tl.dot(ones, inputs[0])
    for i in tl.static_range(1, len(inputs)):
        acc = tl.dot(ones, inputs[i], acc)
    return acc


@triton.jit
def axis_row(o_axis, SPLITS: tl.constexpr):
    """The row that an index of the one axis is in."""
    return o_axis // (32 * SPLITS) * 8 + o_axis // 4 % 8


@triton.jit
def spread_scales(x, rows: tl.constexpr, BLOCKS: tl.constexpr):
    """(rows * C * 4,) as the accumulator has its rows and columns, of which a lane has pairs: (C, rows, BLOCKS * 8)."""
    splits: tl.constexpr = x.shape[0] // (rows * 4)
    x = tl.reshape(tl.permute(tl.reshape(x, [rows // 8, splits, 8, 4]), (1, 0, 2, 3)), [splits, rows, 1, 4, 1])
    return tl.reshape(tl.broadcast_to(x, [splits, rows, BLOCKS, 4, 2]), [splits, rows, BLOCKS * 8])


@triton.jit
def repeat_rows(x, TILES: tl.constexpr):
    """(C, 16, columns) repeated: (C, TILES * 16, columns)."""
    if TILES == 1:
        return x
    else:
        columns: tl.constexpr = x.shape[2]
        return tl.reshape(
            tl.broadcast_to(x[:, None], [x.shape[0], TILES, 16, columns]), [x.shape[0], TILES * 16, columns]
        )
