"""`load`: a model and its tokenizer, ready to generate."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, overload

import torch

from gfxlm.device.select import pick_device
from gfxlm.engine.tokenizer import Tokenizer, load_tokenizer
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM
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
    progress: Progress | None = None,
) -> tuple[CausalLM, Tokenizer] | tuple[CausalLM, Tokenizer, Config]:
    """Load a model and its tokenizer from a folder or a hub repository; "builtin" is the model in the package.

    The arguments before the star are mlx-lm's. `lazy` changes nothing: weights are read at once. `trust_remote_code`
    concerns the tokenizer. `dtype` is the type of activations, scales and biases (the checkpoint's own by default),
    `device` a torch device (a GPU if there is one), `progress` is called with bytes read and bytes in all.
    Raises UserError, with one line that says what is wrong, for anything that cannot be loaded.
    """
    if adapter_path is not None:
        raise UserError("adapter_path: adapters are not supported; fuse the adapter into the model first")
    checkpoint = open_checkpoint(path_or_hf_repo, revision)
    # Before the tokenizer, so that a wrong config is named as such and not as what transformers makes of it.
    model, tensors = build(checkpoint, model_config)
    tokenizer = load_tokenizer(
        checkpoint.folder,
        checkpoint.config.get("eos_token_id"),
        **{"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
    )
    total, done = sum(tensor.nbytes for tensor in checkpoint.tensors.values()), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    read_weights(model, tensors, checkpoint, dtype=dtype, device=pick_device(device), progress=count)
    model.generation_config = read_generation_config(checkpoint.folder)
    return (model, tokenizer, checkpoint.config) if return_config else (model, tokenizer)
