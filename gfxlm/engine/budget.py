"""What a model takes of a device's memory, and what context that leaves room for: known before anything is loaded."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from gfxlm.device.arena import unified
from gfxlm.device.memory import available_bytes, shown
from gfxlm.engine.info import describe
from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM, DecoderLayer, page_size
from gfxlm.models.load import default_dtype
from gfxlm.nn.attention import Attention
from gfxlm.nn.cache import Cache, KVFormat
from gfxlm.nn.mlp import SparseMoE
from gfxlm.weights.checkpoint import Checkpoint

# BLAS libraries' own buffers, loaded kernels, recorded graphs; on a CPU what a small step needs anyway.
_FIXED = {"cuda": 512 << 20, "cpu": 32 << 20}
# What the matrices of one layer put out is there twice at most: as it is, and on its way, here and there in fp32.
_COPIES = 2
# The residual stream, before and after norms.
_HIDDEN = 4
# A token's score is held in its own type and a few times in fp32: logits, log probabilities, what filters sort.
_SCORE_BYTES = 24
# Of recurrent states that a prefix cache keeps: how many at most, and what part of the free memory they may take.
_LEAST_STATES, _STATES_A_SLOT, _STATES_SHARE = 16, 4, 0.25
# A context that nobody asked for is not worth loading a model if it is shorter than this.
LEAST_CONTEXT = 256
_WORTH_MENTIONING = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What there is of a device's memory and what a model with `slots` sequences takes of it, all in bytes.

    `memory` is what weights, caches and everything else may take together. `position` is what one position's keys and
    values take, `quantized` what they would take in 8 and in 4 bits, `state` a sequence's recurrent state. Of a text
    there are keys and values of at most `max_kv_size` positions at a time, if that is given. `unreached` is what the
    host has free of an integrated GPU's memory and the GPU's driver does not let it use.
    """

    memory: int
    weights: int
    workspace: int
    state: int
    position: int
    quantized: Mapping[int, int]
    context_length: int
    slots: int = 1
    max_kv_size: int | None = None
    unreached: int = 0

    def held(self, context: int) -> int:
        """Of how many positions of a context there are keys and values at a time."""
        return min(context, self.max_kv_size or context)

    def needed(self, positions: int) -> int:
        """What it takes for the slots to have keys and values of so many positions together."""
        return self.weights + self.workspace + self.slots * self.state + positions * self.position

    @property
    def positions(self) -> int:
        """Of how many positions all slots together can have keys and values."""
        free = self.memory - self.needed(0)
        most = self.slots * self.held(self.context_length) if free >= 0 else 0
        return min(most, max(0, free) // self.position) if self.position else most

    @property
    def longest(self) -> int:
        """The longest context that one of them can have."""
        enough = self.positions >= self.held(self.context_length)
        return self.context_length if enough else self.positions

    def fit(self, wanted: int, *, least: int = 1, exact: bool = False) -> int:
        """The context that is wanted, or the longest there is memory for, which is warned of.

        UserError as `check` raises it where not even `least` fit, or not all that are wanted of an `exact` one.
        """
        self.check(wanted if exact else min(least, wanted))
        if wanted > self.longest:
            reason = f"{self.longest} tokens instead of {wanted}, for which there is not enough memory"
            warnings.warn(f"the context is shortened to {reason}", stacklevel=2)
        return min(wanted, self.longest)

    def check(self, context: int) -> None:
        """Raise UserError, saying what is needed, what there is, and what would fit, where a context does not."""
        if context <= self.longest:
            return
        parts = [
            (self.weights, "of weights"),
            (self.held(context) * self.position, f"of keys and values for {self.held(context)} tokens"),
            (self.slots * self.state, "of recurrent state"),
            (self.workspace, "to work in"),
        ]
        listed = ", ".join(f"{shown(nbytes)} {what}" for nbytes, what in parts if nbytes)
        raise UserError(
            f"not enough memory: {shown(self.needed(self.held(context)))} are needed ({listed}), "
            f"{shown(self.memory)} can be had; {self._instead(context)}{self._more()}"
        )

    def _more(self) -> str:
        if self.unreached < _WORTH_MENTIONING:
            return ""
        return f"; the host has {shown(self.unreached)} more that this GPU may not use: gfxlm doctor says how it may"

    def _instead(self, context: int) -> str:
        best = self.longest
        fitting = [f"a context of {best} tokens"] if best else []
        for bits, position in self.quantized.items():
            longest = min(context, replace(self, position=position).longest)
            if longest > best:
                fitting.append(f"{longest} tokens with {bits}-bit keys and values (kv_bits)")
                best = longest
        if not fitting:
            return "not even a short context would fit; a smaller model would, or one of fewer bits"
        return f"what would fit: {', '.join(fitting)}"


def planned(
    model: CausalLM,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    kv: KVFormat | None = None,
    limit: int | None = None,
    slots: int = 1,
    prefill_step_size: int = 2048,
) -> Budget:
    """The budget of a model that is not loaded yet, whose `checkpoint` will be read onto a device.

    `limit` is what this process may take in all. Raises UserError for a checkpoint that contradicts its config.
    """
    dtype = dtype or default_dtype(checkpoint.config, checkpoint.tensors, device)
    weights = describe(checkpoint, dtype, device).resident_bytes
    memory = available_bytes(device, limit)
    budget = _budget(model, memory, weights, device, dtype, kv, slots, prefill_step_size)
    return budget if limit is not None else replace(budget, unreached=_unreached(device, memory))


def remaining(model: CausalLM, *, slots: int = 1, prefill_step_size: int = 2048) -> Budget:
    """The budget of a model that is loaded: what it has taken is no longer free, and counts as there."""
    memory = available_bytes(model.device, model.memory_limit) + model.weight_bytes
    return _budget(
        model, memory, model.weight_bytes, model.device, model.dtype, model.kv_format, slots, prefill_step_size
    )


def _budget(
    model: CausalLM,
    memory: int,
    weights: int,
    device: torch.device,
    dtype: torch.dtype,
    kv: KVFormat | None,
    slots: int,
    rows: int,
) -> Budget:
    position, state = model.cache_bytes(dtype, kv)
    return Budget(
        memory=memory,
        weights=weights,
        workspace=_workspace(model, device, dtype, slots, rows),
        state=state,
        position=position,
        quantized=_quantized(model, dtype),
        context_length=model.config.max_position_embeddings,
        slots=slots,
        max_kv_size=model.max_kv_size,
    )


def _unreached(device: torch.device, memory: int) -> int:
    return max(0, available_bytes(torch.device("cpu")) - memory) if unified(device) else 0


def _quantized(model: CausalLM, dtype: torch.dtype) -> dict[int, int]:
    """Bytes of a position's keys and values in 8 and in 4 bits, where heads divide into groups at all."""
    sizes = {}
    for bits in (8, 4):
        for group_size in (64, 32):
            try:
                sizes[bits], _ = model.cache_bytes(dtype, KVFormat(bits, group_size))
                break
            except UserError:
                continue
    return sizes


def _workspace(model: CausalLM, device: torch.device, dtype: torch.dtype, slots: int, rows: int) -> int:
    """Bytes for a step of up to `rows` rows: what the matrices of one layer put out, and scores for every slot."""
    layers = [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
    width = max(map(_outputs, layers)) + _HIDDEN * model.config.hidden_size
    scores = slots * model.config.vocab_size * _SCORE_BYTES
    return _FIXED.get(device.type, 0) + _COPIES * rows * width * dtype.itemsize + scores + _unrolled(model, dtype, rows)


def _unrolled(model: CausalLM, dtype: torch.dtype, rows: int) -> int:
    """Bytes for a chunk that goes beyond `max_kv_size`: copies of what one layer holds, and a mask of 32 bits."""
    if model.max_kv_size is None:
        return 0
    mixers = [layer.mixer for layer in model.layers if isinstance(layer, DecoderLayer)]
    width = max((2 * mixer.kv_heads * mixer.head_dim for mixer in mixers if isinstance(mixer, Attention)), default=0)
    return (model.max_kv_size + rows) * (_COPIES * width * dtype.itemsize + rows * 4)


def _outputs(layer: DecoderLayer) -> int:
    """How many numbers the matrices of a layer put out for one token."""
    experts = layer.mlp.top_k if isinstance(layer.mlp, SparseMoE) else 1
    return sum(shape[-2] * (experts if len(shape) == 3 else 1) for _, shape in layer.matrices())


def make_cache(
    model: CausalLM,
    budget: Budget,
    max_context: int,
    *,
    exact: bool = False,
    saved_states: int | None = None,
) -> Cache:
    """Caches for a budget's slots, of up to `max_context` positions each, as far as there is memory.

    Where it does not do for all of them at full length they share it in pages, and a context that is longer than what
    one alone can have is shortened, with a warning; an `exact` one is refused. They always do where prefixes are
    shared, beside which memory is left for `saved_states`.
    """
    slots = budget.slots
    if saved_states is not None:
        budget = replace(budget, workspace=budget.workspace + saved_states * _state_bytes(model))
    context = budget.fit(max_context, least=LEAST_CONTEXT, exact=exact)
    positions, held = budget.positions, budget.held(context)
    if saved_states is not None and positions >= slots * held:
        # Whole pages for every slot, and the one that is nobody's.
        size = page_size(model.device)
        positions = (slots * -(-held // size) + 1) * size
    return model.make_cache(slots, context, pool_positions=positions, paged=saved_states is not None)


def states_to_save(model: CausalLM, budget: Budget) -> int:
    """How many recurrent states a prefix cache may keep: some for every slot, in a part of the memory that is free."""
    nbytes = _state_bytes(model)
    if not nbytes:
        return 0
    free = max(0, budget.memory - budget.needed(0))
    return min(max(_LEAST_STATES, _STATES_A_SLOT * budget.slots), int(free * _STATES_SHARE) // nbytes)


def _state_bytes(model: CausalLM) -> int:
    """What a sequence's recurrent state takes; a budget's is more where there are drafts."""
    return model.cache_bytes(model.dtype, model.kv_format)[1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is used up: torch's, BLAS libraries', Triton's, and the host's ways to say so."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def explain_out_of_memory(error: BaseException, model: CausalLM, cache: Cache) -> str:
    """What to tell of a step that ran out of memory: how much it wanted, who has the rest, and what needs less."""
    wanted = re.search(r"ried to allocate ([\d.]+ ?\w+)", str(error))
    free = shown(available_bytes(model.device))
    return (
        f"out of memory: a step wanted {wanted[1] if wanted else 'more'}, {free} are free; "
        f"weights take {shown(model.weight_bytes)}, caches {shown(cache.nbytes)}; "
        "a smaller prefill_step_size, fewer requests at a time, a shorter max_context or 8-bit kv_bits need less"
    )
