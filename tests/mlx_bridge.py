"""Tensors to MLX arrays and back, bit for bit."""

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor


def to_mlx(x: Tensor) -> mx.array:
    if x.dtype == torch.bfloat16:
        return mx.array(x.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(x.contiguous().numpy())


def to_torch(x: mx.array) -> Tensor:
    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))
