"""What a checkpoint is and what running it costs, read off its config and its tensors' headers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Self

import torch

from gfxlm.errors import UserError
from gfxlm.models.base import CausalLM, DecoderLayer, Tensors
from gfxlm.models.load import build, default_dtype
from gfxlm.nn.attention import Attention
from gfxlm.nn.cache import KVCache, KVFormat, QuantizedKVCache
from gfxlm.nn.delta_net import GatedDeltaNet
from gfxlm.nn.mlp import SparseMoE
from gfxlm.ops.formats import Quantization
from gfxlm.ops.int4_cpu import int4_applies, int4_nbytes
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.config import QuantizationMap


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """What one attention layer keeps of each position, and computes (operations) when a token looks at it."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    operations: int
    window: int | None

    def kv_bytes(self, kv: KVFormat | None) -> int:
        """Of one position's keys and values, quantised so. UserError where heads do not divide into its groups."""
        shape, device = (1, 1, self.kv_heads, self.head_dim), torch.device("meta")
        if kv is None:
            stored: KVCache | QuantizedKVCache = KVCache.allocate(*shape, self.dtype, device)
        else:
            stored = QuantizedKVCache.allocate(*shape, self.dtype, device, bits=kv.bits, group_size=kv.group_size)
        return sum(tensor.nbytes for tensor in stored.tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Sizes are in bytes. "Per token" is one decode step of one sequence: the embedding's one row is not counted."""

    model_type: str
    layers: int
    recurrent_layers: int
    parameters: int
    active_parameters: int
    head_parameters: int
    disk_bytes: int
    weight_bytes: int
    resident_bytes: int  # of the weights in the layout that the device likes
    active_bytes: int  # of the weights that a token passes: each once, of the experts those that it is sent to
    state_bytes: int  # of one sequence's recurrent state, read and written by every token
    context_length: int
    quantization: str
    attention: tuple[AttentionCost, ...]
    kv_format: KVFormat | None = None  # how caches are quantised

    def with_kv(self, kv_format: KVFormat | None) -> Self:
        """The same with caches that are quantised so. UserError where heads do not divide into its groups."""
        for layer in self.attention:
            layer.kv_bytes(kv_format)
        return replace(self, kv_format=kv_format)

    @property
    def bits_per_weight(self) -> float:
        """Scales and biases included."""
        return 8 * self.weight_bytes / self.parameters

    @property
    def bytes_per_token(self) -> int:
        """What a token reads and writes, but for the KV cache, which grows with the context."""
        return self.active_bytes + 2 * self.state_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """What each token adds to the cache."""
        return sum(layer.kv_bytes(self.kv_format) for layer in self.attention)

    def cache_bytes(self, context: int) -> int:
        """One sequence's cache of that many positions."""
        return self.state_bytes + context * self.kv_bytes_per_token

    def decode_bytes(self, context: float) -> float:
        """What a token reads and writes in a context of that length."""
        seen = (min(context, layer.window or context) * layer.kv_bytes(self.kv_format) for layer in self.attention)
        return self.bytes_per_token + sum(seen)

    def prefill_operations(self, tokens: int, depth: int = 0) -> int:
        """Floating-point operations in the matrix products of a prompt that comes after `depth` tokens.

        2 for each weight a token passes, the output head for the last token alone, and attention's 4 for each feature
        of each query head and position looked at.
        """
        weights = self.active_parameters - self.head_parameters
        seen = {
            window: sum(min(position + 1, window or position + 1) for position in range(depth, depth + tokens))
            for window in {layer.window for layer in self.attention}
        }
        attention = sum(layer.operations * seen[layer.window] for layer in self.attention)
        return 2 * (weights * tokens + self.head_parameters) + attention


def describe(checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | None = None) -> ModelInfo:
    """What there is to know without reading a weight; `dtype` and `device` (a CPU) are where `load` would put it.

    Raises UserError for an unknown architecture, a matrix that is missing, or shapes that contradict the config.
    """
    model, tensors = build(checkpoint)
    device = device or torch.device("cpu")
    dtype = dtype or default_dtype(checkpoint.config, tensors, device)
    quantization = QuantizationMap.parse(checkpoint.config)
    matrices = list(_matrices(model, tensors, quantization, dtype, device))
    packed = {f"{matrix.path}.{kind}" for matrix in matrices for kind in ("weight", "scales", "biases")}
    others = [tensor for name, tensor in tensors.items() if name not in packed]
    other_parameters = sum(prod(tensor.shape) for tensor in others)
    other_bytes = sum(prod(tensor.shape) * dtype.itemsize for tensor in others)
    head = next(m for m in matrices if m.path == ("model.embed_tokens" if model.tied else "lm_head"))
    mixers = [layer.mixer for layer in model.layers if isinstance(layer, DecoderLayer)]
    deltas = [mixer for mixer in mixers if isinstance(mixer, GatedDeltaNet)]
    return ModelInfo(
        model_type=model.config.model_type,
        layers=len(mixers),
        recurrent_layers=len(deltas),
        parameters=sum(matrix.parameters for matrix in matrices) + other_parameters,
        active_parameters=int(sum(matrix.used * matrix.parameters for matrix in matrices)) + other_parameters,
        head_parameters=head.parameters,
        disk_bytes=sum(file.stat().st_size for file in checkpoint.folder.rglob("*") if file.is_file()),
        weight_bytes=sum(matrix.nbytes for matrix in matrices) + other_bytes,
        resident_bytes=sum(matrix.resident_bytes for matrix in matrices) + other_bytes,
        active_bytes=int(sum(matrix.used * matrix.nbytes for matrix in matrices)) + other_bytes,
        state_bytes=sum(_state_bytes(mixer, dtype) for mixer in deltas),
        context_length=model.config.max_position_embeddings,
        quantization=_summary(matrices, dtype),
        attention=tuple(_attention_cost(mixer, dtype) for mixer in mixers if isinstance(mixer, Attention)),
    )


@dataclass(frozen=True, slots=True)
class _Matrix:
    path: str
    parameters: int
    nbytes: int
    resident_bytes: int
    used: float  # the share of it that one token passes
    quantization: Quantization | None


def _matrices(
    model: CausalLM, tensors: Tensors, quantization: QuantizationMap, dtype: torch.dtype, device: torch.device
) -> Iterator[_Matrix]:
    used = dict(_used_shares(model))
    for path, shape in model.matrices():
        weight = tensors.get(f"{path}.weight")
        if weight is None:
            raise UserError(f"{path}.weight: missing in the checkpoint")
        (*leading, columns), parameters = shape, prod(shape)
        bits = 8.0 * dtype.itemsize
        expected = shape
        if (q := quantization.stored(path, columns, tensors)) is not None:
            expected = (*leading, q.packed_columns(columns))
            bits = q.bits + (2 * 8 * dtype.itemsize if q.affine else 8) / q.group_size
        if weight.shape != expected:
            raise UserError(f"{path}.weight: shape {weight.shape} contradicts the config, which makes it {expected}")
        nbytes = resident = int(parameters * bits) // 8
        *stack, rows = leading
        # A single row, the shared expert's gate, is merged into another matrix.
        if q and rows > 1 and device.type == "cpu" and q.affine and int4_applies(q.group_size, dtype):
            resident = prod(stack) * int4_nbytes(rows, columns, q.group_size, q.bits)
        yield _Matrix(path, parameters, nbytes, resident, used.get(path, 1.0), q)


def _used_shares(model: CausalLM) -> Iterator[tuple[str, float]]:
    """The matrices of which a token passes a part: an expert stack, and the embedding where it is no output head."""
    if not model.tied:
        yield "model.embed_tokens", 0.0
    for path, module in model.named_modules():
        if isinstance(module, SparseMoE):
            for expert_path, shape in module.switch_mlp.matrices(f"{path}.switch_mlp"):
                yield expert_path, module.top_k / shape[0]


def _attention_cost(mixer: Attention, dtype: torch.dtype) -> AttentionCost:
    return AttentionCost(mixer.kv_heads, mixer.head_dim, dtype, 4 * mixer.heads * mixer.head_dim, mixer.window)


def _state_bytes(mixer: GatedDeltaNet, dtype: torch.dtype) -> int:
    conv = mixer.kernel * mixer.channels * dtype.itemsize
    return conv + mixer.v_heads * mixer.v_dim * mixer.k_dim * torch.float32.itemsize


def _summary(matrices: list[_Matrix], dtype: torch.dtype) -> str:
    """The format of most weights, then how many matrices have another."""
    weights: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for matrix in matrices:
        name = _format_name(matrix.quantization, dtype)
        weights[name] += matrix.parameters
        count[name] += 1
    (main, _), *others = weights.most_common()
    rest = (f"{count[name]} {'matrix' if count[name] == 1 else 'matrices'} {name}" for name, _ in others)
    return "; ".join([main, *rest])


def _format_name(q: Quantization | None, dtype: torch.dtype) -> str:
    if q is None:
        return str(dtype).removeprefix("torch.")
    return f"{q.bits}-bit affine, group {q.group_size}" if q.affine else q.mode
