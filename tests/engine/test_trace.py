"""What `trace` counts, on a trace written by hand and on the CPU's own."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import gfxlm
from gfxlm.engine.trace import ALL, REST, Share, layer_kind, shares, trace
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM, DecoderLayer
from tests.checkpoints import mlx_checkpoint


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def test_kernels_belong_to_the_layer_that_launched_them() -> None:
    """The GPU is behind the host: its work for the first layer is done while the host is in the second."""
    torch_kernel = "void at::native::elementwise_kernel<128, 2, at::native::f(int)::{lambda}>(int, int)"
    events = [
        event("user_annotation", "tg1", 100, 100),
        event("user_annotation", "layer 0", 110, 20),
        event("user_annotation", "layer 1", 140, 20),
        event("cpu_op", "aten::add", 111, 9),
        event("cuda_runtime", "cudaLaunchKernel", 112, 3, 1),
        event("cuda_driver", "cuLaunchKernelEx", 120, 3, 2),
        event("cuda_driver", "cuLaunchKernelEx", 145, 3, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 135, 3, 4),
        event("cuda_runtime", "cudaLaunchKernel", 90, 3, 5),
        event("cuda_runtime", "cudaDeviceSynchronize", 210, 90, 6),
        event("kernel", torch_kernel, 142, 2, 1),
        event("kernel", "matvec_kernel", 145, 7, 2),
        event("kernel", "matvec_kernel", 180, 8, 3),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 170, 1, 4),
        event("kernel", "before", 120, 50, 5),
        event("gpu_user_annotation", "layer 0", 142, 30),
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 112, "id": 1},
    ]
    found = shares(events, {"tg1": 1}, {"layer 0": "dense", "layer 1": "dense"})
    assert found == [
        Share("tg1", 1, "dense", 2, ALL, 3, 17),
        Share("tg1", 1, "dense", 2, "matvec_kernel", 2, 15),
        Share("tg1", 1, "dense", 2, "at::native::elementwise_kernel", 1, 2),
        Share("tg1", 1, REST, 1, ALL, 1, 1),
        Share("tg1", 1, REST, 1, "Memcpy HtoD", 1, 1),
        Share("tg1", 1, ALL, 1, ALL, 4, 18),
    ]


def test_operators_are_counted_once_without_a_gpu() -> None:
    events = [
        event("user_annotation", "pp4", 0, 100),
        event("user_annotation", "layer 0", 10, 50),
        event("cpu_op", "aten::linear", 20, 20),
        event("cpu_op", "aten::mm", 22, 10),
        event("cpu_op", "aten::copy_", 33, 5),
        event("cpu_op", "aten::mm", 41, 4),
        event("cpu_op", "aten::argmax", 70, 6),
    ]
    found = shares(events, {"pp4": 4}, {"layer 0": "dense"})
    assert [(x.kind, x.name, x.launches, x.microseconds) for x in found] == [
        ("dense", ALL, 2, 24),
        ("dense", "aten::linear", 1, 20),
        ("dense", "aten::mm", 1, 4),
        (REST, ALL, 1, 6),
        (REST, "aten::argmax", 1, 6),
        (ALL, ALL, 3, 30),
    ]


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return gfxlm.load(mlx_checkpoint(request.param), device="cpu")[0]


def kinds(model: CausalLM) -> list[str]:
    return [layer_kind(layer) for layer in model.layers if isinstance(layer, DecoderLayer)]


def test_kinds() -> None:
    expected = {
        "qwen3": ["attention + MLP"] * 2,
        "qwen3_moe": ["attention + MoE"] * 2,
        "qwen3_next": ["gated delta net + MoE"] * 3 + ["attention + MoE"],
    }
    for family, names in expected.items():
        assert kinds(gfxlm.load(mlx_checkpoint(family), device="cpu")[0]) == names


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_trace(model: CausalLM, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    found = trace(model, path, prompt=6, depth=3)
    whole = [share for share in found if share.name == ALL]
    by_kind = list(dict.fromkeys(kinds(model)))
    assert [(x.step, x.tokens, x.kind) for x in whole] == [
        (step, tokens, kind) for step, tokens in (("pp6 @ d3", 6), ("tg1 @ d3", 1)) for kind in (*by_kind, REST, ALL)
    ]
    sums: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0])
    for share in found:
        if share.name != ALL:
            for kind in (share.kind, ALL):
                sums[share.step, kind][0] += share.launches
                sums[share.step, kind][1] += share.microseconds
    for share in whole:
        assert [share.launches, share.microseconds] == pytest.approx(sums[share.step, share.kind])
        assert share.layers == (kinds(model).count(share.kind) or 1)
    with gzip.open(path) if name.endswith("gz") else path.open() as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"pp6 @ d3", "tg1 @ d3", "layer 0", f"layer {len(model.layers) - 1}"} <= names


def test_several_sequences(model: CausalLM, tmp_path: Path) -> None:
    found = trace(model, tmp_path / "trace.json", prompt=3, sequences=4)
    assert {(share.step, share.tokens) for share in found} == {("pp3", 12), ("tg1", 4)}


def test_decoding_alone_leaves_no_hooks(model: CausalLM, tmp_path: Path) -> None:
    assert {share.step for share in trace(model, tmp_path / "trace.json")} == {"tg1"}
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers)


def test_a_file_that_cannot_be_written(model: CausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not written: No such file"):
        trace(model, tmp_path / "no" / "trace.json")
