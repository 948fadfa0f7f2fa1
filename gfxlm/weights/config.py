"""config.json: both spellings that transformers has used, and MLX's quantization map."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from gfxlm.errors import UserError
from gfxlm.ops.formats import MODES, Quantization
from gfxlm.weights.safetensors_file import LazyTensor

Config = dict[str, Any]
_TAGGED_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_json(path: Path) -> Config:
    """A JSON object from a file. Raises UserError with the place where the text is not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_untag_float)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _untag_float(value: Config) -> Any:
    """Undo `{"__float__": "Infinity"}`, which keeps non-finite numbers inside valid JSON."""
    tag = value.get("__float__")
    return _TAGGED_FLOATS.get(tag, value) if len(value) == 1 and isinstance(tag, str) else value


def read_config(folder: Path) -> Config:
    """A model folder's config.json, with the end-of-text ids of generation_config.json, which win in mlx-lm too."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a model folder (no config.json in it)")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path}: no model_type")
    eos = read_generation_config(folder).get("eos_token_id")
    return config if eos is None else {**config, "eos_token_id": eos}


def read_generation_config(folder: Path) -> Config:
    """generation_config.json, or an empty object where there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def normalized(config: Config) -> Config:
    """The config in transformers 4's flat spelling, whichever of the two it was written in, without its nulls."""
    flat = {key: value for key, value in config.items() if value is not None}
    rope = flat.pop("rope_parameters", None)
    if isinstance(rope, dict):
        rest = dict(rope)
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rest:
                flat.setdefault(key, rest.pop(key))
        if rest.get("rope_type", "default") != "default":
            flat.setdefault("rope_scaling", rest)
    if "num_local_experts" in flat:
        flat.setdefault("num_experts", flat["num_local_experts"])
    return flat


def config_dtype(config: Config) -> torch.dtype | None:
    """The float type the config names, None where it names none."""
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


@dataclass(frozen=True, slots=True)
class QuantizationMap:
    """The `quantization` entry of a config: overrides by module path; everything else is read off the shapes."""

    overrides: Mapping[str, Quantization]

    @classmethod
    def parse(cls, config: Config) -> "QuantizationMap":
        """Read `quantization`, or `quantization_config` as MLX writes it. Raises UserError for a foreign format."""
        key = "quantization" if config.get("quantization") else "quantization_config"
        entry = config.get(key) or {}
        if not isinstance(entry, dict):
            raise UserError(f"config.json: {key} is not an object")
        if "quant_method" in entry:
            raise UserError(
                f"quantised with {entry['quant_method']!r}, which is not an MLX format; convert the unquantised model "
                "with `gfxlm convert -q` instead"
            )
        return cls({path: _override(path, value) for path, value in entry.items() if isinstance(value, dict)})

    def stored(self, path: str, columns: int, tensors: Mapping[str, LazyTensor]) -> Quantization | None:
        """How the matrix at `path` with `columns` inputs lies among these tensors, None where it is not quantised.

        The scales' presence decides. Raises UserError as `of` does.
        """
        w, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if w is None or scales is None:
            return None
        words, groups = (tensor.shape[-1] if tensor.shape else 0 for tensor in (w, scales))
        return self.of(path, columns, words, groups, scales.dtype)

    def of(self, path: str, columns: int, words: int, groups: int, scales_dtype: torch.dtype) -> Quantization:
        """How the matrix at `path` with `columns` inputs is stored, from its own entry or from its shapes.

        `words` and `groups` are the last dimensions of its weight and scales. Raises UserError on contradiction.
        """
        found = self.overrides.get(path) or self._inferred(path, columns, words, groups, scales_dtype)
        fits = found.packed_columns(columns) == words and groups * found.group_size == columns
        if not fits or found.affine == (scales_dtype == torch.uint8):
            raise UserError(
                f"{path}: {found.mode}, {found.bits} bits in groups of {found.group_size}, contradicts the tensors: "
                f"{columns} inputs in {words} words with {groups} scales of {scales_dtype}"
            )
        return found

    @staticmethod
    def _inferred(path: str, columns: int, words: int, groups: int, scales_dtype: torch.dtype) -> Quantization:
        group_size, bits = columns // max(groups, 1), words * 32 // columns
        modes = MODES[1:] if scales_dtype == torch.uint8 else MODES[:1]
        for mode in modes:
            try:
                return Quantization.resolve(group_size, bits, mode)
            except ValueError:
                continue
        raise UserError(
            f"{path}: {columns} inputs in {words} words with {groups} scales of {scales_dtype} would be {bits} bits in "
            f"groups of {group_size}, which MLX does not have"
        )


def _override(path: str, value: Config) -> Quantization:
    for key, kind in (("group_size", int), ("bits", int), ("mode", str)):
        if type(value.get(key)) not in (kind, NoneType):
            raise UserError(f"config.json: quantization of {path}: {key} cannot be {value[key]!r}")
    # A missing mode means affine whatever the global mode is; a null group size means the mode's default.
    try:
        return Quantization.resolve(value.get("group_size"), value.get("bits"), value.get("mode") or "affine")
    except ValueError as error:
        raise UserError(f"config.json: quantization of {path}: {error}") from error
