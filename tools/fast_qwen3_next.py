"""Faster training forms of the slow parts of transformers' Qwen3-Next, checked against the originals."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

CHUNK = 64
RESIDUAL_WRITERS = ("embed_tokens", ".out_proj", ".o_proj", ".mlp")


class UnitLowerInverse(torch.autograd.Function):
    """(I + L)⁻¹ for strictly lower triangular L (..., C, C), C a power of two.

    The inverse of [[A, 0], [B, D]] is [[A⁻¹, 0], [-D⁻¹ B A⁻¹, D⁻¹]]: blocks of 1, 2, 4, … are inverted in turn.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, lower: Tensor) -> Tensor:
        size = lower.shape[-1]
        position = torch.arange(size, device=lower.device)
        inverse = torch.eye(size, device=lower.device, dtype=lower.dtype).expand_as(lower)
        block = 1
        while block < size:
            half = position // block  # an odd half sits below the even one before it
            below = (half[:, None] == half[None, :] + 1) & (half[:, None] % 2 == 1)
            inverse = inverse - inverse @ (lower * below) @ inverse
            block *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        inverse: Tensor = ctx.saved_tensors[0]  # type: ignore[attr-defined]
        return -(inverse.mT @ gradient @ inverse.mT)


def chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: object
) -> tuple[Tensor, None]:
    """The gated delta rule over whole sequences that start from an empty state, T a multiple of 64.

    query, key (B, T, H or fewer, Dk), value (B, T, H, Dv), g = log decay and beta (B, T, H) → (B, T, H, Dv).
    Chunked WY form of Yang et al., "Gated Delta Networks", 2024; fp32 inside.
    """
    groups = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(groups, dim=2) for x in (query, key))
    q, k, v = (x.float().unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4) for x in (query, key, value))
    log_decay, beta = (x.float().unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2) for x in (g, beta))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))  # (B, H, N, C, Dk)
    q = q * q.shape[-1] ** -0.5
    decay = log_decay.cumsum(-1)  # (B, H, N, C), from the start of the chunk

    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    pairwise = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()
    k_beta = k * beta[..., None]
    system = ((k_beta @ k.mT) * pairwise).tril(-1)
    inverse = UnitLowerInverse.apply(system)  # type: ignore[no-untyped-call]  # (B, H, N, C, C)
    written = inverse @ (v * beta[..., None])
    read = inverse @ (k_beta * decay.exp()[..., None])

    k_to_end = k * (decay[..., -1:] - decay).exp()[..., None]
    chunk_decay = decay[..., -1, None, None].exp()
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])  # (B, H, Dk, Dv)
    states, corrections = [], []
    for i in range(q.shape[2]):
        states.append(state)
        corrections.append(written[:, :, i] - read[:, :, i] @ state)
        state = chunk_decay[:, :, i] * state + k_to_end[:, :, i].mT @ corrections[-1]

    inside = ((q @ k.mT) * pairwise) @ torch.stack(corrections, 2)
    before = (q * decay.exp()[..., None]) @ torch.stack(states, 2)
    return (inside + before).permute(0, 2, 3, 1, 4).flatten(1, 2).to(value.dtype), None


def causal_conv1d(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    """Depthwise causal convolution, then SiLU; x (B, C, T), weight (C, K) → (B, C, T)."""
    taps = weight.shape[-1]
    padded = F.pad(x, (taps - 1, 0))
    shifted = (padded[..., i : i + x.shape[-1]] * weight[:, i, None] for i in range(taps))
    return F.silu(torch.stack(list(shifted)).sum(0))


class _AddLoss(torch.autograd.Function):
    """Passes `x` through and adds `loss` to whatever is minimised."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient, torch.ones_like(loss)


class BalancedRouter(qwen3_next.Qwen3NextTopKRouter):  # type: ignore[misc]
    """The model's router, trained towards equal load (Switch Transformer, Fedus et al. 2021, equations 4-6)."""

    balance_coefficient = 0.01

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, experts = super().forward(hidden)
        load = F.one_hot(experts, self.num_experts).float().mean((0, 1))
        probability = logits.float().softmax(-1).mean(0)
        imbalance = self.num_experts * (load * probability).sum()
        scores = _AddLoss.apply(scores, self.balance_coefficient * imbalance)  # type: ignore[no-untyped-call]
        return logits, scores, experts


def make_fast(model: nn.Module, dropout: float) -> None:
    """Swap the slow parts of a Qwen3NextForCausalLM in place; `dropout` falls on what is added to the residual."""
    check_against_transformers()
    qwen3_next.torch_chunk_gated_delta_rule = chunk_gated_delta_rule
    qwen3_next.causal_conv1d_fn = causal_conv1d
    for name, module in model.named_modules():
        if isinstance(module, qwen3_next.Qwen3NextTopKRouter):
            module.__class__ = BalancedRouter
        if dropout and name.endswith(RESIDUAL_WRITERS):
            module.register_forward_hook(lambda block, _, y: F.dropout(y, dropout, block.training))
        if isinstance(module, qwen3_next.Qwen3NextDecoderLayer):
            module.compile()


def check_against_transformers() -> None:
    """Raise if a fast form's output or gradients leave transformers' own by more than fp32 rounding."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def original_rule(*inputs: Tensor) -> Tensor:
        q, k, v, g, beta = inputs
        slow = qwen3_next.torch_chunk_gated_delta_rule
        output: Tensor = slow(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
        return output

    def original_convolution(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = qwen3_next.causal_conv1d_fn(x, weight, activation="silu")
        return output

    q, k, v = (random(2, 4 * CHUNK, 4, CHUNK) for _ in range(3))
    decay, beta = -F.softplus(random(2, 4 * CHUNK, 4)), random(2, 4 * CHUNK, 4).sigmoid()
    _compare(lambda *x: chunk_gated_delta_rule(*x)[0], original_rule, [q, k, v, decay, beta])
    _compare(causal_conv1d, original_convolution, [random(2, 96, 4 * CHUNK), random(96, 4)])


def _compare(fast: Callable[..., Tensor], original: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    def output_and_gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = function(*leaves)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    for ours, theirs in zip(output_and_gradients(fast), output_and_gradients(original), strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < 1e-4:
            raise RuntimeError(f"the fast form of {original.__name__} is off by {error:.1e}")
