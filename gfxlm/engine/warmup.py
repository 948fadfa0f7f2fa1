"""What a model would launch on a GPU, without its weights and without the GPU: what `gfxlm warmup --model` compiles."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.engine.load import open_checkpoint
from gfxlm.engine.params import SamplingParams
from gfxlm.engine.prefill import PaddedChunk, bucket_rows
from gfxlm.engine.sampler import Sampler
from gfxlm.engine.self_test import different_layers
from gfxlm.engine.trial import DRAWS, PAGED, PROMPT, VOCABULARY
from gfxlm.kernels.case import Call, Case
from gfxlm.models.base import CausalLM, page_size
from gfxlm.models.load import build, read_weights
from gfxlm.nn.cache import Cache
from gfxlm.nn.module import ModuleList
from gfxlm.weights.safetensors_file import LazyTensor

_META = torch.device("meta")
_ROWS = (1, 2, 3, 4, 8, 16, 32, 64)
# Numbers of tokens that are multiples of 16, and others, may be compiled apart.
_PROMPTS = (2, 7, 15, 16, 31, 48, 65, 128, 500, 512, 1999, 2048)
_CHUNKS = sorted({bucket_rows(rows, small=small) for rows in range(1, 2049) for small in (False, True)})
# Positions that a cache holds: into how many parts a decode step's attention is split depends on them.
_CONTEXTS = (PROMPT + 1, 150, 300, 1024, 4096, 32768, 262144)
_PAGED_CONTEXTS = (PAGED, 1024, 4096, 32768, 262144)
# In pages: 9 and 16, for a multiple of 16 may be compiled apart here, too.
_PROMPT_CONTEXTS = (2304, 4096)
# The sampler's work: nothing to draw, draws, and draws from filtered tokens.
_SAMPLING = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(temperature=0.7),
    "filtered": SamplingParams(temperature=0.7, top_p=0.9, top_k=40),
}


@dataclass(frozen=True, slots=True)
class ModelCases:
    """One model's cases by name, "step/8/4096": what is done, with how many rows, in a cache of how many positions.

    `dtype` is the type of activations by name, the checkpoint's own where None. A case is shorter than the model: of
    layers that are alike one is enough.
    """

    path: str
    revision: str | None = None
    dtype: str | None = None

    def names(self) -> list[str]:
        """All of them. UserError where there is no such model."""
        open_checkpoint(self.path, self.revision)
        steps = [f"step/{rows}/{context}" for rows in _ROWS for context in _CONTEXTS]
        paged = [f"paged-step/{rows}/{context}" for rows in _ROWS for context in _PAGED_CONTEXTS]
        prompts = [f"prompt/{tokens}" for tokens in _PROMPTS] + [f"chunk/{rows}" for rows in _CHUNKS]
        prompts += [f"paged-{name}/{context}" for name in prompts for context in _PROMPT_CONTEXTS]
        return [*steps, *paged, *prompts, *(f"sampling/{kind}" for kind in _SAMPLING)]

    def __call__(self, name: str) -> Case:
        """The case of that name."""
        kind, *sizes = name.split("/")
        if kind == "sampling":
            return Case(name, functools.partial(self._sampling, sizes[0]))
        rows, context = int(sizes[0]), int(sizes[1]) if len(sizes) > 1 else 2 * int(sizes[0])
        make = {"step": self._step, "prompt": self._prompt, "chunk": self._chunk}
        paged = kind.startswith("paged")
        return Case(name, functools.partial(make[kind.removeprefix("paged-")], rows, context, paged))

    def _step(self, rows: int, context: int, paged: bool, device: torch.device) -> Call:
        model = _without_weights(self)
        cache = _cache(model, rows, min(context, model.config.max_position_embeddings), paged)
        tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        return lambda: model(tokens, cache)

    def _prompt(self, tokens: int, context: int, paged: bool, device: torch.device) -> Call:
        model = _without_weights(self)
        cache = _cache(model, 1, context, paged)
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        return lambda: model(ids, cache)

    def _chunk(self, rows: int, context: int, paged: bool, device: torch.device) -> Call:
        model = _without_weights(self)
        cache, chunk = _cache(model, 1, context, paged), PaddedChunk(rows, 2, device)
        return lambda: chunk.forward(model, cache)

    def _sampling(self, kind: str, device: torch.device) -> Call:
        """A decode step's rows and those of the self-test; biases and penalties leave scores in fp32."""
        model = _without_weights(self)
        vocabulary = model.config.vocab_size
        inputs = [
            torch.empty(n, vocabulary, dtype=t, device=device) for n in _ROWS for t in (model.dtype, torch.float32)
        ]
        inputs.append(torch.empty(VOCABULARY, device=device).expand(DRAWS, -1))
        calls = []
        for logits in inputs:
            sampler = Sampler(len(logits) + 1, logits.shape[1], device)
            sampler.set(0, _SAMPLING[kind])
            rows = torch.zeros(len(logits), dtype=torch.int64, device=device)
            calls.append(functools.partial(sampler.sample, logits, rows, rows))
        return lambda: [call() for call in calls]


def _cache(model: CausalLM, slots: int, context: int, paged: bool) -> Cache:
    """Caches for so many positions of each slot, in pages or not."""
    pool = slots * context + page_size(model.device) if paged else None  # one page is nobody's
    return model.make_cache(slots, context, pool_positions=pool, paged=paged)


@functools.lru_cache(maxsize=1)
def _without_weights(cases: ModelCases) -> CausalLM:
    """One layer of each kind of the model, with weights on the "meta" device, which take no memory; nothing is read."""
    checkpoint = open_checkpoint(cases.path, cases.revision)
    model, tensors = build(checkpoint)
    hollow = {name: _hollow(tensor) for name, tensor in tensors.items()}
    dtype = getattr(torch, cases.dtype) if cases.dtype else None
    read_weights(model, hollow, checkpoint, dtype=dtype, device=_META)
    model.model.layers = ModuleList([layer for _, layer in different_layers(model)])
    return model


def _hollow(tensor: LazyTensor) -> LazyTensor:
    def read() -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=_META)

    return LazyTensor(tensor.shape, tensor.dtype, read, tuple(_hollow(part) for part in tensor.parts))
