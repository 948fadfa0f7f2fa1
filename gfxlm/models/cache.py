"""mlx-lm's functions on prompt caches, quantised ones and files among them."""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.kernels.attention.store import Quantized
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache, Identity, KVCache, KVFormat, LayerCache, QuantizedKVCache, RecurrentCache, kv_format
from gfxlm.nn.ring import KEPT, Ring, rearranged
from gfxlm.weights.safetensors_file import LazyTensor, open_safetensors

_DEFAULT_CONTEXT = 32768
_FILE_FORMAT = "gfxlm prompt cache 1"
# In the order of the layers' `tensors`.
_PARTS = {
    "KVCache": ("keys", "values"),
    "QuantizedKVCache": ("keys.codes", "keys.scales", "values.codes", "values.scales"),
    "RecurrentCache": ("conv", "state"),
}


def make_prompt_cache(model: CausalLM, max_kv_size: int | None = None) -> Cache:
    """An empty cache for one conversation, of as many positions as the model was made for, at most 32768.

    With `max_kv_size` the text may have all of these, and keys and values of its first 4 positions and its newest ones
    are kept, so many in all; see `CausalLM.with_rotating_kv`. `model.with_quantized_kv()` makes quantised caches.
    """
    model = KVOptions(max_kv_size=max_kv_size).model_for(model, 0)
    return model.make_cache(1, default_context(model))


def default_context(model: CausalLM) -> int:
    """Positions of a cache of which nobody says how many it should have."""
    limit = model.config.max_position_embeddings
    return limit if model.max_kv_size else min(limit, _DEFAULT_CONTEXT)


def can_trim_prompt_cache(cache: Cache) -> bool:
    """True unless a layer has a recurrent state, which cannot be wound back, or `max_kv_size` positions are there."""
    return cache.trimmable


def trim_prompt_cache(cache: Cache, num_tokens: int) -> int:
    """Forget the last `num_tokens` positions; returns how many were there to forget, 0 where trimming is impossible."""
    if num_tokens < 0:
        raise UserError(f"num_tokens must not be negative, but is {num_tokens}")
    if not cache.trimmable:
        return 0
    trimmed = min(num_tokens, cache.lengths[0])
    cache.lengths[0] -= trimmed
    return trimmed


@dataclass(frozen=True)
class KVOptions:
    """mlx-lm's options for keys and values: how many (None: all), and in 4 or 8 bits (None: as they are).

    `max_kv_size` is as in `CausalLM.with_rotating_kv`; groups that share a scale are of 32, 64 or 128. A cache stays
    where and as it is for a whole request. So mlx-lm's `quantized_kv_start` means here: where it may grow beyond so
    many positions, which a rotating one does up to its size, it is quantised from the first one, else not at all.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        if self.kv_bits is not None:
            KVFormat(self.kv_bits, self.kv_group_size)
        if self.quantized_kv_start < 0:
            raise UserError(f"quantized_kv_start must not be negative, but is {self.quantized_kv_start}")
        if self.max_kv_size is not None:
            Ring(self.max_kv_size)

    def format_for(self, context: int) -> KVFormat | None:
        """How a cache that may grow to `context` positions is quantised, None where it is not."""
        if self.kv_bits is None or min(context, self.max_kv_size or context) <= self.quantized_kv_start:
            return None
        return KVFormat(self.kv_bits, self.kv_group_size)

    def model_for(self, model: CausalLM, context: int) -> CausalLM:
        """The model that makes the right caches for up to `context` positions."""
        if self.max_kv_size is not None:
            model = model.with_rotating_kv(self.max_kv_size)
        if self.kv_bits is None:
            return model
        quantizing = model.with_quantized_kv(self.kv_bits, self.kv_group_size)  # which finds what cannot be
        return quantizing if self.format_for(context) else model

    def prepare(self, cache: Cache, model: CausalLM, context: int) -> None:
        """Make a cache from outside one for this model, that may grow to `context` positions.

        UserError for a cache that another kind of model made, of another size, or quantised in another way already.
        """
        model.check_cache(cache)
        if self.max_kv_size is not None and cache.places != min(self.max_kv_size, cache.max_context):
            raise UserError(
                f"max_kv_size is {self.max_kv_size}, but the prompt cache holds up to {cache.places} positions; "
                "make_prompt_cache makes it of that size"
            )
        cache.move(model.device)
        if self.kv_bits is None:
            return
        wanted = KVFormat(self.kv_bits, self.kv_group_size)
        stored = any(kv_format(layer) for layer in cache.layers)
        if stored or min(context, cache.places) > self.quantized_kv_start:
            cache.quantize(wanted)


def save_prompt_cache(file_name: str | Path, cache: Cache, metadata: Mapping[str, str] | None = None) -> None:
    """Write a prompt cache to a safetensors file: what it holds, which model it is of, and `metadata`.

    The file comes into being complete or not at all. Raises UserError where it cannot be written.
    """
    if len(cache.lengths) != 1:
        raise UserError(f"a prompt cache has one slot, this cache has {len(cache.lengths)}")
    if cache.identity is None:
        raise UserError("this cache does not say which model it is of; make_prompt_cache makes one that does")
    identity, length = cache.identity(), cache.lengths[0]
    tensors = {"model": identity.sample}
    for number, layer in enumerate(cache.layers):
        for part, tensor in zip(_PARTS[type(layer).__name__], layer.tensors, strict=True):
            rows = tensor[0] if isinstance(layer, RecurrentCache) else cache.stored(tensor, 0)
            tensors[f"layers.{number}.{part}"] = rows.contiguous().cpu()
    kv = next((f for f in map(kv_format, cache.layers) if f is not None), KVFormat())
    header = {
        "length": length,
        "max_context": cache.max_context,
        "max_kv_size": None if cache.ring is None else cache.ring.size,
        "layers": [type(layer).__name__ for layer in cache.layers],
        "bits": kv.bits,
        "group_size": kv.group_size,
        "config": identity.config,
        "metadata": dict(metadata or {}),
    }
    _write(Path(file_name), tensors, {"format": _FILE_FORMAT, "cache": json.dumps(header)})


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")
    if path.is_dir():
        raise UserError(f"{path}: is a folder")
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@overload
def load_prompt_cache(
    file_name: str | Path,
    return_metadata: Literal[False] = ...,
    *,
    model: CausalLM | None = ...,
    max_context: int | None = ...,
    max_kv_size: int | None = ...,
) -> Cache: ...


@overload
def load_prompt_cache(
    file_name: str | Path,
    return_metadata: Literal[True],
    *,
    model: CausalLM | None = ...,
    max_context: int | None = ...,
    max_kv_size: int | None = ...,
) -> tuple[Cache, dict[str, str]]: ...


def load_prompt_cache(
    file_name: str | Path,
    return_metadata: bool = False,
    *,
    model: CausalLM | None = None,
    max_context: int | None = None,
    max_kv_size: int | None = None,
) -> Cache | tuple[Cache, dict[str, str]]:
    """Read what `save_prompt_cache` wrote: the cache, for texts of up to `max_context` (as it was), and metadata.

    With `max_kv_size` it keeps keys and values of so many positions, as `make_prompt_cache` says (as it did). With
    `model`, the cache comes to its device, and one that another model made is refused. Without, it lies on the CPU
    until it is used, and only a model of other shapes will refuse it.
    Raises UserError for a file that is no prompt cache, or that has more than `max_context` positions, or has
    forgotten some that a larger `max_kv_size` would hold.
    """
    path = Path(file_name)
    tensors = open_safetensors(path)
    header = _Header.read(path)
    stored = Identity(header.config, _tensor(path, tensors, "model").read())
    if model is not None and not stored.matches(model.identity):
        raise UserError(f"{path}: the prompt cache of another model than this {model.config.model_type}")
    context = header.max_context if max_context is None else max_context
    if context < header.length:
        raise UserError(f"{path}: holds {header.length} positions, which do not fit into {context}")
    size = header.max_kv_size if max_kv_size is None else Ring(max_kv_size).size
    ring = Ring(size) if size and size < context else None
    try:
        order = rearranged(header.length, header.ring, ring, torch.device("cpu"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    layers = []
    for number, kind in enumerate(header.layers):
        parts = [_tensor(path, tensors, f"layers.{number}.{part}") for part in _PARTS[kind]]
        layers.append(_layer(path, kind, parts, header, context if ring is None else ring.size, order))
    cache = Cache(layers, [header.length], context, lambda: stored, ring=ring)
    if model is not None:
        try:
            model.check_cache(cache)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        cache.move(model.device)
    return (cache, header.metadata) if return_metadata else cache


def prompt_cache_metadata(file_name: str | Path) -> dict[str, str]:
    """The metadata of a prompt cache's file, without its data. Raises UserError for a file that is none."""
    return _opened(file_name).metadata


def prompt_cache_size(file_name: str | Path) -> int | None:
    """The `max_kv_size` of a prompt cache's file, None if it holds everything. UserError as above."""
    return _opened(file_name).max_kv_size


def _opened(file_name: str | Path) -> "_Header":
    open_safetensors(Path(file_name))
    return _Header.read(Path(file_name))


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says about the tensors in it."""

    length: int
    max_context: int
    layers: Sequence[str]
    format: KVFormat
    config: str
    metadata: dict[str, str]
    max_kv_size: int | None

    @property
    def ring(self) -> Ring | None:
        """In which the keys and values lie."""
        return None if self.max_kv_size is None else Ring(self.max_kv_size)

    @property
    def held(self) -> int:
        """Of how many positions there are keys and values."""
        return min(self.length, self.max_kv_size or self.length)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a file that is known to be safetensors."""
        with safe_open(path, framework="pt") as file:
            texts: dict[str, str] = file.metadata() or {}
        if texts.get("format") != _FILE_FORMAT:
            raise UserError(f"{path}: not a prompt cache of gfxlm's; `gfxlm cache-prompt` makes one")
        try:
            header: Any = json.loads(texts["cache"])
        except (KeyError, ValueError):
            header = None
        match header:
            case {
                "length": int(length),
                "max_context": int(max_context),
                "layers": [*layers],
                "bits": int(bits),
                "group_size": int(group_size),
                "config": str(config),
                "metadata": dict(metadata),
                **others,
            } if 0 <= length <= max_context and all(kind in _PARTS for kind in layers):
                size = others.get("max_kv_size")  # which files from before there were any do not have
                if size is None or (isinstance(size, int) and size > KEPT):
                    kv = KVFormat(bits, group_size)
                    return cls(length, max_context, layers, kv, config, dict(metadata), size)
        raise UserError(f"{path}: corrupt: it does not say what is in it")


def _tensor(path: Path, tensors: Mapping[str, LazyTensor], name: str) -> LazyTensor:
    if name not in tensors:
        raise UserError(f"{path}: corrupt: tensor {name} is missing")
    return tensors[name]


def _layer(
    path: Path, kind: str, parts: Sequence[LazyTensor], header: _Header, places: int, order: Tensor | None
) -> LayerCache:
    if kind == RecurrentCache.__name__:
        conv, state = (part.read()[None] for part in parts)
        return RecurrentCache(conv, state)
    stores = []
    for part in parts:
        if not part.shape or part.shape[0] != header.held:
            raise UserError(f"{path}: corrupt: a tensor of shape {part.shape} where {header.held} positions belong")
        store = torch.empty(1, places, *part.shape[1:], dtype=part.dtype)
        rows = part.read() if order is None else part.read()[order]
        store[0, : len(rows)] = rows
        stores.append(store)
    if kind == KVCache.__name__:
        return KVCache(stores[0], stores[1])
    bits, group_size = header.format.bits, header.format.group_size
    keys, key_scales, values, value_scales = stores
    return QuantizedKVCache(
        Quantized(keys, key_scales, bits, group_size), Quantized(values, value_scales, bits, group_size)
    )
