"""transformers stores every expert's matrices under their own names; MLX stacks them."""

import re

from gfxlm.errors import UserError
from gfxlm.models.base import Tensors
from gfxlm.weights.safetensors_file import LazyTensor, stacked

_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def has_unstacked_experts(tensors: Tensors) -> bool:
    """True for a checkpoint in transformers' naming."""
    return any(_EXPERT.fullmatch(name) for name in tensors)


def stack_experts(tensors: Tensors, experts: int) -> Tensors:
    """`mlp.experts.E.up_proj.weight` for every E becomes `mlp.switch_mlp.up_proj.weight`, (experts, N, K)."""
    out: Tensors = {}
    groups: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            block, number, matrix = match.groups()
            groups.setdefault(f"{block}.switch_mlp.{matrix}.weight", {})[int(number)] = tensor
        else:
            out[name] = tensor
    for name, group in groups.items():
        if sorted(group) != list(range(experts)):
            raise UserError(f"{name}: the checkpoint has {len(group)} experts, the config says {experts}")
        if len({(tensor.shape, tensor.dtype) for tensor in group.values()}) > 1:
            raise UserError(f"{name}: the checkpoint's experts differ in shape or type")
        out[name] = stacked([group[number] for number in range(experts)])
    return out
