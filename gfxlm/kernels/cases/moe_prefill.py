"""Mixtures of experts over many tokens: the sort, and the experts' grouped products."""

from dataclasses import dataclass
from functools import partial

import torch

from gfxlm.kernels.case import Call, Case
from gfxlm.kernels.cases.wide import packed, packed_bytes
from gfxlm.kernels.moe.grouped import expert_mlp_prefill, grouped_matmul
from gfxlm.kernels.moe.sort import moe_sort

BF16 = torch.bfloat16
AFFINE4 = (64, 4, "affine")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one mixture."""

    experts: int
    top_k: int
    hidden: int
    inner: int


CODER_NEXT = Sizes(512, 10, 2048, 512)
QWEN3_30B = Sizes(128, 8, 2048, 768)
ODD = Sizes(5, 2, 192, 96)


def cases() -> list[Case]:
    """The experts of Qwen3-Coder-Next and Qwen3-30B-A3B over up to 8192 tokens; other formats; odd sizes."""
    found = [_mlp("coder-next", CODER_NEXT, tokens, headline=tokens in (512, 2048)) for tokens in (64, 512, 2048, 8192)]
    found += [_mlp("30b-a3b", QWEN3_30B, tokens) for tokens in (64, 512, 2048)]
    for name, fmt in (
        ("affine3", (64, 3, "affine")),
        ("affine5", (32, 5, "affine")),
        ("affine6", (64, 6, "affine")),
        ("affine8", (64, 8, "affine")),
        ("mxfp4", (32, 4, "mxfp4")),
        ("nvfp4", (16, 4, "nvfp4")),
    ):
        found += [_mlp(f"30b-a3b/{name}", QWEN3_30B, tokens, fmt) for tokens in (64, 1024)]
    found += [
        _mlp("30b-a3b/float16", QWEN3_30B, 1024, dtype=torch.float16),
        _mlp("30b-a3b/float32", QWEN3_30B, 64, dtype=torch.float32),
        _mlp("odd", ODD, 77, (32, 4, "affine")),
        Case("moe_prefill/dense/t1024", partial(_dense, QWEN3_30B, 1024), flops=_flops(QWEN3_30B, 1024)),
        _matmul(QWEN3_30B, 512),
    ]
    for tokens, sizes in ((512, CODER_NEXT), (65536, CODER_NEXT), (100, ODD)):
        nbytes = 12 * tokens * sizes.top_k
        found.append(Case(f"moe_sort/{sizes.experts}/t{tokens}", partial(_sort, sizes, tokens), nbytes))
    return found


def _flops(sizes: Sizes, tokens: int) -> int:
    return 6 * tokens * sizes.top_k * sizes.hidden * sizes.inner


def _experts(sizes: Sizes, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.rand(tokens, sizes.experts, device=device).topk(sizes.top_k, -1).indices


def _mlp(
    name: str,
    sizes: Sizes,
    tokens: int,
    fmt: tuple[int, int, str] = AFFINE4,
    dtype: torch.dtype = BF16,
    *,
    headline: bool = False,
) -> Case:
    def make(device: torch.device) -> Call:
        gate_up = packed((sizes.experts, 2 * sizes.inner, sizes.hidden), fmt, dtype, device)
        down = packed((sizes.experts, sizes.hidden, sizes.inner), fmt, dtype, device)
        x, residual = torch.randn(2, tokens, sizes.hidden, dtype=dtype, device=device).unbind()
        experts, scores = _experts(sizes, tokens, device), torch.rand(tokens, sizes.top_k, device=device)
        return lambda: expert_mlp_prefill(x, experts, scores, gate_up, down, shared=x, residual=residual)

    touched = min(sizes.experts, tokens * sizes.top_k)
    nbytes = packed_bytes((touched, 3 * sizes.inner, sizes.hidden), fmt) + 4 * tokens * sizes.hidden * dtype.itemsize
    return Case(f"moe_prefill/{name}/t{tokens}", make, nbytes, _flops(sizes, tokens), headline)


def _dense(sizes: Sizes, tokens: int, device: torch.device) -> Call:
    gate_up = torch.randn(sizes.experts, 2 * sizes.inner, sizes.hidden, dtype=BF16, device=device)
    down = torch.randn(sizes.experts, sizes.hidden, sizes.inner, dtype=BF16, device=device)
    x = torch.randn(tokens, sizes.hidden, dtype=BF16, device=device)
    experts, scores = _experts(sizes, tokens, device), torch.rand(tokens, sizes.top_k, device=device)
    return lambda: expert_mlp_prefill(x, experts, scores, gate_up, down)


def _matmul(sizes: Sizes, tokens: int) -> Case:
    def make(device: torch.device) -> Call:
        stack = packed((sizes.experts, sizes.inner, sizes.hidden), AFFINE4, BF16, device)
        x, experts = torch.randn(tokens, sizes.hidden, dtype=BF16, device=device), _experts(sizes, tokens, device)
        return lambda: grouped_matmul(x, experts, stack)

    name = f"grouped_matmul/{sizes.experts}x{sizes.inner}x{sizes.hidden}/t{tokens}"
    return Case(name, make, flops=_flops(sizes, tokens) // 3)


def _sort(sizes: Sizes, tokens: int, device: torch.device) -> Call:
    experts = _experts(sizes, tokens, device)
    return lambda: moe_sort(experts, sizes.experts, 16)
