"""How many kernels a decoder layer starts to decode: counted where they are launched, without weights or a GPU."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gfxlm.device.arch import Architecture, architecture, named
from gfxlm.engine.load import load, open_checkpoint
from gfxlm.engine.trace import ALL, layer_kind, trace
from gfxlm.kernels.launch import recording
from gfxlm.models.base import CausalLM
from gfxlm.models.load import load_model
from gfxlm.models.synthetic import PUBLISHED, synthetic_checkpoint
from gfxlm.ops.ragged import Slots, Span
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.safetensors_file import LazyTensor

META = torch.device("meta")
# Of every kind at least one: each fourth layer of Qwen3-Next is attention.
_LAYERS = 4
_LATER_LAYER = re.compile(r"model\.layers\.([4-9]|\d\d+)\.")
ARCHITECTURES = ("gfx942", "gfx1100", "gfx1151", "gfx1201", "sm_90")
CONTEXT = 4096
BARS = {"attention + MLP": 9, "attention + MoE": 11, "gated delta net + MoE": 9}


def hollow(name: str) -> CausalLM:
    """A published model down to its first layers, or the built-in one, with weights that have shapes and no numbers."""
    checkpoint = synthetic_checkpoint(name, torch.device("cpu")) if name in PUBLISHED else open_checkpoint(name)
    kept = {path: _hollow(tensor) for path, tensor in checkpoint.tensors.items() if not _LATER_LAYER.match(path)}
    config = checkpoint.config | {"num_hidden_layers": _LAYERS}
    return load_model(Checkpoint(checkpoint.folder, config, kept), device=META)


def _hollow(tensor: LazyTensor) -> LazyTensor:
    def read() -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)

    return LazyTensor(tensor.shape, tensor.dtype, read, tuple(_hollow(part) for part in tensor.parts))


class TorchKernels(TorchDispatchMode):
    """Collects torch's own operations that start something: all but views and allocations."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else [out]
        if not func.is_view and "empty" not in func.name() and any(isinstance(x, Tensor) for x in results):
            self._seen.append(func.name())
        return out


def layer_calls(model: CausalLM, rows: int, arch: Architecture) -> list[tuple[str, list[str]]]:
    """For each layer of a decode step of `rows` sequences its kind, and all that it starts, torch's work included."""
    cache = model.make_cache(rows, CONTEXT)
    index = torch.zeros(rows, dtype=torch.int64, device=META)
    slots = Slots(index, tuple(Span(row, row, row + 1, CONTEXT) for row in range(rows)))
    found: list[tuple[str, list[str]]] = []
    of_torch: list[str] = []
    hooks = []
    with torch.inference_mode(), recording(arch) as launches, TorchKernels(of_torch):

        def begin(*_: object) -> None:
            launches.clear()
            of_torch.clear()

        def end(layer: Any, *_: object) -> None:
            found.append((layer_kind(layer), [launch.kernel.__name__ for launch in launches] + of_torch))

        for layer in model.layers:
            hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
        model.forward(index, index, slots, cache)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module", params=[*PUBLISHED, "builtin"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return hollow(request.param)


def test_what_counts_as_torchs_work() -> None:
    seen: list[str] = []
    with TorchKernels(seen):
        x = torch.empty(4, 6, device=META)
        y = x.view(24)[3:].unflatten(0, (3, 7)).mT + 1
        y[0].copy_(y[1])
        torch.promote_types(x.dtype, torch.float16)
    assert seen == ["aten::add.Tensor", "aten::copy_"]


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_launches_of_a_layer(model: CausalLM, arch: str, rows: int, kv_bits: int | None) -> None:
    model = model if kv_bits is None else model.with_quantized_kv(kv_bits)
    for number, (kind, calls) in enumerate(layer_calls(model, rows, named(arch))):
        assert len(calls) <= BARS[kind], f"layer {number}, {kind}: {calls}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_runs_what_is_counted_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # memory that is filled to be found again would be counted
    arch = architecture(torch.device("cuda"))
    expected = {kind: len(calls) for kind, calls in layer_calls(hollow("builtin"), 1, arch)}
    model = load("builtin", device="cuda")[0]
    found = trace(model, tmp_path / "trace.json", depth=CONTEXT - 1)
    assert {x.kind: x.launches / x.layers for x in found if x.name == ALL and x.kind in expected} == expected
    found = trace(model, tmp_path / "trace.json", prompt=32)
    assert {x.step for x in found} == {"pp32", "tg1"}
