"""From a checkpoint to a model in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gfxlm.device import tunable
from gfxlm.device.gemm_probe import ensure
from gfxlm.errors import UserError
from gfxlm.models import model_class
from gfxlm.models.base import CausalLM, Tensors
from gfxlm.models.config import ModelConfig
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.config import QuantizationMap, config_dtype, normalized
from gfxlm.weights.source import WeightSource, main_dtype


def build(checkpoint: Checkpoint, overrides: dict[str, Any] | None = None) -> tuple[CausalLM, Tensors]:
    """The model without weights, and the tensors in MLX's names. `overrides` are config entries that win."""
    config = normalized(checkpoint.config | (overrides or {}))
    with _named(checkpoint.folder):
        if "model_file" in config:
            raise UserError(f"needs its own Python code ({config['model_file']}), which gfxlm never runs")
        family = model_class(config["model_type"])
        args: ModelConfig = family.Config.from_dict(config)
        tensors = family.sanitize(dict(checkpoint.tensors), args)
        tied = args.tie_word_embeddings
        if tied is None:
            tied = "lm_head.weight" not in tensors
        if tied:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
        return family(args, tied=tied), tensors


def load_model(
    checkpoint: Checkpoint,
    *,
    overrides: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda nbytes: None,
) -> CausalLM:
    """Build the model and read its weights onto `device`; `progress` is called with the bytes of each tensor read.

    `dtype` is the type of activations, scales and biases, that of `default_dtype` where none is given.
    Raises UserError where the checkpoint lacks a tensor, has one of the wrong shape, or one the model does not know.
    """
    model, tensors = build(checkpoint, overrides)
    read_weights(model, tensors, checkpoint, dtype=dtype, device=device, progress=progress)
    return model


def read_weights(
    model: CausalLM,
    tensors: Tensors,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """The second half of `load_model`, for what `build` returned."""
    device = torch.device(device)
    dtype = dtype or default_dtype(checkpoint.config, tensors, device)
    if device.type == "cuda" and torch.version.hip:  # NVIDIA's libraries are not known to be wrong anywhere
        ensure(device)
        tunable.load(device)
    with _named(checkpoint.folder):
        quantization = QuantizationMap.parse(checkpoint.config)
        source = WeightSource(tensors, quantization, dtype=dtype, device=device, progress=progress)
        model.load(source)
        if untouched := source.untouched():
            shown = ", ".join(untouched[:3]) + (f" and {len(untouched) - 3} more" if len(untouched) > 3 else "")
            raise UserError(f"tensors that {model.config.model_type} does not have: {shown}")


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors about a model's content begin with its folder, unless they name a file in it already."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(folder)):
            raise
        raise UserError(f"{folder}: {error}") from error


def default_dtype(config: dict[str, Any], tensors: Tensors, device: torch.device) -> torch.dtype:
    """The checkpoint's own float type.

    A quantised float16 checkpoint runs in bfloat16 on a CPU, whose int4 kernel is fast in that type alone.
    """
    dtype = main_dtype(tensors) if tensors else config_dtype(config) or torch.bfloat16
    quantised = any(name.endswith(".scales") for name in tensors)
    return torch.bfloat16 if dtype == torch.float16 and quantised and device.type == "cpu" else dtype
