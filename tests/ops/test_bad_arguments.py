"""Arguments that no operation takes, and the words in which it says so: never torch's own, and no guess at a result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import run as benchmarks_run
from benchmarks import verify as benchmarks_verify
from gfxlm import ops
from gfxlm.ops.formats import Quantization
from gfxlm.ops.kv import write_kv, write_qkv
from gfxlm.ops.moe import SharedExpert
from gfxlm.ops.ragged import Slots, Span
from gfxlm.weights.weight import PackedWeight

META = torch.device("meta")
W, SCALES, BIASES = ops.quantize(torch.randn(4, 8, 64))
POSITIONS, SLOTS = ops.ragged([0, 1], [3, 1], [0, 4])
CACHE = torch.zeros(2, 16, 2, 64)
ROWS = torch.zeros(4, 2, 64)
ANGLES = torch.zeros(4, 1, 16)


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device=META)


def product(x: Tensor, **changes: Any) -> Tensor:
    return ops.quantized_matmul(x, **({"w": W[0], "scales": SCALES[0], "biases": BIASES[0]} | changes))


def gathered(x: Tensor, lhs: Any = None, rhs: Any = None) -> Tensor:
    lhs, rhs = (None if i is None else torch.as_tensor(i) for i in (lhs, rhs))
    return ops.gather_qmm(x, W, SCALES, BIASES, lhs, rhs)


def attention(q: Tensor = ROWS, positions: Tensor = POSITIONS, slots: Slots = SLOTS, **more: Any) -> Tensor:
    caches = {"k_cache": CACHE.to(q.dtype), "v_cache": CACHE.to(q.dtype)} | more
    return ops.cached_attention(q, positions=positions, slots=slots, scale=1.0, **caches)


def stored(**changes: Any) -> Tensor:
    angles = {"cos": ANGLES, "sin": ANGLES} | changes
    return write_qkv(ROWS, ROWS, ROWS, CACHE, CACHE, POSITIONS, SLOTS, **angles)


def update(**changes: Any) -> tuple[Tensor, Tensor]:
    q, rates = torch.ones(1, 5, 2, 16), torch.ones(1, 5, 2)
    return ops.gated_delta_update(**({"q": q, "k": q, "v": q, "gamma": rates, "beta": rates} | changes))


def mixed(positions: Tensor = POSITIONS, slots: Slots = SLOTS, **changes: Any) -> Tensor:
    weights = ops.DeltaWeights(torch.ones(4, 48), torch.ones(1), torch.ones(1), torch.ones(16), 1e-6, 1)
    tensors = {"qkvz": torch.ones(4, 64), "ba": torch.ones(4, 2)}
    caches = {"conv": torch.zeros(2, 4, 48), "state": torch.zeros(2, 1, 16, 16)}
    return ops.gated_delta_mixer(**(tensors | caches | changes), weights=weights, positions=positions, slots=slots)


def experts(chosen: int, shared: SharedExpert | None = None) -> Tensor:
    q = Quantization.resolve()
    gate_up, down = (PackedWeight.from_mlx(*ops.quantize(torch.randn(4, n, 64)), q, torch.float32) for n in (128, 64))
    return ops.expert_mlp(torch.randn(1, 64), torch.tensor([[chosen]]), torch.ones(1, 1), gate_up, down, shared=shared)


def convolved(**changes: Any) -> tuple[Tensor, Tensor]:
    return ops.causal_conv1d(torch.zeros(2, 5, 8), **({"weight": torch.zeros(8, 4)} | changes))


X, Q, COMPLEX = torch.ones(2, 1, 64), torch.ones(1, 2, 3, 64), torch.ones(3, dtype=torch.complex64)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: product(torch.tensor(1.0)), "x: last dimension 0"),
    (lambda: product(torch.ones(5, 3, 64), w=W, scales=SCALES, biases=BIASES), r"x: batch axes .*\(5, 3, 64\)"),
    (lambda: product(meta(3, 64)), "quantized_matmul: w must lie on meta"),
    (lambda: product(torch.ones(3, 64), scales=meta(8, 1)), "scales must lie on cpu"),
    (lambda: ops.dequantize(W[0], SCALES[0], meta(8, 1)), "biases must lie on cpu"),
    (lambda: ops.quantize(torch.ones(4, 0)), r"w: .* got \(4, 0\)"),
    (lambda: ops.quantize(X, mode="nvfp4", global_scale=torch.ones(3)), r"global_scale: .*\(2,\), got \(3,\)"),
    (lambda: gathered(torch.ones(64), rhs=[0]), r"x: must be \(\.\.\., M, 64\).* got \(64,\)"),
    (lambda: gathered(X, rhs=[0.7, 1.2]), "rhs_indices: must be integers, got torch.float32"),
    (lambda: gathered(X, lhs=[True, False], rhs=[0, 1]), "lhs_indices: must be integers, got torch.bool"),
    (lambda: gathered(X, lhs=[0, 1], rhs=[0, 1, 2]), r"\(2,\) and \(3,\) do not broadcast"),
    (lambda: gathered(X), r"\(2,\) and \(4,\) do not broadcast"),
    (lambda: ops.gather_mm(torch.ones(4), torch.ones(4, 4)), r"inner dimensions differ: \(4,\)"),
    (lambda: ops.gather_mm(meta(2, 3, 4), torch.ones(2, 4, 5)), "b must lie on meta"),
    (lambda: ops.scaled_dot_product_attention(Q, meta(*Q.shape), Q, scale=1.0), "k must lie on cpu"),
    (lambda: ops.scaled_dot_product_attention(Q, Q, Q, scale=1.0, sinks=meta(2)), "sinks must lie on cpu"),
    (lambda: attention(ROWS.int()), "q must be floating"),
    (lambda: attention(k_cache=CACHE[:, :, :0], v_cache=CACHE[:, :, :0]), "no multiple of k_cache's"),
    (lambda: attention(k_cache=meta(*CACHE.shape)), "k_cache must lie on cpu"),
    (lambda: attention(positions=POSITIONS.float()), "positions must be int64"),
    (lambda: attention(slots=Slots(SLOTS.index[:2], SLOTS.spans)), r"slots.index must be int64 \(4,\), got .*\(2,\)"),
    (lambda: write_kv(ROWS, ROWS, meta(*CACHE.shape), CACHE, POSITIONS, SLOTS), "k_cache must lie on cpu"),
    (lambda: write_kv(ROWS, ROWS, CACHE, CACHE, POSITIONS.to(META), SLOTS), "positions must lie on cpu"),
    (lambda: stored(cos=torch.tensor(1.0)), r"cos \(\) and sin"),
    (lambda: stored(cos=ANGLES.half()), "cos and sin must be float32"),
    (lambda: stored(sin=meta(4, 1, 16)), "sin must lie on cpu"),
    (lambda: update(gamma=meta(1, 5, 2)), "gamma must lie on cpu"),
    (lambda: ops.decay(torch.ones(2), meta(3, 2), torch.ones(2)), "A_log must lie on meta"),
    (lambda: mixed(POSITIONS.float()), "positions must be int64"),
    (lambda: mixed(slots=Slots(SLOTS.index, (Span(0, 0, 9, 9),))), r"spans \[\(0, 9\)\] do not make up the 4 rows"),
    (lambda: mixed(slots=Slots(SLOTS.index, (Span(0, 0, 3, 3),))), r"spans \[\(0, 3\)\] do not make up the 4 rows"),
    (lambda: mixed(state=torch.zeros(2, 1, 16, 16).half()), "state must be float32, got torch.float16"),
    (lambda: mixed(ba=meta(4, 2)), "ba must lie on cpu"),
    (lambda: convolved(weight=meta(8, 4)), "weight must lie on cpu"),
    (lambda: convolved(state=meta(2, 3, 8)), "state must lie on cpu"),
    (lambda: ops.l2_normalize(torch.tensor(1.0)), "l2_normalize: x must have at least one dimension"),
    (lambda: ops.softmax(COMPLEX), "softmax: a must be real"),
    (lambda: ops.argmax(COMPLEX), "complex numbers have no largest"),
    (lambda: ops.topk(COMPLEX, 1), "complex numbers have no largest"),
    (lambda: ops.rotate(torch.ones(3, 4).int(), torch.ones(3, 2), torch.ones(3, 2)), "rotate: x must be floating"),
    (lambda: ops.rotate(torch.ones(3, 4), torch.ones(5, 2), torch.ones(5, 2)), r"cos \(5, 2\) does not broadcast"),
    (lambda: ops.ragged([0], [-1], [0]), r"none below 0, got \[0\], \[-1\]"),
    (lambda: ops.ragged([0, 1], [1], [0]), "one of each a sequence"),
    (lambda: experts(0, SharedExpert(nn.Identity(), nn.Identity(), torch.ones(7))), r"shared.logits: .* got \(7,\)"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_the_argument_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("chosen", [-1, 4])
def test_an_expert_that_is_not_there(chosen: int) -> None:
    with pytest.raises(IndexError, match=r"experts: values must lie in \[0, 4\)"):
        experts(chosen)


def test_no_sequences_with_sinks() -> None:
    q = torch.ones(0, 2, 3, 64)
    assert ops.scaled_dot_product_attention(q, q, q, scale=1.0, sinks=torch.ones(2)).shape == q.shape


@pytest.mark.parametrize("main", [benchmarks_run.main, benchmarks_verify.main])
def test_a_benchmark_that_is_not_there(
    main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--op", "nonsense"])
    with pytest.raises(SystemExit):
        main()
    assert "no case is called 'nonsense'" in capsys.readouterr().err
