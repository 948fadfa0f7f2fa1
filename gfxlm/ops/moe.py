"""Mixture of experts: routing, and the experts' gated MLPs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gfxlm.kernels.packed import Packed
from gfxlm.ops._common import check_devices, on_gpu
from gfxlm.ops.activation import swiglu
from gfxlm.ops.matrix import Matrix, MatrixStack
from gfxlm.ops.packed import KERNEL_TYPES

if TYPE_CHECKING:
    from gfxlm.kernels.moe.decode import Shared


class GateUp(Matrix, Protocol):
    """A matrix (2 I, D), gate rows first."""

    def swiglu(self, x: Tensor) -> Tensor:
        """`silu(gate x) * up x`: (..., D) to (..., I)."""


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert that every token passes, behind a sigmoid: gate_up (2 J, D), down (D, J), the sigmoid's logits (T, 1).

    Its inner size J need not be the other experts'.
    """

    gate_up: GateUp
    down: Matrix
    logits: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """What it adds, fp32 (T, D)."""
        return torch.sigmoid(self.logits.float()) * self.down.matmul(self.gate_up.swiglu(x)).float()


def route(logits: Tensor, top_k: int, *, normalize: bool, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose experts: softmax over all in fp32, the `top_k` best, their scores rescaled to 1 if `normalize`.

    logits (T, E); returns expert indices int64 and scores fp32, (T, top_k) each, best first. A row of
    a negative slot, int64 (T,), is padding: on a GPU it gets experts -1, which `expert_mlp` there reads nothing for.
    ValueError if logits are not floating (T, E), slots not int64 (T,), or top_k is not from 1 to E.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: must be floating (T, E), got {logits.dtype} {tuple(logits.shape)}")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k: must be from 1 to the number of experts, {logits.shape[1]}, got {top_k}")
    if slots is not None and (slots.shape != logits.shape[:1] or slots.dtype != torch.int64):
        raise ValueError(f"slots: must be int64 ({len(logits)},), got {slots.dtype} {tuple(slots.shape)}")
    if on_gpu(logits) and logits.dtype in KERNEL_TYPES:
        from gfxlm.kernels.moe.router import route as kernel

        return kernel(logits, top_k, normalize, slots)
    scores, experts = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    return experts, scores / scores.sum(-1, keepdim=True) if normalize else scores


def expert_mlp(
    x: Tensor,
    experts: Tensor,
    scores: Tensor,
    gate_up: MatrixStack,
    down: MatrixStack,
    *,
    shared: SharedExpert | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + sum_k scores_k * down_k(silu(gate_k x) * up_k x) + shared(x)` over each token's experts.

    x (T, D), experts and scores (T, k), residual (T, D); `gate_up` is (E, 2 I, D) with gate rows first, `down`
    (E, D, I). Returns (T, D) in x's dtype. The sum over k is in fp32 and in an order that does not depend on what other
    tokens chose. ValueError for shapes that do not fit, IndexError for an expert outside of [0, E); on a GPU, where
    nothing is asked of the host, such a one adds nothing.
    """
    _check(x, experts, scores, gate_up, down, residual)
    if shared is not None:
        if shared.logits.shape != (len(x), 1):
            raise ValueError(f"shared.logits: must be ({len(x)}, 1), got {tuple(shared.logits.shape)}")
        check_devices("expert_mlp", x=x, logits=shared.logits)
    if on_gpu(x) and x.dtype in KERNEL_TYPES:
        return _on_gpu(x, experts, scores, gate_up, down, shared, residual)
    y = _by_expert(x, experts, scores, gate_up, down)
    if shared is not None:
        y = (y.float() + shared(x)).to(x.dtype)
    return y if residual is None else residual + y


def _by_expert(x: Tensor, experts: Tensor, scores: Tensor, gate_up: MatrixStack, down: MatrixStack) -> Tensor:
    """The reference: rows are sorted, and every expert is read once."""
    tokens, k = experts.shape
    order = experts.flatten().argsort(stable=True)
    negative, *counts = torch.bincount(experts.flatten().clamp(min=-1) + 1, minlength=1).tolist()
    if negative or len(counts) > gate_up.shape[0]:
        raise IndexError(f"experts: values must lie in [0, {gate_up.shape[0]})")
    routed = torch.empty(tokens * k, x.shape[-1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            gate, up = gate_up.matrix(expert).matmul(x[rows // k]).chunk(2, dim=-1)
            routed[rows] = down.matrix(expert).matmul(swiglu(gate, up))
            start += count
    return (routed.view(tokens, k, x.shape[-1]).float() * scores[..., None]).sum(1).to(x.dtype)


def _on_gpu(
    x: Tensor,
    experts: Tensor,
    scores: Tensor,
    gate_up: MatrixStack,
    down: MatrixStack,
    shared: SharedExpert | None,
    residual: Tensor | None,
) -> Tensor:
    """Gathered products for few tokens, sorted ones for many, and sorted ones part by part where formats are mixed."""
    from gfxlm.kernels.moe.decode import expert_mlp_decode, takes
    from gfxlm.kernels.moe.grouped import expert_mlp_prefill
    from gfxlm.kernels.tuning import config

    (tokens, top_k), n_experts = experts.shape, gate_up.shape[0]
    first, second = _storage(gate_up), _storage(down)
    if first is None or second is None:
        return _part_by_part(x, experts, scores, gate_up, down, shared, residual)
    decode = config("moe", x.device, tokens=tokens, experts=n_experts, top_k=top_k)["decode"]
    if decode and isinstance(first, Packed) and isinstance(second, Packed) and takes(first, second):
        rider = None if shared is None else _rider(shared, first, second)
        if shared is not None and rider is None:
            residual = shared(x) if residual is None else shared(x) + residual
        return expert_mlp_decode(x, experts, scores, first, second, shared=rider, residual=residual)
    added = None if shared is None else shared(x)
    return expert_mlp_prefill(x, experts, scores, first, second, shared=added, residual=residual)


def _storage(matrix: Matrix | MatrixStack) -> Packed | Tensor | None:
    """What kernels read: codes, or a dense tensor; None where blocks of rows have formats of their own."""
    packed: Packed | None = getattr(matrix, "packed", None)
    dense: Tensor | None = getattr(matrix, "tensor", None)
    return dense if packed is None else packed


def _rider(shared: SharedExpert, gate_up: Packed, down: Packed) -> "Shared | None":
    """The shared expert as one that the experts' own launches read along, if its formats allow that."""
    from gfxlm.kernels.moe.decode import Shared, rides

    first, second = _storage(shared.gate_up), _storage(shared.down)
    if isinstance(first, Packed) and isinstance(second, Packed) and rides(gate_up, first) and rides(down, second):
        return Shared(first, second, shared.logits)
    return None


def _part_by_part(
    x: Tensor,
    experts: Tensor,
    scores: Tensor,
    gate_up: MatrixStack,
    down: MatrixStack,
    shared: SharedExpert | None,
    residual: Tensor | None,
) -> Tensor:
    gate, up = _grouped(x, experts, gate_up).flatten(0, 1).chunk(2, dim=-1)  # (T k, I) each
    each = _grouped(swiglu(gate, up), experts.reshape(-1, 1), down).view(*experts.shape, -1)  # (T, k, D)
    y = (each.float() * scores[..., None]).sum(1)
    if shared is not None:
        y = y + shared(x)
    return (y if residual is None else residual + y).to(x.dtype)


def _grouped(x: Tensor, experts: Tensor, stack: MatrixStack) -> Tensor:
    """Each row of x (T, K) times the matrices of its experts (T, k), in blocks of one format: (T, k, N)."""
    from gfxlm.kernels.moe.grouped import grouped_matmul

    products = []
    for part in getattr(stack, "parts", (stack,)):
        storage = _storage(part)
        assert storage is not None
        products.append(grouped_matmul(x, experts, storage))
    return torch.cat(products, dim=-1)


def _check(
    x: Tensor, experts: Tensor, scores: Tensor, gate_up: MatrixStack, down: MatrixStack, residual: Tensor | None
) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: must be floating (T, D), got {x.dtype} {tuple(x.shape)}")
    tokens, columns = x.shape
    if experts.ndim != 2 or experts.shape[0] != tokens or experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts: must be integers ({tokens}, k), got {experts.dtype} {tuple(experts.shape)}")
    if scores.shape != experts.shape or not scores.is_floating_point():
        raise ValueError(f"scores: must be floating {tuple(experts.shape)}, got {scores.dtype} {tuple(scores.shape)}")
    n_experts, rows, inner = gate_up.shape
    if rows % 2 or inner != columns:
        raise ValueError(f"gate_up: must be (E, 2 I, {columns}), got {tuple(gate_up.shape)}")
    if tuple(down.shape) != (n_experts, columns, rows // 2):
        raise ValueError(f"down: must be {(n_experts, columns, rows // 2)}, got {tuple(down.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual: must be {x.dtype} {tuple(x.shape)}, got {residual.dtype} {tuple(residual.shape)}")
    check_devices("expert_mlp", x=x, experts=experts, scores=scores, residual=residual)
