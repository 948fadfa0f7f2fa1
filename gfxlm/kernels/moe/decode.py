"""The experts' gated MLPs for a few tokens: two launches, no sorting, nothing asked of the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.device.arch import architecture
from gfxlm.kernels.inline import dot2_type
from gfxlm.kernels.launch import launch
from gfxlm.kernels.layout import adjacent
from gfxlm.kernels.linear.codes import scale_arguments
from gfxlm.kernels.moe.gathered import down_kernel, gate_up_kernel
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.sizes import cdiv, next_power_of_2
from gfxlm.kernels.tuning import config

UNIT = 32  # neighbouring columns, of which a lane owns all


@dataclass(frozen=True, slots=True)
class Shared:
    """An expert that every token passes: gate_up (2 J, D), down (D, J), and the logits (T, 1) of its sigmoid gate."""

    gate_up: Packed
    down: Packed
    logits: Tensor


def expert_mlp_decode(
    x: Tensor,
    experts: Tensor,
    scores: Tensor,
    gate_up: Packed,
    down: Packed,
    *,
    shared: Shared | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Every token's experts `down(silu(gate x) * up x)` times their scores, summed in fp32 and rounded once.

    x (T, D), experts integers and scores floating (T, k), gate_up (E, 2 I, D) with gate rows first, down (E, D, I); the
    shared expert's formats must be the experts' (`rides`). Returns (T, D) in x's type, `residual` (T, D) added.
    Columns are multiples of 32. An expert that does not exist contributes nothing.
    """
    tokens, columns = x.shape
    top_k, inner = experts.shape[1], down.columns
    shared_inner = shared.down.columns if shared else 0
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if tokens == 0:
        return y
    h = torch.empty(tokens, top_k * inner + shared_inner, dtype=x.dtype, device=x.device)
    x, experts, scores = adjacent(x), experts.long().contiguous(), scores.contiguous()
    n_experts = gate_up.words.shape[0]
    tile = _tile("moe_gate_up", x, gate_up, columns // UNIT)
    block_n = tile["block_n"]
    launch(
        gate_up_kernel,
        (top_k * cdiv(inner, block_n) + cdiv(shared_inner, block_n), tokens),
        x,
        experts,
        *_operands(gate_up),
        *_operands(shared.gate_up if shared else None),
        h,
        n_experts,
        x.stride(0),
        *_strides(gate_up, shared.gate_up if shared else None),
        K=columns,
        INNER=inner,
        SHARED=shared_inner,
        TOP_K=top_k,
        **_format(gate_up, x),
        BLOCK_N=block_n,
        BLOCK_U=tile["block_u"],
        options={"num_warps": tile["num_warps"]},
    )
    logits = shared.logits if shared else None
    residual = None if residual is None else adjacent(residual)
    tile = _tile("moe_down", x, down, (top_k * inner + shared_inner) // UNIT)
    launch(
        down_kernel,
        (cdiv(columns, tile["block_n"]), tokens),
        h,
        experts,
        scores,
        *_operands(down),
        *_operands(shared.down if shared else None),
        logits,
        residual,
        y,
        n_experts,
        *_strides(down, shared.down if shared else None),
        0 if logits is None else logits.stride(0),
        0 if residual is None else residual.stride(0),
        D=columns,
        INNER=inner,
        SHARED=shared_inner,
        TOP_K=top_k,
        **_format(down, x),
        BLOCK_N=tile["block_n"],
        BLOCK_U=tile["block_u"],
        options={"num_warps": tile["num_warps"]},
    )
    return y


def takes(gate_up: Packed, down: Packed) -> bool:
    """Whether rows are whole units, and units lie where the widest loads may read."""
    return gate_up.whole_units and down.whole_units


def rides(stack: Packed, shared: Packed) -> bool:
    """Whether a shared expert's matrix lies as those of a stack, so that one launch reads both."""
    return _layout(stack) == _layout(shared) and shared.whole_units


def _layout(packed: Packed) -> tuple[object, ...]:
    scales, _, layout = scale_arguments(packed)
    return packed.bits, packed.group_size, packed.mode, layout, scales.dtype, scales.stride(-1)


def _operands(packed: Packed | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if packed is None:
        return None, None, None
    scales, biases, _ = scale_arguments(packed)
    return packed.words.contiguous(), scales, biases


def _strides(stack: Packed, shared: Packed | None) -> tuple[int, int, int, int]:
    expert, row, group = scale_arguments(stack)[0].stride()
    return expert, row, group, 0 if shared is None else scale_arguments(shared)[0].stride(0)


def _format(packed: Packed, x: Tensor) -> dict[str, int | str | bool]:
    return {
        "bits": packed.bits,
        "group_size": packed.group_size,
        "mode": packed.mode,
        "layout": scale_arguments(packed)[2],
        "native": dot2_type(architecture(x.device), str(x.dtype).removeprefix("torch.")),
    }


def _tile(op: str, x: Tensor, packed: Packed, units: int) -> dict[str, int]:
    tile = config(op, x.device, tokens=x.shape[0], bits=packed.bits, half=x.element_size() == 2)
    return {**tile, "block_u": min(tile["block_u"], next_power_of_2(units))}
