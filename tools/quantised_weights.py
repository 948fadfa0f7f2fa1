"""Training weights that the model sees as MLX would store them: fp32 originals behind bf16 or 4-bit values."""

import torch
from torch import Tensor, nn

GROUP_SIZE = 64
EIGHT_BIT = ("mlp.gate.weight", "mlp.shared_expert_gate.weight")  # MLX keeps the routers of this family finer


def fake_quantise(weights: Tensor, bits: int) -> Tensor:
    """What MLX's affine quantisation (groups of 64) makes of `weights`, a flat fp32 tensor."""
    groups = weights.bfloat16().float().view(-1, GROUP_SIZE)  # the checkpoint is bf16
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    levels = 2**bits - 1
    from_low = low.abs() > high.abs()
    scale = ((high - low) / levels).clamp_min(1e-7)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    edge_code = (edge / scale).round()  # the larger edge becomes exact, and so does zero
    scale = torch.where(edge_code != 0, edge / edge_code, scale)
    bias = torch.where(edge_code != 0, edge, 0.0)
    codes = ((groups - bias) / scale).round().clamp(0, levels)
    return (codes * scale.bfloat16().float() + bias.bfloat16().float()).view(-1)


class MasterWeights:
    """The fp32 originals of some bf16 parameters, as one flat tensor; the parameters become views of another."""

    def __init__(self, parameters: list[nn.Parameter], bits: int | None) -> None:
        self.parameters, self.bits = parameters, bits
        self.flat = nn.Parameter(torch.cat([p.detach().float().flatten() for p in parameters]))
        self.flat.grad = torch.zeros_like(self.flat)
        self.compute = self.flat.detach().bfloat16()
        for p, view in zip(parameters, self.compute.split([p.numel() for p in parameters]), strict=True):
            p.data = view.view_as(p)

    def publish(self, quantised: bool) -> None:
        with torch.no_grad():
            seen = fake_quantise(self.flat, self.bits) if quantised and self.bits else self.flat
            self.compute.copy_(seen)

    def collect_gradients(self) -> None:
        """A quantised weight's gradient goes straight through to its original."""
        assert self.flat.grad is not None
        self.flat.grad.copy_(torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]))
        for p in self.parameters:
            p.grad = None


def master_weights(model: nn.Module) -> list[MasterWeights]:
    """Three groups: 4-bit and 8-bit matrices, and what stays as it is (norms, convolutions, decays)."""
    groups: dict[int | None, list[nn.Parameter]] = {4: [], 8: [], None: []}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "conv1d" not in name
        groups[8 if name.endswith(EIGHT_BIT) else 4 if matrix else None].append(parameter)
    return [MasterWeights(parameters, bits) for bits, parameters in groups.items()]
