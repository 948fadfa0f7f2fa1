"""On a GPU the public operations mean what they mean on a CPU, by kernels or by torch."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gfxlm import ops
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.sampler import Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Few different values, the type's extremes and, for floats, zeros and NaN of both signs and infinities."""
    rng = np.random.default_rng(1)
    if dtype == torch.bool:
        pool = np.array([False, True])
    elif dtype.is_floating_point:
        pool = np.array([0.0, -0.0, 1.5, -2.0, 0.1, np.inf, -np.inf, np.nan, -np.nan])
    else:
        limits = torch.iinfo(dtype)
        name = str(dtype).removeprefix("torch.")
        pool = np.array([limits.min, limits.max, limits.max // 2 + 1, 0, 1, 3, 3], dtype=name)
    return torch.from_numpy(rng.choice(pool, shape)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS])
def test_sorting(dtype: torch.dtype) -> None:
    for shape, axis in itertools.product([(40,), (5, 3000), (3, 70_000)], [None, 0, -1]):
        a = values(dtype, shape)
        for op in (ops.sort, ops.argsort, ops.argmax, ops.argmin):
            out, expected = op(a.cuda(), axis).cpu(), op(a, axis)
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
            if out.is_floating_point():
                number = ~expected.isnan()  # whose signs matter to no one
                assert torch.equal(out.signbit()[number], expected.signbit()[number])
        k = min(20, a.numel() if axis is None else a.shape[axis])
        top = ops.topk(a.cuda(), k, axis).cpu()
        assert_same_set(top, ops.topk(a, k, axis), axis or 0)


def assert_same_set(a: Tensor, b: Tensor, axis: int) -> None:
    torch.testing.assert_close(ops.sort(a, axis), ops.sort(b, axis), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wide_rows(dtype: torch.dtype) -> None:
    a = torch.randn(2, 248_320).to(dtype)
    a[0, [77_777, 248_319]] = 100
    a[1, 5] = torch.nan
    assert ops.argmax(a.cuda(), -1).tolist() == [77_777, 5]
    assert ops.argmin(-a.cuda(), -1).tolist() == [77_777, 5]
    assert torch.equal(ops.argsort(a.cuda()).cpu(), ops.argsort(a))


def test_floats() -> None:
    x, y, weight = torch.randn(3, 5, 256), torch.randn(3, 5, 256), torch.randn(256)
    calls = {
        "rms_norm": lambda x, y, w: ops.rms_norm(x, w, 1e-5),
        "add_rms_norm": lambda x, y, w: torch.stack(ops.add_rms_norm(x, y, w, 1e-5)),
        "gated_rms_norm": lambda x, y, w: ops.gated_rms_norm(x, y, w, 1e-5),
        "layer_norm": lambda x, y, w: ops.layer_norm(x, w, w, 1e-5),
        "l2_normalize": lambda x, y, w: ops.l2_normalize(x),
        "softmax": lambda x, y, w: ops.softmax(x, -1),
        "softmax of all": lambda x, y, w: ops.softmax(x),
        "swiglu": lambda x, y, w: ops.swiglu(x, y),
    }
    for (name, call), dtype in itertools.product(calls.items(), FLOATS):
        given = [t.to(dtype) for t in (x, y, weight)]
        out = call(*(t.cuda() for t in given)).cpu()
        # Both sides may round either way at a boundary, before the weight and after it.
        step = torch.finfo(out.dtype).eps
        torch.testing.assert_close(out, call(*given), rtol=2 * step + 2e-6, atol=2 * step + 2e-6, msg=name)


def test_gradients() -> None:
    x = torch.randn(4, 64, device="cuda", requires_grad=True)
    for out in (ops.rms_norm(x, None, 1e-5), ops.softmax(x, -1), ops.swiglu(x, x), ops.layer_norm(x, None, None, 1e-5)):
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        assert gradient.isfinite().all()


ALL = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 12,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "logit_bias": {3: 2.0, 90: -math.inf},
    "seed": 11,
}


@pytest.mark.parametrize("vocab", [97, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_captured_step_is_the_cpus(vocab: int, dtype: torch.dtype) -> None:
    for wishes in ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_p": 0.9, "seed": 2}, ALL):
        samplers = [Sampler(3, vocab, device=device) for device in ("cpu", "cuda")]
        for sampler in samplers:
            sampler.set(1, SamplingParams(**wishes), [1, 2, 3])
            sampler.set(
                2, SamplingParams(temperature=1.0, min_p=0.001, seed=4) if "top_p" in wishes else SamplingParams()
            )
        slots = torch.tensor([2, 0, 1])
        logits = torch.randn(3, vocab, device="cuda").to(dtype)
        positions = torch.zeros(3, dtype=torch.int64, device="cuda")
        on_gpu = slots.cuda()
        samplers[1].sample(logits, on_gpu, positions)
        samplers[1].set(1, SamplingParams(**wishes), [1, 2, 3])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens, logprobs, _ = samplers[1].sample(logits, on_gpu, positions)
        assert logprobs is None
        samplers[1].set(1, SamplingParams(**wishes), [1, 2, 3])
        differ = 0
        for _ in range(12):
            logits.copy_(3 * torch.randn(3, vocab))
            graph.replay()
            expected, _, _ = samplers[0].sample(logits.cpu(), slots, positions.cpu())
            differ += int((tokens.cpu() != expected).sum())
            positions += 1
        assert differ <= 1  # rounding may decide once
