"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with a sparse mixture of experts for its MLPs."""

from dataclasses import dataclass, field
from typing import ClassVar

from gfxlm.models.base import CausalLM, DecoderLayer, Tensors
from gfxlm.models.config import ModelConfig, require
from gfxlm.models.experts import stack_experts
from gfxlm.models.qwen3 import Qwen3Config, qwen3_attention
from gfxlm.nn.mlp import GatedMLP, SparseMoE


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """`decoder_sparse_step` and `mlp_only_layers` say which layers are sparse."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = field(default_factory=list)
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decoder_sparse_step > 0, "decoder_sparse_step cannot be 0")
        top_k, experts = self.num_experts_per_tok, self.num_experts
        require(experts == 0 or 0 < top_k <= experts, f"num_experts_per_tok cannot be {top_k} of {experts} experts")

    def sparse(self, number: int) -> bool:
        """True where the layer of that number has experts."""
        every = (number + 1) % self.decoder_sparse_step == 0
        return number not in self.mlp_only_layers and self.num_experts > 0 and every


class Qwen3Moe(CausalLM):
    """The sparse Qwen3 family."""

    Config: ClassVar[type[ModelConfig]] = Qwen3MoeConfig

    @staticmethod
    def make_layer(config: Qwen3MoeConfig, number: int) -> DecoderLayer:
        if not config.sparse(number):
            return DecoderLayer(config, qwen3_attention(config), GatedMLP(config.hidden_size, config.intermediate_size))
        moe = SparseMoE(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
        )
        return DecoderLayer(config, qwen3_attention(config), moe)

    @staticmethod
    def sanitize(tensors: Tensors, config: Qwen3MoeConfig) -> Tensors:
        return stack_experts(CausalLM.sanitize(tensors, config), config.num_experts)

    @staticmethod
    def router_quantization(path: str) -> tuple[int, int] | None:
        return (64, 8) if path.endswith("mlp.gate") else None
