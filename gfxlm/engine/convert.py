"""`convert`: a transformers checkpoint to MLX's format, quantised or dense, and a quantised one back to dense."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfxlm.engine.load import Progress, open_checkpoint
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM, Tensors
from gfxlm.models.load import build, load_model
from gfxlm.ops import dequantize as dequantize_rows
from gfxlm.ops import quantize as quantize_rows
from gfxlm.ops.formats import Quantization
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.config import Config, QuantizationMap, config_dtype, normalized
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.save import TensorGroup, TensorSpec, check_output, complete_folder, write_config, write_weights
from gfxlm.weights.source import main_dtype

Predicate = Callable[[str, tuple[int, ...]], bool | Mapping[str, Any]]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
# What reads text, and what says how to generate; *.py travels along and is never run.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*.py",
)
# Few enough for the temporaries of quantisation to stay in the processor's caches.
_BLOCK_ELEMENTS = 1 << 20


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: str | Predicate | None = None,
    trust_remote_code: bool = False,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the model in `hf_path` (a folder or a hub repository) to the new folder `mlx_path` in MLX's format.

    The arguments before the star are mlx-lm's; `upload_repo` is refused. `q_group_size` and `q_bits` default to the
    mode's own; `dtype` ("float16", "bfloat16", "float32") to the config's, or to that of weights that are quantised
    already.
    `quant_predicate` is a mixed recipe's name, or a function of a matrix's path and shape that returns False to leave
    it dense, True, or its own `{"group_size": ..., "bits": ..., "mode": ...}`. `trust_remote_code` changes nothing:
    the checkpoint's code is never run. `force` replaces a model folder, `progress` is called with source bytes read
    and bytes in all.
    A model larger than memory converts: matrices are read one at a time, experts singly. Tokenizer files are copied
    byte for byte, since saving them through transformers would rewrite them in its own version's spelling.
    Raises UserError; then, as after any other exception, `mlx_path` is as it was.
    """
    if upload_repo is not None:
        raise UserError("upload_repo: nothing is uploaded; `hf upload` does that with the folder")
    if quantize and dequantize:
        raise UserError("quantize, dequantize: choose one of the two")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    default = _default_format(q_group_size, q_bits, q_mode, quant_predicate) if quantize else None
    target = Path(mlx_path).expanduser().resolve()
    check_output(target, force=force)
    checkpoint = open_checkpoint(hf_path, revision)
    if checkpoint.folder.resolve().is_relative_to(target):
        raise UserError(f"{target}: holds the model that is converted; --force does not replace that")

    _check(checkpoint)
    model, tensors = build(checkpoint)
    stored = _stored_formats(model, tensors, checkpoint.config)
    if quantize and stored:
        raise UserError(
            f"{checkpoint.folder}: quantised already; convert the unquantised model, or dequantise this one"
        )
    formats: dict[str, Quantization] = {}
    entry = _stored_entry(checkpoint.config) if stored and not dequantize else None
    if default is not None:
        formats, entry = choose_formats(model, default, quant_predicate)
    cast = DTYPES[dtype] if dtype is not None else None if stored else _float_dtype(checkpoint.config)
    if progress is not None:
        tensors = _counted(tensors, progress)
    groups = _groups(tensors, cast, formats, stored if dequantize else {})
    with complete_folder(target, force=force) as folder:
        write_config(folder, _output_config(checkpoint.config, model, entry))
        _copy_companions(checkpoint.folder, folder)
        write_weights(folder, groups, _count_parameters(model, tensors))


def _default_format(
    group_size: int | None, bits: int | None, mode: str, predicate: str | Predicate | None
) -> Quantization:
    if isinstance(predicate, str):
        if predicate not in RECIPES:
            raise UserError(f"quant_predicate: {predicate!r} is not one of {', '.join(RECIPES)}")
        if mode != "affine":
            raise UserError(f"q_mode: the recipe {predicate} needs 'affine', not {mode!r}")
    try:
        return Quantization.resolve(group_size, bits, mode)
    except ValueError as error:
        # Its message begins with the argument's name, which has a prefix here.
        raise UserError(f"q_{error}") from error


def _check(checkpoint: Checkpoint) -> None:
    """Load the model without its data, which raises UserError for any tensor that is missing, misshapen or unknown."""

    def without_data(tensor: LazyTensor) -> LazyTensor:
        return replace(tensor, read=lambda: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    if not checkpoint.tensors:
        raise UserError(f"{checkpoint.folder}: no tensors in it")
    tensors = {name: without_data(tensor) for name, tensor in checkpoint.tensors.items()}
    load_model(replace(checkpoint, tensors=tensors), device="meta")


def _counted(tensors: Tensors, progress: Progress) -> Tensors:
    """The same tensors, that report how much of them has been read."""
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def counted(tensor: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            nonlocal done
            data = tensor.read()
            done += tensor.nbytes
            progress(done, total)
            return data

        return replace(tensor, read=read, parts=tuple(map(counted, tensor.parts)))

    return {name: counted(tensor) for name, tensor in tensors.items()}


def _stored_formats(model: CausalLM, tensors: Tensors, config: Config) -> dict[str, Quantization]:
    """How each matrix that is quantised already is stored, by path."""
    quantization = QuantizationMap.parse(config)
    found = ((path, quantization.stored(path, shape[-1], tensors)) for path, shape in model.matrices())
    return {path: q for path, q in found if q is not None}


def choose_formats(
    model: CausalLM, default: Quantization, predicate: str | Predicate | None = None
) -> tuple[dict[str, Quantization], Config]:
    """The format of every matrix that is to be quantised, by path, and the config's `quantization` entry.

    As in mlx-lm, a matrix stays dense if the default's groups do not divide its inputs; so it does here for its own.
    """
    if predicate is None:
        predicate = _spare_routers(model)
    elif isinstance(predicate, str):
        predicate = _mixed(*RECIPES[predicate], len(model.layers), default.group_size)
    formats: dict[str, Quantization] = {}
    entry: Config = asdict(default)
    for path, shape in model.matrices():
        if shape[-1] % default.group_size:
            continue
        choice = predicate(path, shape)
        chosen = _resolve(path, choice) if isinstance(choice, Mapping) else default if choice else None
        if chosen is None or shape[-1] % chosen.group_size:
            continue
        formats[path] = chosen
        if isinstance(choice, Mapping):
            entry[path] = dict(choice)
    return formats, entry


def _spare_routers(model: CausalLM) -> Predicate:
    def predicate(path: str, shape: tuple[int, ...]) -> bool | Mapping[str, Any]:
        router = model.router_quantization(path)
        return True if router is None else {"group_size": router[0], "bits": router[1]}

    return predicate


def _mixed(low_bits: int, high_bits: int, layers: int, group_size: int) -> Predicate:
    """More bits for the output head, and for v_proj and down_proj of the outer layers and every third between."""

    def predicate(path: str, shape: tuple[int, ...]) -> bool | Mapping[str, Any]:
        match = re.search(r"\.layers\.(\d+)\.", path)
        number, edge = int(match[1]) if match else 0, layers // 8
        outer = number < edge or number >= 7 * layers // 8
        sensitive = ("v_proj" in path or "down_proj" in path) and (outer or (number - edge) % 3 == 2)
        bits = high_bits if sensitive or "lm_head" in path else low_bits
        return {"group_size": group_size, "bits": bits, "mode": "affine"}

    return predicate


def _resolve(path: str, choice: Mapping[str, Any]) -> Quantization:
    try:
        return Quantization.resolve(**choice)
    except (TypeError, ValueError) as error:
        raise UserError(f"quant_predicate: {path}: {error}") from error


def _stored_entry(config: Config) -> Config | None:
    entry: Config | None = config.get("quantization") or config.get("quantization_config")
    return entry


def _output_config(source: Config, model: CausalLM, quantization: Config | None) -> Config:
    """The source's config, with what mlx-lm needs besides: transformers 4's spelling, and whether the head is tied."""
    dropped = ("_name_or_path", "vision_config", "quantization", "quantization_config")
    flat = {key: value for key, value in normalized(source).items() if source.get(key) is None}
    config = {key: value for key, value in (source | flat).items() if key not in dropped}
    config["tie_word_embeddings"] = model.tied
    if quantization is not None:
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def _float_dtype(config: Config) -> torch.dtype | None:
    dtype = config_dtype(config)
    return dtype if dtype in DTYPES.values() else None


def _groups(
    tensors: Tensors,
    cast: torch.dtype | None,
    to_quantize: Mapping[str, Quantization],
    to_dequantize: Mapping[str, Quantization],
) -> list[TensorGroup]:
    """What is written, layer by layer: every tensor cast, and the matrices at those paths quantised or dequantised."""
    groups = []
    for name in sorted(tensors, key=_layer_order):
        path, _, kind = name.rpartition(".")
        if path in to_quantize and kind == "weight":
            groups.append(_quantized(path, tensors[name], cast, to_quantize[path]))
        elif path not in to_dequantize or kind == "bias":
            groups.append(_copied(name, tensors[name], cast))
        elif kind == "weight":
            q = to_dequantize[path]
            own = tensors[f"{path}.scales"].dtype if q.affine else main_dtype(tensors)
            groups.append(_dequantized(path, tensors, cast or own, q))
    return groups


def _layer_order(name: str) -> list[tuple[int, str]]:
    return [(int(step), "") if step.isdigit() else (-1, step) for step in name.split(".")]


def _cast_dtype(tensor: LazyTensor, cast: torch.dtype | None) -> torch.dtype:
    return cast if cast is not None and tensor.dtype.is_floating_point else tensor.dtype


def _copied(name: str, tensor: LazyTensor, cast: torch.dtype | None) -> TensorGroup:
    dtype = _cast_dtype(tensor, cast)
    return TensorGroup({name: TensorSpec(tensor.shape, dtype)}, lambda: ((rows.to(dtype),) for rows in _blocks(tensor)))


def _quantized(path: str, tensor: LazyTensor, cast: torch.dtype | None, q: Quantization) -> TensorGroup:
    dtype = _cast_dtype(tensor, cast)
    *leading, columns = tensor.shape
    scales = TensorSpec((*leading, columns // q.group_size), dtype if q.affine else torch.uint8)
    specs = {
        f"{path}.weight": TensorSpec((*leading, q.packed_columns(columns)), torch.uint32),
        f"{path}.scales": scales,
    }
    if q.affine:
        specs[f"{path}.biases"] = scales

    def blocks() -> Iterator[tuple[Tensor, ...]]:
        for rows in _blocks(tensor):
            yield quantize_rows(rows.to(dtype), q.group_size, q.bits, q.mode)

    return TensorGroup(specs, blocks)


def _dequantized(path: str, tensors: Tensors, dtype: torch.dtype, q: Quantization) -> TensorGroup:
    names = (f"{path}.{kind}" for kind in ("weight", "scales", "biases"))
    stored = [tensors[name] for name in names if name in tensors]
    *leading, groups = stored[1].shape
    columns = groups * q.group_size

    def blocks() -> Iterator[tuple[Tensor, ...]]:
        rows = max(1, _BLOCK_ELEMENTS // columns)
        for w, scales, *biases in zip(*(t.read().flatten(0, -2).split(rows) for t in stored), strict=True):
            bias = biases[0] if biases else None
            yield (dequantize_rows(w, scales, bias, q.group_size, q.bits, q.mode, dtype=dtype),)

    return TensorGroup({f"{path}.weight": TensorSpec((*leading, columns), dtype)}, blocks)


def _blocks(tensor: LazyTensor) -> Iterator[Tensor]:
    """The rows of a tensor in order, not too many at once. Stacked experts are read one by one."""
    for part in tensor.parts or (tensor,):
        data = part.read()
        rows = data.flatten(0, -2) if data.ndim > 1 else data[None]
        yield from rows.split(max(1, _BLOCK_ELEMENTS // max(1, rows.shape[-1])))


def _count_parameters(model: CausalLM, tensors: Tensors) -> int:
    """Numbers that the model has, whatever the bits each is stored in."""
    matrices = dict(model.matrices())
    packed = {f"{path}.{kind}" for path in matrices for kind in ("weight", "scales", "biases")}
    others = (tensor for name, tensor in tensors.items() if name not in packed)
    return sum(map(prod, matrices.values())) + sum(prod(tensor.shape) for tensor in others)


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
