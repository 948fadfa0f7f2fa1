"""The experts' kernels for a few tokens, against the sum over experts written out in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gfxlm.device.arch import named
from gfxlm.kernels.launch import recording
from gfxlm.kernels.moe.decode import Shared, expert_mlp_decode, rides
from gfxlm.kernels.packed import Packed
from gfxlm.kernels.tuning import override
from gfxlm.ops.quantized import dequantize, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AFFINE = (32, 4, "affine")
NOISE = 1e-5  # of fp32 sums, relative to the sum of their terms' sizes


def packed(shape: tuple[int, ...], quantization: tuple[int, int, str], dtype: torch.dtype) -> tuple[Packed, Tensor]:
    """A random matrix or stack as kernels take it, laid out as for a GPU, and its exact numbers."""
    w = torch.randn(shape) * shape[-1] ** -0.5
    w_q, scales, *rest = quantize(w.to(dtype), *quantization)
    biases = rest[0] if rest else None
    exact = dequantize(w_q, scales, biases, *quantization, dtype=torch.float64)
    if biases is not None:
        scales, biases = torch.stack((scales, biases), -1).to(DEVICE).unbind(-1)
    return Packed.of(w_q.to(DEVICE), scales.to(DEVICE), biases, *quantization), exact


def gated(x: Tensor, gate_up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """silu(gate x) * (up x), rounded as activations are, and how far fp32's noise may move the rounded number."""
    gate, up = (gate_up @ x).chunk(2)
    gate_noise, up_noise = (NOISE * (gate_up.abs() @ x.abs())).chunk(2)
    silu = torch.nn.functional.silu(gate)
    h, noise = silu * up, 1.1 * gate_noise * up.abs() + silu.abs() * up_noise  # 1.1: SiLU is no steeper
    low, rounded, high = ((h + step).to(dtype).double() for step in (-noise, 0, noise))
    return rounded, high - low


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """The interpreter's time goes by programs, not by their size."""
    if DEVICE == "cuda":
        yield
    else:
        tile = {"block_n": 8, "block_u": 16, "num_warps": 1}
        with override("moe_gate_up", tile), override("moe_down", tile):
            yield


def check(
    sizes: tuple[int, int, int, int, int, int],
    quantization: tuple[int, int, str] = AFFINE,
    dtype: torch.dtype = torch.bfloat16,
    *,
    residual: bool = False,
    experts: Tensor | None = None,
) -> None:
    """sizes are tokens, hidden, experts, inner, top_k, and the shared expert's inner or 0."""
    tokens, hidden, n_experts, inner, top_k, shared_inner = sizes
    x = torch.randn(tokens, hidden).to(dtype)
    gate_up, exact_gate_up = packed((n_experts, 2 * inner, hidden), quantization, dtype)
    down, exact_down = packed((n_experts, hidden, inner), quantization, dtype)
    if experts is None:
        experts = torch.stack([torch.randperm(n_experts)[:top_k] for _ in range(tokens)])
    scores = torch.rand(tokens, top_k)
    base = torch.randn(tokens, hidden).to(dtype) if residual else None
    exact = torch.zeros(tokens, hidden, dtype=torch.float64) if base is None else base.double()
    error = NOISE * exact.abs()
    shared = None
    if shared_inner:
        shared_gate_up, exact_shared_gate_up = packed((2 * shared_inner, hidden), quantization, dtype)
        shared_down, exact_shared_down = packed((hidden, shared_inner), quantization, dtype)
        logits = torch.randn(tokens, 5).to(dtype)[:, 4:]
        shared = Shared(shared_gate_up, shared_down, logits.to(DEVICE))
        assert rides(gate_up, shared_gate_up)
    for t in range(tokens):
        for expert, score in zip(experts[t].tolist(), scores[t].double(), strict=True):
            if 0 <= expert < n_experts:
                h, slack = gated(x[t].double(), exact_gate_up[expert], dtype)
                exact[t] += score * (exact_down[expert] @ h)
                error[t] += score * (exact_down[expert].abs() @ (NOISE * h.abs() + slack))
        if shared_inner:
            h, slack = gated(x[t].double(), exact_shared_gate_up, dtype)
            score = logits[t, 0].double().sigmoid()
            exact[t] += score * (exact_shared_down @ h)
            error[t] += score * (exact_shared_down.abs() @ (NOISE * h.abs() + slack))
    y = expert_mlp_decode(
        x.to(DEVICE),
        experts.to(DEVICE),
        scores.to(DEVICE),
        gate_up,
        down,
        shared=shared,
        residual=None if base is None else base.to(DEVICE),
    ).cpu()
    assert y.dtype == dtype
    error += torch.finfo(dtype).eps / 2 * exact.abs()  # the result is rounded once
    assert ((y.double() - exact).abs() <= error).all()


@pytest.mark.parametrize(
    ("dtype", "shared_inner"), [(torch.bfloat16, 32), (torch.float16, 0), (torch.float32, 64)], ids=str
)
def test_types_and_shared_expert(dtype: torch.dtype, shared_inner: int) -> None:
    check((1, 32, 3, 32, 2, shared_inner), dtype=dtype, residual=shared_inner == 32)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 64), (5, 32), (6, 32), (8, 32)])
def test_affine(bits: int, group_size: int) -> None:
    check((1, group_size, 2, group_size, 1, 0), (group_size, bits, "affine"))


@pytest.mark.parametrize("quantization", [(32, 4, "mxfp4"), (32, 8, "mxfp8"), (16, 4, "nvfp4")], ids=str)
def test_float_modes(quantization: tuple[int, int, str]) -> None:
    check((1, 32, 3, 32, 1, 0), quantization)


def test_loops_and_ragged_edges() -> None:
    """Several turns of both loops, units that fill no block, experts' units astride of blocks, an odd shared expert."""
    tile = {"block_n": 8, "block_u": 2, "num_warps": 1}
    with override("moe_gate_up", tile), override("moe_down", tile | {"block_u": 1}):
        check((1, 160, 2, 32, 1, 0))
    with override("moe_gate_up", tile), override("moe_down", tile):
        check((1, 32, 2, 64, 2, 32), residual=True)


def test_one_expert_for_all_tokens() -> None:
    check((2, 32, 1, 32, 1, 0))


def test_experts_that_do_not_exist_contribute_nothing() -> None:
    check((1, 32, 4, 32, 2, 32), experts=torch.tensor([[-(1 << 62), 4]]))
    check((3, 32, 4, 32, 2, 0), experts=torch.tensor([[-1, -1], [3, -1], [-1, 0]]), residual=True)


def test_strided_rows_and_company_change_no_bit() -> None:
    gate_up, _ = packed((3, 64, 32), AFFINE, torch.bfloat16)
    down, _ = packed((3, 32, 32), AFFINE, torch.bfloat16)
    x = torch.randn(2, 64).bfloat16().to(DEVICE)
    base = torch.randn(32, 2).bfloat16().to(DEVICE)
    experts, scores = torch.tensor([[2], [1]], device=DEVICE), torch.rand(2, 2, device=DEVICE)
    together = expert_mlp_decode(x[:, 32:], experts, scores[:, ::2], gate_up, down, residual=base.mT)
    row = slice(1, 2)
    dense = (x[row, 32:].contiguous(), experts[row], scores[row, ::2].contiguous(), gate_up, down)
    assert torch.equal(together[row], expert_mlp_decode(*dense, residual=base.mT[row].contiguous()))


def test_small_indices_are_widened() -> None:
    """A stack may have more words than 32 bits count, and a kernel multiplies by what it is given."""
    stack = Packed(*(torch.empty(4, 64, n, dtype=t, device="meta") for n, t in ((8, torch.int32), (1, torch.float32))),
                   torch.empty(4, 64, 1, device="meta"), 64, 4, "affine")  # fmt: skip
    down = Packed(*(torch.empty(4, 64, n, dtype=t, device="meta") for n, t in ((4, torch.int32), (1, torch.float32))),
                  torch.empty(4, 64, 1, device="meta"), 32, 4, "affine")  # fmt: skip
    experts = torch.empty(1, 2, dtype=torch.int32, device="meta")
    with recording(named("gfx1151")) as launches:
        expert_mlp_decode(torch.empty(1, 64, device="meta"), experts, torch.empty(1, 2, device="meta"), stack, down)
    for launch in launches:
        given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))["p_experts"]
        assert isinstance(given, Tensor)
        assert given.dtype == torch.int64


def test_no_tokens() -> None:
    gate_up, _ = packed((3, 64, 32), AFFINE, torch.bfloat16)
    down, _ = packed((3, 32, 32), AFFINE, torch.bfloat16)
    none = (torch.empty(0, 2, dtype=torch.int64, device=DEVICE), torch.empty(0, 2, device=DEVICE))
    assert expert_mlp_decode(torch.empty(0, 32, device=DEVICE), *none, gate_up, down).shape == (0, 32)
