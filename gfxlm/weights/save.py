"""Writing a model folder: safetensors shards filled block by block, their index, and config.json; all or nothing."""

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.weights.config import Config
from gfxlm.weights.safetensors_file import DTYPES

MAX_SHARD_BYTES = 5 << 30
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor will be, before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that are computed together. Each block is the next run of rows of every one, in the order of `specs`."""

    specs: Mapping[str, TensorSpec]
    blocks: Callable[[], Iterator[Sequence[Tensor]]]


def write_weights(
    folder: Path, groups: Sequence[TensorGroup], total_parameters: int, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write shards and index into `folder`, with mlx-lm's file names, grouping and metadata.

    Holds one block at a time: every shard has its header and full length before the first tensor is computed.
    Raises UserError where the disk has too little room for all of them.
    """
    specs = {name: spec for group in groups for name, spec in group.specs.items()}
    total_size = sum(spec.nbytes for spec in specs.values())
    if total_size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"disk full: the weights take {total_size:,} bytes, the disk of {folder.parent} has {free:,} free"
        )
    places = _create_shards(folder, specs, max_shard_bytes)
    for group in groups:
        _fill(places, group)
    if unfinished := [name for name, place in places.items() if place.start != place.stop]:
        raise ValueError(f"blocks: rows are missing for {', '.join(unfinished)}")
    index = {
        "metadata": {"total_size": total_size, "total_parameters": total_parameters},
        "weight_map": {name: places[name].file.name for name in sorted(places)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4), encoding="utf-8")


@dataclass(slots=True)
class _Place:
    """Where the rest of a tensor goes: the bytes of `file` from `start` to `stop`."""

    file: Path
    start: int
    stop: int

    def append(self, rows: Tensor, dtype: torch.dtype) -> None:
        if rows.dtype != dtype or self.start + rows.nbytes > self.stop:
            raise ValueError(f"rows: {rows.dtype} {tuple(rows.shape)} is not what was planned")
        with self.file.open("r+b") as file:
            file.seek(self.start)
            file.write(rows.contiguous().flatten().view(torch.uint8).numpy().data)
        self.start += rows.nbytes


def _fill(places: Mapping[str, _Place], group: TensorGroup) -> None:
    # A function of its own, so that the last block's memory is free before the next group is read.
    for block in group.blocks():
        for (name, spec), rows in zip(group.specs.items(), block, strict=True):
            places[name].append(rows, spec.dtype)


def _create_shards(folder: Path, specs: Mapping[str, TensorSpec], max_bytes: int) -> dict[str, _Place]:
    """Create all files with their headers and without their data; returns where each tensor's data go."""
    shards: list[dict[str, TensorSpec]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    places: dict[str, _Place] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        places |= _create_shard(folder / name, shard)
    return places


def _create_shard(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, _Place]:
    # Wide types first, so that each tensor is aligned to its own type.
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    offsets = [0]
    for name in names:
        offsets.append(offsets[-1] + specs[name].nbytes)
    ranges = dict(zip(names, pairwise(offsets), strict=True))
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    for name, data_offsets in ranges.items():
        spec = specs[name]
        header[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": data_offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(data + offsets[-1])
    return {name: _Place(path, data + start, data + stop) for name, (start, stop) in ranges.items()}


def write_config(folder: Path, config: Config) -> None:
    """Write config.json, sorted, with non-finite numbers tagged: JSON has none."""
    text = json.dumps(_tag_floats(dict(sorted(config.items()))), indent=4, allow_nan=False)
    (folder / "config.json").write_text(text, encoding="utf-8")


def _tag_floats(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _tag_floats(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_tag_floats(entry) for entry in value]
    return value


def check_output(path: Path, *, force: bool) -> None:
    """Raise UserError where `path` exists, or, with `force`, where it is neither a model folder nor empty."""
    if not path.exists():
        return
    if not force:
        raise UserError(f"{path}: exists already; name another folder, or replace this one with --force")
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; --force replaces nothing else")
    is_model = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    if not is_model and any(path.iterdir()):
        raise UserError(f"{path}: not a model folder (config.json and *.safetensors); --force replaces nothing else")


@contextmanager
def complete_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the body ends, and vanishes on an error.

    Raises what `check_output` raises, should `path` have come to be meanwhile, and UserError for an OSError, one that
    begins with "disk full" where that is what it means.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in [*partial.rglob("*"), partial]:
            _sync(file)
        check_output(path, force=force)
        _install(partial, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full: {path} was not written") from error
        raise UserError(f"{error.filename or path}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)
