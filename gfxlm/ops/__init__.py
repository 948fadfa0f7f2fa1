"""The public operations, with MLX's names and meaning, on torch tensors."""

from gfxlm.kernels.batch import Span
from gfxlm.ops.activation import softmax, swiglu
from gfxlm.ops.attention import cached_attention, scaled_dot_product_attention
from gfxlm.ops.compile import CompileError, compile
from gfxlm.ops.convolution import causal_conv1d
from gfxlm.ops.delta import decay, gated_delta_chunked, gated_delta_recurrent, gated_delta_update
from gfxlm.ops.delta_mixer import DeltaWeights, gated_delta_mixer
from gfxlm.ops.indexing import slice_update
from gfxlm.ops.moe import expert_mlp, route
from gfxlm.ops.normalization import add_rms_norm, gated_rms_norm, l2_normalize, layer_norm, rms_norm
from gfxlm.ops.quantized import dequantize, gather_mm, gather_qmm, quantize, quantized_matmul
from gfxlm.ops.ragged import Slots, ragged
from gfxlm.ops.rotary import rope, rope_angles, rotate
from gfxlm.ops.sorting import argmax, argmin, argsort, sort, topk

__all__ = [
    "CompileError",
    "DeltaWeights",
    "Slots",
    "Span",
    "add_rms_norm",
    "argmax",
    "argmin",
    "argsort",
    "cached_attention",
    "causal_conv1d",
    "compile",
    "decay",
    "dequantize",
    "expert_mlp",
    "gated_delta_chunked",
    "gated_delta_mixer",
    "gated_delta_recurrent",
    "gated_delta_update",
    "gated_rms_norm",
    "gather_mm",
    "gather_qmm",
    "l2_normalize",
    "layer_norm",
    "quantize",
    "quantized_matmul",
    "ragged",
    "rms_norm",
    "rope",
    "rope_angles",
    "rotate",
    "route",
    "scaled_dot_product_attention",
    "slice_update",
    "softmax",
    "sort",
    "swiglu",
    "topk",
]
