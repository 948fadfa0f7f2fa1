"""`load`: a model and its tokenizer, ready to generate."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, overload

import torch

from gfxlm.device.memory import parsed_bytes
from gfxlm.device.select import pick_device
from gfxlm.engine.budget import LEAST_CONTEXT, planned
from gfxlm.engine.self_test import require
from gfxlm.engine.tokenizer import Tokenizer, load_tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
from gfxlm.models.cache import KVOptions
from gfxlm.models.load import build, read_weights
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.config import Config, read_generation_config

BUILT_IN = "builtin"
Progress = Callable[[int, int], None]


def built_in_folder() -> Path:
    """The folder of the model that ships with the package."""
    return Path(__file__).parent.parent / "data" / "builtin"


def open_checkpoint(path_or_hf_repo: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a folder, a hub repository, or the built-in model under its name "builtin"."""
    return Checkpoint.open(built_in_folder() if path_or_hf_repo == BUILT_IN else path_or_hf_repo, revision)


@overload
def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: Config | None = ...,
    model_config: Config | None = ...,
    adapter_path: str | None = ...,
    lazy: bool = ...,
    return_config: Literal[False] = ...,
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    *,
    dtype: torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    memory_limit: str | int | None = ...,
    self_test: bool = ...,
    max_context: int | None = ...,
    kv: KVOptions | None = ...,
    progress: Progress | None = ...,
) -> tuple[CausalLM, Tokenizer]: ...


@overload
def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: Config | None = ...,
    model_config: Config | None = ...,
    adapter_path: str | None = ...,
    lazy: bool = ...,
    *,
    return_config: Literal[True],
    revision: str | None = ...,
    trust_remote_code: bool = ...,
    dtype: torch.dtype | None = ...,
    device: str | torch.device | None = ...,
    memory_limit: str | int | None = ...,
    self_test: bool = ...,
    max_context: int | None = ...,
    kv: KVOptions | None = ...,
    progress: Progress | None = ...,
) -> tuple[CausalLM, Tokenizer, Config]: ...


def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: Config | None = None,
    model_config: Config | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory_limit: str | int | None = None,
    self_test: bool = True,
    max_context: int | None = None,
    kv: KVOptions | None = None,
    progress: Progress | None = None,
) -> tuple[CausalLM, Tokenizer] | tuple[CausalLM, Tokenizer, Config]:
    """Load a model and its tokenizer from a folder or a hub repository; "builtin" is the model in the package.

    The arguments before the star are mlx-lm's. `lazy` changes nothing: weights are read at once. `trust_remote_code`
    concerns the tokenizer. `dtype` is the type of activations, scales and biases (the checkpoint's own by default),
    `device` a torch device (a GPU if there is one), `progress` is called with bytes read and bytes in all.
    `memory_limit` ("24GB", "80%", bytes) is what weights and caches may take; the model keeps to it. Whether it is
    enough is known before a weight is read, for a context of `max_context` (a short one) with keys and values as `kv`
    says.
    With `self_test`, the first model of its kind on a GPU, driver and version has a layer of each kind held against
    float64 on the CPU.
    Raises UserError, with one line that says what is wrong, for anything that cannot be loaded, and for a GPU that
    computes wrong numbers.
    """
    if adapter_path is not None:
        raise UserError("adapter_path: adapters are not supported; fuse the adapter into the model first")
    place = pick_device(device)
    limit = None if memory_limit is None else parsed_bytes(memory_limit, place)
    checkpoint = open_checkpoint(path_or_hf_repo, revision)
    # Before the tokenizer, so that a wrong config is named as such and not as what transformers makes of it.
    model, tensors = build(checkpoint, model_config)
    tokenizer = load_tokenizer(
        checkpoint.folder,
        checkpoint.config.get("eos_token_id"),
        **{"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
    )
    described = replace(checkpoint, config=checkpoint.config | (model_config or {}))
    _check_memory(model, described, place, dtype, limit, max_context, kv or KVOptions())
    total, done = sum(tensor.nbytes for tensor in checkpoint.tensors.values()), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    read_weights(model, tensors, checkpoint, dtype=dtype, device=place, progress=count)
    model.generation_config = read_generation_config(checkpoint.folder)
    model.memory_limit = limit
    if self_test:
        require(model)
    return (model, tokenizer, checkpoint.config) if return_config else (model, tokenizer)


def _check_memory(
    model: CausalLM,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    limit: int | None,
    max_context: int | None,
    kv: KVOptions,
) -> None:
    """UserError where a device cannot hold the weights and a context."""
    context_length = model.config.max_position_embeddings
    if max_context is not None and not 1 <= max_context <= context_length:
        raise UserError(f"max_context must be from 1 to the model's {context_length}, but is {max_context}")
    context = max_context or min(LEAST_CONTEXT, context_length)
    try:
        model = kv.model_for(model, context)
        budget = planned(model, checkpoint, device, dtype=dtype, kv=model.kv_format, limit=limit)
    except UserError:
        return  # what is wrong with a checkpoint is best told by those who read it
    try:
        budget.check(context)
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {error}") from error
