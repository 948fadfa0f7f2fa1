"""A few tokens' experts: Qwen3-Coder-Next's and Qwen3-30B-A3B's, and a small odd block in every format."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.moe.decode import Shared, expert_mlp_decode
from gfxlm.kernels.moe.router import route
from gfxlm.kernels.packed import Packed

_HALF = torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Format:
    bits: int = 4
    group_size: int = 64
    mode: str = "affine"

    @property
    def bits_a_weight(self) -> float:
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size


@dataclass(frozen=True, slots=True)
class _Block:
    name: str
    hidden: int
    experts: int
    inner: int
    top_k: int
    shared: int = 0


_NEXT = _Block("coder-next", 2048, 512, 512, 10, 512)
_A3B = _Block("30b-a3b", 2048, 128, 768, 8)
_ODD = _Block("odd", 160, 5, 96, 3, 32)


def cases() -> list[Case]:
    """Routing, and the experts' products, for 1 to 64 tokens."""
    four = _Format()
    others = (
        *(_Format(bits) for bits in (2, 3, 5, 6, 8)),
        _Format(4, 32),
        _Format(4, 128),
        _Format(4, 32, "mxfp4"),
        _Format(8, 32, "mxfp8"),
        _Format(4, 16, "nvfp4"),
    )
    return [
        _route(_NEXT, 1, headline=True),
        *(_route(block, 8) for block in (_A3B, _ODD)),
        _route(_A3B, 2048),
        _route(_NEXT, 1, torch.float32),
        _mlp(_NEXT, four, 1, headline=True),
        _mlp(_A3B, four, 1),
        *(_mlp(block, four, tokens) for block in (_NEXT, _A3B) for tokens in (2, 4, 8, 32)),
        *(_mlp(_NEXT, other, 1) for other in others),
        _mlp(_NEXT, four, 1, torch.float16),
        _mlp(_NEXT, four, 1, torch.float32),
        *(_mlp(_A3B, form, 8) for form in (_Format(6), _Format(8, 32, "mxfp8"))),
        _mlp(_A3B, four, 8, torch.float32),
        _mlp(_ODD, _Format(4, 32), 3),
    ]


def _route(block: _Block, tokens: int, dtype: torch.dtype = _HALF, *, headline: bool = False) -> Case:
    def make(device: torch.device) -> Call:
        logits = torch.zeros(tokens, block.experts, dtype=dtype, device=device)
        slots = torch.zeros(tokens, dtype=torch.int64, device=device)
        return lambda: route(logits, block.top_k, True, slots)

    name = f"moe_route/{block.name}/{_short(dtype)}/t{tokens}"
    return Case(name, make, tokens * block.experts * dtype.itemsize, headline=headline)


def _mlp(block: _Block, form: _Format, tokens: int, dtype: torch.dtype = _HALF, *, headline: bool = False) -> Case:
    def make(device: torch.device) -> Call:
        gate_up = _packed((block.experts, 2 * block.inner, block.hidden), form, dtype, device)
        down = _packed((block.experts, block.hidden, block.inner), form, dtype, device)
        shared = None
        if block.shared:
            shared = Shared(
                _packed((2 * block.shared, block.hidden), form, dtype, device),
                _packed((block.hidden, block.shared), form, dtype, device),
                torch.zeros(tokens, block.experts + 1, dtype=dtype, device=device)[:, block.experts :],
            )
        x, residual = torch.zeros(2, tokens, block.hidden, dtype=dtype, device=device).unbind(0)
        experts = _spread(tokens, block, device)
        scores = torch.full(experts.shape, 1 / block.top_k, device=device)
        return lambda: expert_mlp_decode(x, experts, scores, gate_up, down, shared=shared, residual=residual)

    distinct = min(block.experts, tokens * block.top_k)
    weights = 3 * block.hidden * (distinct * block.inner + block.shared)
    name = f"moe_decode/{block.name}/{form.mode}{form.bits}g{form.group_size}/{_short(dtype)}/t{tokens}"
    flops = 6 * tokens * block.hidden * (block.top_k * block.inner + block.shared)
    return Case(name, make, int(weights * form.bits_a_weight / 8), flops, headline)


def _spread(tokens: int, block: _Block, device: torch.device) -> Tensor:
    """Experts that differ as long as there are others."""
    return (torch.arange(tokens * block.top_k, device=device) % block.experts).view(tokens, block.top_k)


def _packed(shape: tuple[int, ...], form: _Format, dtype: torch.dtype, device: torch.device) -> Packed:
    *rows, columns = shape
    words = torch.zeros(*rows, columns * form.bits // 32, dtype=torch.int32, device=device)
    groups = columns // form.group_size
    if form.mode != "affine":
        scales = torch.zeros(*rows, groups, dtype=torch.uint8, device=device)
        return Packed(words, scales, None, form.group_size, form.bits, form.mode)
    scales, biases = torch.zeros(*rows, groups, 2, dtype=dtype, device=device).unbind(-1)
    return Packed(words, scales, biases, form.group_size, form.bits, form.mode)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "f")
