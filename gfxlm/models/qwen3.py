"""Qwen3 (arXiv 2505.09388), dense: norms on every query and key head."""

from dataclasses import dataclass, field
from typing import ClassVar

from gfxlm.models.base import CausalLM, DecoderLayer
from gfxlm.models.config import ModelConfig
from gfxlm.nn.attention import Attention
from gfxlm.nn.mlp import GatedMLP


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(ModelConfig):
    """Biases exist in the format; no published model has them."""

    attention_bias: bool = False
    rope_theta: float = field()  # no default: two are in use, and a guess would go unnoticed


def qwen3_attention(config: Qwen3Config, *, gated: bool = False) -> Attention:
    """Grouped-query attention with normed heads, as all models of the generation have it."""
    return Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.kv_heads,
        config.head_size,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm_eps=config.rms_norm_eps,
        gated=gated,
    )


class Qwen3(CausalLM):
    """The dense Qwen3 family."""

    Config: ClassVar[type[ModelConfig]] = Qwen3Config

    @staticmethod
    def make_layer(config: Qwen3Config, number: int) -> DecoderLayer:
        return DecoderLayer(config, qwen3_attention(config), GatedMLP(config.hidden_size, config.intermediate_size))
