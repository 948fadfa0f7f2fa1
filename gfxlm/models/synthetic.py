"""Checkpoints of random weights in the shapes of real models, to know a model's speed before it is downloaded."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfxlm.errors import UserError
from gfxlm.models import model_class
from gfxlm.models.config import ModelConfig
from gfxlm.ops.formats import Quantization
from gfxlm.weights.checkpoint import Checkpoint
from gfxlm.weights.config import Config, QuantizationMap, normalized, read_config
from gfxlm.weights.safetensors_file import LazyTensor
from gfxlm.weights.source import WeightSource
from gfxlm.weights.weight import DenseWeight, Weight

_QWEN3 = {"rms_norm_eps": 1e-6, "vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": False}
_QWEN3_MOE = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}

# What the models' own config.json say.
PUBLISHED: dict[str, Config] = {
    "qwen3-8b": _QWEN3
    | {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
    },
    "qwen3-30b-a3b": _QWEN3
    | _QWEN3_MOE
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
    },
    "qwen3-coder-next": _QWEN3
    | _QWEN3_MOE
    | {
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "partial_rotary_factor": 0.25,
        "rope_theta": 5e6,
        "max_position_embeddings": 262144,
    },
}


def synthetic_checkpoint(
    name_or_path: str, device: torch.device, *, bits: int = 4, group_size: int = 64, seed: int = 0
) -> Checkpoint:
    """Random weights, made on `device` when they are read, for a name in PUBLISHED or a folder with a config.json.

    A config that does not say how it is quantised gets affine `bits` in groups of `group_size`, routers 8 bits where
    the family's are. Raises UserError for an unknown name.
    """
    config = _config(name_or_path)
    family = model_class(config["model_type"])
    args: ModelConfig = family.Config.from_dict(normalized(config))
    model = family(args, tied=bool(args.tie_word_embeddings))
    if "quantization" not in config:
        entry: dict[str, Any] = {"group_size": group_size, "bits": bits}
        routers = ((path, family.router_quantization(path)) for path, _ in model.matrices())
        entry |= {path: {"group_size": q[0], "bits": q[1]} for path, q in routers if q is not None}
        config = config | {"quantization": entry}
    shapes = _Shapes(QuantizationMap.parse(config), Quantization.resolve(group_size, bits), device, seed)
    model.load(shapes)
    return Checkpoint(Path(name_or_path), config, shapes.tensors)


def _config(name_or_path: str) -> Config:
    if name_or_path in PUBLISHED:
        return PUBLISHED[name_or_path]
    path = Path(name_or_path).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not folder.is_dir():
        raise UserError(f"{name_or_path}: neither a folder with a config.json nor one of {', '.join(PUBLISHED)}")
    return read_config(folder)


class _Shapes(WeightSource):
    """Learns from a model what tensors it wants, and has them made of random numbers."""

    tensors: dict[str, LazyTensor]

    def __init__(self, quantization: QuantizationMap, default: Quantization, device: torch.device, seed: int) -> None:
        super().__init__({}, quantization, dtype=torch.bfloat16, device=torch.device("meta"))
        self.tensors = {}
        self._default = default
        self._generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        self._want(name, shape, dtype or self.dtype, _small_tensor(name))
        return torch.empty(shape, device="meta")

    def matrix(self, paths: Sequence[str], rows: Sequence[int], columns: int, experts: int | None = None) -> Weight:
        stack = () if experts is None else (experts,)
        for path, n in zip(paths, rows, strict=True):
            q = self._quantization.overrides.get(path, self._default)
            # Codes are uniform: this step gives weights the variance 1 / columns.
            step = (12 / ((1 << 2 * q.bits) - 1) / columns) ** 0.5
            middle = -step * ((1 << q.bits) - 1) / 2
            groups = (*stack, n, columns // q.group_size)
            self._want(f"{path}.weight", (*stack, n, q.packed_columns(columns)), torch.uint32, _random_words)
            self._want(f"{path}.scales", groups, self.dtype, partial(_constant, value=step))
            self._want(f"{path}.biases", groups, self.dtype, partial(_constant, value=middle))
        return DenseWeight(torch.empty(*stack, sum(rows), columns, device="meta"))

    def _want(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Any) -> None:
        self.tensors[name] = LazyTensor(shape, dtype, lambda: make(shape, self._generator).to(dtype))


def _random_words(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    words = torch.empty(shape, dtype=torch.int32, device=generator.device)
    return words.random_(-(2**31), 2**31, generator=generator).view(torch.uint32)


def _constant(shape: tuple[int, ...], generator: torch.Generator, value: float) -> Tensor:
    return torch.full(shape, value, device=generator.device)


def _small_tensor(name: str) -> Any:
    """Norms are one, decay rates lie where training begins, all else is small and random."""
    if name.endswith(("norm.weight", "dt_bias")):
        return partial(_constant, value=1.0)
    if name.endswith("A_log"):
        return lambda shape, g: torch.rand(shape, device=g.device, generator=g).mul(15).add(1).log()
    return lambda shape, g: torch.randn(shape, device=g.device, generator=g).mul(0.2)
