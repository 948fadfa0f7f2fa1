"""The self-test: whether a device computes a model's layers as float64 on the CPU says it should.

Silent wrong text is the worst that a driver, a compiler or a kernel can do to a user. One layer of each kind is tried,
with its own weights, on a short prompt and then on one token more: `engine.trial` has the steps.
"""

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from gfxlm import __version__
from gfxlm.device.arch import gpu_name
from gfxlm.device.files import cache_folder, write_whole
from gfxlm.device.notice import notice
from gfxlm.device.threads import single_thread
from gfxlm.device.versions import versions
from gfxlm.engine.trial import Fault, Trial
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM, DecoderLayer
from gfxlm.weights.weight import DenseWeight, MergedWeight, PackedWeight, Weight


@torch.inference_mode()
def check(model: CausalLM) -> list[Fault]:
    """Run one layer of each kind of the model, its head and the sampler on its device: what is wrong there."""
    model = copy.copy(model)
    model.max_kv_size = None  # where positions lie in a ring is nothing that a device could get wrong
    with single_thread(True):  # thousands of small operations: on many threads they wait for each other
        trial = Trial(model)
        for number, layer in different_layers(model):
            trial.layer(number, layer)
        trial.angles()
        trial.head()
        trial.sampling()
    return trial.faults


def require(model: CausalLM) -> None:
    """Raise UserError if the model's GPU gets it wrong. Asked once for each kind of model, GPU, driver and version."""
    if model.device.type != "cuda":
        return
    path, key = cache_folder() / "self-test.json", _key(model)
    passed = _read(path)
    if key in passed:
        return
    notice(
        "checking this GPU's numbers, one layer of each kind, once for such a model, this driver and these versions: "
        "up to a minute while kernels are compiled"
    )
    if faults := check(model):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise UserError(
            f"{gpu_name(model.device)} computes wrong numbers, and text would be wrong: {faults[0]}{more}; "
            "gfxlm doctor says more, --no-self-test goes on all the same"
        )
    with contextlib.suppress(OSError):  # where nothing can be written, the next load asks once more
        write_whole(path, json.dumps(sorted({*passed, key})))


def different_layers(model: CausalLM) -> Iterator[tuple[int, DecoderLayer]]:
    """The first layer of each kind, with its number: kinds differ in modules, or in shapes or formats of weights."""
    seen = set()
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        if (kind := _kind(layer)) not in seen:
            seen.add(kind)
            yield number, layer


def _kind(layer: DecoderLayer) -> str:
    parts = [f"window {getattr(layer.mixer, 'window', None)}"]
    for name, module in layer.named_modules():
        held = vars(module).values()
        parts += [f"{name} {type(module).__name__}", *(_format(x) for x in held if isinstance(x, Weight))]
    return "; ".join(parts)


def _format(weight: Weight) -> str:
    match weight:
        case MergedWeight():
            return " + ".join(map(_format, weight.parts))
        case PackedWeight():
            return f"{weight.shape} {weight.quantization}"
        case DenseWeight():
            return f"{weight.shape} {weight.tensor.dtype}"
    raise TypeError(f"a {type(weight).__name__} has no format")


def _key(model: CausalLM) -> str:
    """What a verdict holds for."""
    kinds = [_kind(layer) for _, layer in different_layers(model)]
    device = torch.cuda.get_device_properties(model.device).name
    parts = (gpu_name(model.device), device, versions(), __version__, str(model.dtype), str(model.kv_format), kinds)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read(path: Path) -> list[str]:
    """Keys of what has passed; none where the file is not what was written."""
    try:
        passed = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [key for key in passed if isinstance(key, str)] if isinstance(passed, list) else []
