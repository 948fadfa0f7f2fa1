"""PyTorch's packed int4 matrix product on the CPU, as a home for MLX's affine codes of any width.

PyTorch reads a weight as `scale * (nibble - 8) + zero`. Codes of up to 4 bits are one plane of nibbles; wider ones are
two, the low nibbles and the high ones, whose products add up. Rows are packed in blocks: for every column, a byte holds
a row of the block's lower half in its low nibble and one of the upper half in its high nibble.
Only the bfloat16 kernel is vectorised, so only bfloat16 weights live here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gfxlm.ops.matrix import dense_matmul

# Above this many rows, expanding the weight once and multiplying densely is faster.
_DENSE_ROWS = 384
_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """An affine matrix (N, K), or a stack of them (E, N, K), as one or two planes of nibbles, the low one first."""

    planes: tuple[Tensor, ...]  # uint8 (..., padded N, K / 2)
    scales_and_zeros: tuple[Tensor, ...]  # bfloat16 (..., K / group_size, padded N, 2), one a plane
    biases: Tensor  # bfloat16 (..., padded N, K / group_size): MLX's own, which the zeros only approximate
    rows: int  # N; the tensors hold zero rows up to the next whole block
    group_size: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        return self.biases.nbytes + sum(t.nbytes for t in (*self.planes, *self.scales_and_zeros))

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, (N, K) or (E, N, K)."""
        *stack, _, half = self.planes[0].shape
        return (*stack, self.rows, half * 2)

    def matrix(self, index: int) -> "Int4Weight":
        """One matrix of a stack, as views."""
        return Int4Weight(
            tuple(plane[index] for plane in self.planes),
            tuple(pair[index] for pair in self.scales_and_zeros),
            self.biases[index],
            self.rows,
            self.group_size,
            self.bits,
        )


@cache
def _block_rows() -> int:
    """Rows in a block of the packed layout on this CPU, 0 where the layout is not the one described above."""
    for rows in {"AVX512": (64,), "AVX2": (32,)}.get(torch.backends.cpu.get_cpu_capability(), ()):
        codes = (torch.arange(128 * 32).reshape(128, 32).mul(7) >> 3).bitwise_and(15).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        if torch.equal(_unpack(packed, rows), codes):
            return rows
    return 0


def int4_applies(group_size: int, dtype: torch.dtype) -> bool:
    """True where this CPU's int4 kernel can hold an affine matrix and is fast."""
    return dtype == torch.bfloat16 and group_size in _GROUP_SIZES and _block_rows() > 0


def int4_nbytes(rows: int, columns: int, group_size: int, bits: int) -> int:
    """Bytes of a packed matrix: its planes, for each of them a scale and a zero a group, and the biases."""
    planes = 1 if bits <= 4 else 2
    padded = rows + -rows % _block_rows()
    return padded * (planes * columns // 2 + (4 * planes + 2) * columns // group_size)


def int4_pack(codes: Tensor, scales: Tensor, biases: Tensor, group_size: int, bits: int) -> Int4Weight:
    """Pack codes uint8 (..., N, K) of `bits` bits with bfloat16 scales and biases (..., N, K / group_size)."""
    rows = codes.shape[-2]
    if missing := -rows % _block_rows():
        codes, scales, biases = (F.pad(t, (0, 0, 0, missing)) for t in (codes, scales, biases))
    shift = _centring_shift(bits)
    top = codes if bits <= 4 else codes >> 4
    nibbles = (*(() if bits <= 4 else (codes & 15,)), top + shift if shift else top)
    steps = (scales,) if bits <= 4 else (scales, 16 * scales)
    # The top plane carries the offset: the codes are centred, so what is rounded to bfloat16 here is small.
    offset = biases.float() + (1 << (bits - 1)) * scales.float()
    offsets = (offset,) if bits <= 4 else (torch.zeros_like(offset), offset + 8 * scales.float())
    return Int4Weight(
        tuple(_pack(plane, _block_rows()) for plane in nibbles),
        tuple(torch.stack((s.mT, z.to(s.dtype).mT), -1).contiguous() for s, z in zip(steps, offsets, strict=True)),
        biases.contiguous(),
        rows,
        group_size,
        bits,
    )


def int4_stacked(weights: Iterable[Int4Weight], count: int) -> Int4Weight:
    """So many matrices of one shape as a stack. What is made one at a time is never there as a whole beside it."""
    stack: Int4Weight | None = None
    for number, weight in enumerate(weights):
        if stack is None:
            planes, pairs = (tuple(_room(t, count) for t in ts) for ts in (weight.planes, weight.scales_and_zeros))
            stack = replace(weight, planes=planes, scales_and_zeros=pairs, biases=_room(weight.biases, count))
        there = (*stack.planes, *stack.scales_and_zeros, stack.biases)
        for whole, part in zip(there, (*weight.planes, *weight.scales_and_zeros, weight.biases), strict=True):
            whole[number] = part
    assert stack is not None
    return stack


def _room(tensor: Tensor, count: int) -> Tensor:
    return tensor.new_empty(count, *tensor.shape)


def _centring_shift(bits: int) -> int:
    """What is added to the top plane's nibbles, so that the middle of the codes meets the 8 that PyTorch subtracts."""
    return 8 - (1 << (bits - 1 if bits <= 4 else bits - 5))


def _pack(codes: Tensor, block: int) -> Tensor:
    """Nibbles uint8 (..., N, K) to (..., N, K / 2): what PyTorch makes of them, in a tenth of the time."""
    *stack, rows, columns = codes.shape
    low, high = codes.reshape(*stack, rows // block, 2, block // 2, columns).unbind(-3)
    both = (high << 4).bitwise_or_(low)  # (..., N / block, block / 2, K)
    packed = torch.empty(*both.shape[:-2], columns, block // 2, dtype=torch.uint8, device=codes.device)
    for lane in range(block // 2):
        packed[..., lane] = both[..., lane, :]
    return packed.view(*stack, rows, columns // 2)


def _unpack(packed: Tensor, block: int) -> Tensor:
    """The nibbles: uint8 (..., N, K / 2) to (..., N, K)."""
    lanes = packed.reshape(*packed.shape[:-2], -1, packed.shape[-1] * 2, block // 2)  # (..., N / block, K, block / 2)
    blocks = torch.cat((lanes & 15, lanes >> 4), dim=-1).mT  # (..., N / block, block, K)
    return blocks.flatten(-3, -2).contiguous()


def _join(nibbles: list[Tensor], bits: int) -> Tensor:
    """The codes that were split into planes of nibbles, in place."""
    top = nibbles[-1].sub_(_centring_shift(bits))
    return top if len(nibbles) == 1 else (top << 4).bitwise_or_(nibbles[0])


def int4_codes(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor]:
    """What was packed: codes uint8 (..., N, K), scales and biases (..., N, K / group_size)."""
    codes = _join([_unpack(plane, _block_rows()) for plane in weight.planes], weight.bits)
    padded = (codes, weight.scales_and_zeros[0][..., 0].mT, weight.biases)
    codes, scales, biases = (t[..., : weight.rows, :].contiguous() for t in padded)
    return codes, scales, biases


def int4_rows(weight: Int4Weight, rows: Tensor) -> Tensor:
    """Dequantised rows of one matrix, bfloat16 (*rows.shape, K): an embedding look-up."""
    half = _block_rows() // 2
    block, lane = rows // (2 * half), rows % (2 * half)
    high = (lane >= half)[..., None]

    def nibbles(plane: Tensor) -> Tensor:
        pairs = plane.view(-1, weight.shape[-1], half)[block, :, lane % half]  # (*rows.shape, K)
        return torch.where(high, pairs >> 4, pairs & 15)

    codes = _join([nibbles(plane) for plane in weight.planes], weight.bits).unflatten(-1, (-1, weight.group_size))
    scales = weight.scales_and_zeros[0][:, rows, 0].movedim(0, -1)
    return torch.addcmul(weight.biases[rows][..., None], codes, scales[..., None]).flatten(-2)


def int4_dense(weight: Int4Weight) -> Tensor:
    """One matrix dequantised and transposed, bfloat16 (K, N): the order in which the packed layout is read fastest."""
    n, columns, block = weight.biases.shape[0], weight.shape[1], _block_rows()

    def nibbles(plane: Tensor) -> Tensor:
        lanes = plane.view(n // block, columns, block // 2).transpose(0, 1)
        out = torch.empty(columns, n // block, block, dtype=torch.uint8)
        torch.bitwise_and(lanes, 15, out=out[..., : block // 2])
        torch.bitwise_right_shift(lanes, 4, out=out[..., block // 2 :])
        return out

    codes = _join([nibbles(plane) for plane in weight.planes], weight.bits).view(-1, weight.group_size, n)
    scales, biases = weight.scales_and_zeros[0][..., 0], weight.biases.mT
    return torch.addcmul(biases[:, None], codes, scales[:, None]).view(columns, n)[:, : weight.rows]


def int4_matmul(x: Tensor, weight: Int4Weight) -> Tensor:
    """`x @ w.T` for one matrix: bfloat16 (..., K) to (..., N)."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] > _DENSE_ROWS:
        out = dense_matmul(flat, int4_dense(weight).mT)
    else:
        out = _plane_matmul(flat.contiguous(), weight, 0)
        if len(weight.planes) == 2:
            out += _plane_matmul(flat.contiguous(), weight, 1)
    return out[:, : weight.rows].view(*x.shape[:-1], weight.rows)


def _plane_matmul(x: Tensor, weight: Int4Weight, plane: int) -> Tensor:
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, weight.planes[plane], weight.group_size, weight.scales_and_zeros[plane]
    )
    return product
