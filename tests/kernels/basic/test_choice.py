"""Which kernels the public operations start, told from recordings on the meta device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gfxlm import ops
from gfxlm.device.arch import named
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.sampler import Sampler
from gfxlm.kernels.launch import recording


def started(call: Callable[[], object]) -> list[str]:
    with recording(named("gfx1151")) as launches:
        call()
    return [launch.kernel.fn.__name__ for launch in launches]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_norms_and_activations() -> None:
    x, weight = meta(3, 5, 64), meta(64)
    assert started(lambda: ops.rms_norm(x, weight, 1e-5)) == ["rms_norm_kernel"]
    assert started(lambda: ops.add_rms_norm(x, x, weight, 1e-5)) == ["rms_norm_kernel"]
    assert started(lambda: ops.gated_rms_norm(x, x, weight, 1e-5)) == ["rms_norm_kernel"]
    assert started(lambda: ops.l2_normalize(x)) == ["rms_norm_kernel"]
    assert started(lambda: ops.layer_norm(x, weight, weight, 1e-5)) == ["layer_norm_kernel"]
    assert started(lambda: ops.softmax(x, -1)) == ["softmax_kernel"]
    assert started(lambda: ops.swiglu(x, x)) == ["swiglu_kernel"]
    assert started(lambda: ops.rms_norm(x[:0], weight, 1e-5)) == []
    # A weight of more precision makes the sum and the norm different types.
    assert started(lambda: ops.add_rms_norm(x, x, weight.float(), 1e-5)) == ["rms_norm_kernel"]


def test_what_torch_does() -> None:
    x = meta(3, 64, dtype=torch.float64)
    wanting = meta(3, 64).requires_grad_()
    for call in (
        lambda: ops.rms_norm(x, None, 1e-5),
        lambda: ops.rms_norm(wanting, None, 1e-5),
        lambda: ops.softmax(x, 0),
        lambda: ops.swiglu(x, x),
        lambda: ops.argmax(x, -1),
    ):
        assert started(call) == []


def test_selection_and_windows() -> None:
    a = meta(2, 5000)
    assert started(lambda: ops.argmax(a, -1)) == ["select_kernel", "best_kernel"]
    assert started(lambda: ops.argmin(a, 0, keepdims=True)) == ["select_kernel"]
    assert ops_shape(lambda: ops.argmax(a, 0, keepdims=True)) == (1, 5000)
    assert ops_shape(lambda: ops.argmax(a)) == ()
    starts = meta(2, dtype=torch.int64)
    window = meta(1, 7)
    assert started(lambda: ops.slice_update(a, window, starts, (0, 1), "sum")) == ["slice_update_kernel"]
    assert started(lambda: ops.slice_update(a, window, [1, 2], (0, 1))) == ["slice_update_kernel"]


def ops_shape(call: Callable[[], Tensor]) -> tuple[int, ...]:
    with recording(named("gfx1151")):
        return tuple(call().shape)


PLAIN = ["draw_kernel", "draw_best_kernel"]
FILTERED = ["stats_kernel", "count_kernel", "count_kernel", "split_kernel", "settle_kernel"]


@pytest.mark.parametrize(
    ("params", "kernels"),
    [
        (SamplingParams(), ["select_kernel", "best_kernel"]),
        (SamplingParams(repetition_penalty=1.1), ["select_kernel", "best_kernel"]),
        (SamplingParams(temperature=1.0), PLAIN),
        (SamplingParams(temperature=1.0, logit_bias={1: 2.0}), PLAIN),
        (SamplingParams(temperature=1.0, top_k=20), FILTERED),
        (SamplingParams(temperature=1.0, top_p=0.9, min_p=0.1, presence_penalty=0.5), FILTERED),
        (SamplingParams(temperature=1.0, xtc_probability=0.5), []),
        (SamplingParams(logprobs=True), []),
    ],
)
def test_sampling(params: SamplingParams, kernels: list[str]) -> None:
    sampler = Sampler(2, 3000, device="meta")
    sampler.set(1, params, [1, 2])
    rows = meta(2, dtype=torch.int64)
    assert started(lambda: sampler.sample(meta(2, 3000), rows, rows)) == kernels


def test_arguments_on_two_devices() -> None:
    x, here = meta(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="rms_norm: weight must lie on meta, where x is, not on cpu"):
        ops.rms_norm(x, here, 1e-5)
    with pytest.raises(ValueError, match="add_rms_norm: residual must lie on meta"):
        ops.add_rms_norm(x, torch.ones(2, 4), None, 1e-5)
    with pytest.raises(ValueError, match=r"gated_rms_norm: gate must have x's shape \(2, 4\), got \(4,\)"):
        ops.gated_rms_norm(x, here, None, 1e-5)
    with pytest.raises(ValueError, match="swiglu: x must lie on meta, where gate is, not on cpu"):
        ops.swiglu(x, torch.ones(2, 4))
