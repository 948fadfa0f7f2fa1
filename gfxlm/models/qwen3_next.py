"""Qwen3-Next: three gated delta nets, then one gated attention, over 512 small experts and a shared one."""

from dataclasses import dataclass
from typing import ClassVar

from gfxlm.models.base import CausalLM, DecoderLayer, Tensors
from gfxlm.models.config import ModelConfig, require
from gfxlm.models.experts import has_unstacked_experts, stack_experts
from gfxlm.models.qwen3 import qwen3_attention
from gfxlm.models.qwen3_moe import Qwen3MoeConfig
from gfxlm.nn.delta_net import GatedDeltaNet
from gfxlm.nn.mlp import GatedMLP, SparseMoE
from gfxlm.nn.module import Module
from gfxlm.nn.rope import RoPE
from gfxlm.weights.safetensors_file import LazyTensor

_ZERO_CENTRED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(Qwen3MoeConfig):
    """Every `full_attention_interval`-th layer is full attention, the others are gated delta nets."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    shared_expert_intermediate_size: int
    full_attention_interval: int = 4
    partial_rotary_factor: float = 0.25
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("linear_num_key_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"):
            require(getattr(self, name) > 0, f"{name} cannot be 0")
        k_heads, v_heads = self.linear_num_key_heads, self.linear_num_value_heads
        require(
            v_heads > 0 and v_heads % k_heads == 0,
            f"linear_num_value_heads {v_heads} is no multiple of linear_num_key_heads {k_heads}",
        )
        require(self.full_attention_interval > 0, "full_attention_interval cannot be 0")
        require(self.partial_rotary_factor <= 1, f"partial_rotary_factor cannot be {self.partial_rotary_factor}")


class Qwen3Next(CausalLM):
    """The Qwen3-Next family."""

    Config: ClassVar[type[ModelConfig]] = Qwen3NextConfig

    @staticmethod
    def make_layer(config: Qwen3NextConfig, number: int) -> DecoderLayer:
        full = (number + 1) % config.full_attention_interval == 0
        return DecoderLayer(
            config, qwen3_attention(config, gated=True) if full else _delta_net(config), _mlp(config, number)
        )

    @staticmethod
    def make_rope(config: Qwen3NextConfig) -> RoPE:
        dims = int(config.head_size * config.partial_rotary_factor)
        return RoPE(dims, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    @staticmethod
    def sanitize(tensors: Tensors, config: Qwen3NextConfig) -> Tensors:
        """transformers stores norms as w - 1 and convolutions as (C, 1, K); MLX has them ready to use."""
        if not has_unstacked_experts(tensors) and not any(_foreign_convolution(*item) for item in tensors.items()):
            return tensors
        kept = {name: tensor for name, tensor in tensors.items() if "mtp." not in name}
        for name, tensor in kept.items():
            if name.endswith(_ZERO_CENTRED_NORMS):
                kept[name] = tensor.map(lambda w: w + 1)
            elif _foreign_convolution(name, tensor):
                channels, _, kernel = tensor.shape
                kept[name] = tensor.map(lambda w: w.movedim(2, 1).contiguous(), (channels, kernel, 1))
        return stack_experts(CausalLM.sanitize(kept, config), config.num_experts)

    @staticmethod
    def router_quantization(path: str) -> tuple[int, int] | None:
        return (64, 8) if path.endswith(("mlp.gate", "shared_expert_gate")) else None


def _foreign_convolution(name: str, tensor: LazyTensor) -> bool:
    return name.endswith("conv1d.weight") and tensor.shape[1:-1] == (1,) and tensor.shape[-1] != 1


def _delta_net(config: Qwen3NextConfig) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.hidden_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        config.rms_norm_eps,
    )


def _mlp(config: Qwen3NextConfig, number: int) -> Module:
    if not config.sparse(number):
        return GatedMLP(config.hidden_size, config.intermediate_size)
    return SparseMoE(
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        normalize=config.norm_topk_prob,
        shared_intermediate_size=config.shared_expert_intermediate_size,
    )
