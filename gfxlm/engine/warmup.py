"""What a model would launch on a GPU, without its weights and without the GPU: what `gfxlm warmup --model` compiles."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.engine.load import open_checkpoint
from gfxlm.engine.prefill import PaddedChunk, bucket_rows
from gfxlm.kernels.case import Call, Case
from gfxlm.models.base import CausalLM
from gfxlm.models.load import build, read_weights
from gfxlm.weights.safetensors_file import LazyTensor

_META = torch.device("meta")
# Sequences and tokens of each. Numbers of tokens that are multiples of 16, and others, may be compiled apart.
_STEPS = [(rows, 1) for rows in (1, 2, 3, 4, 8, 16, 32, 64)]
_PROMPTS = [(1, tokens) for tokens in (2, 7, 15, 16, 31, 48, 65, 128, 500, 512, 1999, 2048)]
_CHUNKS = sorted({bucket_rows(rows, small=small) for rows in range(1, 2049) for small in (False, True)})


@dataclass(frozen=True, slots=True)
class ModelCases:
    """One model's cases by name. `dtype` is the type of activations by name, the checkpoint's own where None."""

    path: str
    revision: str | None = None
    dtype: str | None = None

    def names(self) -> list[str]:
        """All of them. UserError where there is no such model."""
        open_checkpoint(self.path, self.revision)
        return [f"{sequences}x{tokens}" for sequences, tokens in _STEPS + _PROMPTS] + [f"chunk{n}" for n in _CHUNKS]

    def __call__(self, name: str) -> Case:
        """The case of that name: sequences x tokens, or a recorded chunk of so many rows."""
        if name.startswith("chunk"):
            return Case(name, functools.partial(self._chunk, int(name.removeprefix("chunk"))))
        sequences, tokens = map(int, name.split("x"))

        def make(device: torch.device) -> Call:
            model = _without_weights(self)
            cache = model.make_cache(sequences, 2 * tokens)
            ids = torch.zeros(sequences, tokens, dtype=torch.int64, device=device)
            return lambda: model(ids, cache)

        return Case(name, make)

    def _chunk(self, rows: int, device: torch.device) -> Call:
        model = _without_weights(self)
        cache, chunk = model.make_cache(1, 2 * rows), PaddedChunk(rows, 2, device)
        return lambda: chunk.forward(model, cache)


@functools.lru_cache(maxsize=1)
def _without_weights(cases: ModelCases) -> CausalLM:
    """The model with weights on the "meta" device, which have shapes and take no memory; nothing is read."""
    checkpoint = open_checkpoint(cases.path, cases.revision)
    model, tensors = build(checkpoint)
    hollow = {name: _hollow(tensor) for name, tensor in tensors.items()}
    dtype = getattr(torch, cases.dtype) if cases.dtype else None
    read_weights(model, hollow, checkpoint, dtype=dtype, device=_META)
    return model


def _hollow(tensor: LazyTensor) -> LazyTensor:
    def read() -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=_META)

    return LazyTensor(tensor.shape, tensor.dtype, read, tuple(_hollow(part) for part in tensor.parts))
