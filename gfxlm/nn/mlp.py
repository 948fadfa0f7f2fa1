"""Feed-forward blocks: one gated MLP, or many of them behind a router."""

from collections.abc import Iterator

from torch import Tensor

from gfxlm.nn.linear import Linear, MergedLinear
from gfxlm.nn.module import Module, join
from gfxlm.ops.moe import SharedExpert, expert_mlp, route
from gfxlm.ops.ragged import Slots
from gfxlm.weights.source import WeightSource
from gfxlm.weights.weight import Weight


class GatedMLP(Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = MergedLinear(hidden_size, parts, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(  # (N, hidden) -> (N, hidden)
        self, x: Tensor, residual: Tensor | None = None, slots: Slots | None = None
    ) -> Tensor:
        """What is added to `residual` where one is given. `slots` are of no account: every row is multiplied alike."""
        return self.down_proj(self.gate_up_proj.swiglu(x), residual)


class SwitchGLU(Module):
    """The gated MLPs of all experts, stacked."""

    gate_up: Weight
    down: Weight

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int) -> None:
        super().__init__()
        self.hidden_size, self.intermediate_size, self.experts = hidden_size, intermediate_size, experts

    def load(self, source: WeightSource, path: str = "") -> None:
        gate_up = [join(path, "gate_proj"), join(path, "up_proj")]
        self.gate_up = source.matrix(gate_up, [self.intermediate_size] * 2, self.hidden_size, self.experts)
        self.down = source.matrix([join(path, "down_proj")], [self.hidden_size], self.intermediate_size, self.experts)

    def matrices(self, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in ("gate_proj", "up_proj"):
            yield join(path, name), (self.experts, self.intermediate_size, self.hidden_size)
        yield join(path, "down_proj"), (self.experts, self.hidden_size, self.intermediate_size)

    def forward(  # (N, hidden), (N, k), (N, k) -> (N, hidden)
        self,
        x: Tensor,
        experts: Tensor,
        scores: Tensor,
        shared: SharedExpert | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        return expert_mlp(x, experts, scores, self.gate_up, self.down, shared=shared, residual=residual)


class SparseMoE(Module):
    """A router, its experts, and optionally a shared expert that every token passes, behind a sigmoid gate."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        experts: int,
        top_k: int,
        *,
        normalize: bool,
        shared_intermediate_size: int | None = None,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalize = normalize
        self.has_shared_expert = shared_intermediate_size is not None
        # The shared expert's gate is one more row of the router.
        self.gate = MergedLinear(
            hidden_size, {"gate": experts} | ({"shared_expert_gate": 1} if self.has_shared_expert else {})
        )
        self.switch_mlp = SwitchGLU(hidden_size, intermediate_size, experts)
        if shared_intermediate_size is not None:
            self.shared_expert = GatedMLP(hidden_size, shared_intermediate_size)

    def forward(  # (N, hidden) -> (N, hidden)
        self, x: Tensor, residual: Tensor | None = None, slots: Slots | None = None
    ) -> Tensor:
        """What is added to `residual` where one is given. Rows that `slots` call padding have no experts."""
        logits, *shared_logits = self.gate(x)
        experts, scores = route(
            logits, self.top_k, normalize=self.normalize, slots=None if slots is None else slots.index
        )
        shared = None
        if self.has_shared_expert:
            mlp = self.shared_expert
            shared = SharedExpert(mlp.gate_up_proj.weight, mlp.down_proj.weight, shared_logits[0])
        return self.switch_mlp(x, experts, scores, shared, residual)
