"""Linear maps and embeddings over dense or quantised weights."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gfxlm.nn.module import Module, join, parent
from gfxlm.ops import swiglu
from gfxlm.weights.source import WeightSource
from gfxlm.weights.weight import Weight


class Linear(Module):
    """`y = x @ w.T + b`."""

    weight: Weight

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bias
        self.bias: Tensor | None = None

    def load(self, source: WeightSource, path: str = "") -> None:
        self.weight = source.matrix([path], [self.out_features], self.in_features)
        if self.has_bias:
            self.bias = source.tensor(f"{path}.bias", (self.out_features,))

    def matrices(self, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        yield path, (self.out_features, self.in_features)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # (..., in_features) -> (..., out_features)
        """What is added to `residual` where one is given."""
        return self.weight.matmul(x, bias=self.bias, residual=residual)


class MergedLinear(Module):
    """Several linear maps of one input as a single product. `parts` are their names in the checkpoint and sizes."""

    weight: Weight

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.has_bias = bias
        self.bias: Tensor | None = None

    def load(self, source: WeightSource, path: str = "") -> None:
        paths = [join(parent(path), name) for name in self.parts]
        self.weight = source.matrix(paths, list(self.parts.values()), self.in_features)
        if self.has_bias:
            sizes = self.parts.values()
            self.bias = torch.cat([source.tensor(f"{p}.bias", (n,)) for p, n in zip(paths, sizes, strict=True)])

    def matrices(self, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, size in self.parts.items():
            yield join(parent(path), name), (size, self.in_features)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # (..., in_features) -> one (..., size) for each part
        y = self.weight.matmul(x, bias=self.bias)
        return torch.split(y, list(self.parts.values()), dim=-1)

    def swiglu(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., size of a part)
        """`silu(gate) * up` of two parts of one size."""
        return self.weight.swiglu(x) if self.bias is None else swiglu(*self(x))


class Embedding(Module):
    """A table of vectors by token id, which can also serve as the output head."""

    weight: Weight

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size

    def load(self, source: WeightSource, path: str = "") -> None:
        self.weight = source.matrix([path], [self.vocab_size], self.hidden_size)

    def matrices(self, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        yield path, (self.vocab_size, self.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:  # (N,) -> (N, hidden_size)
        return self.weight.rows(tokens)

    def as_linear(self, x: Tensor) -> Tensor:
        """Scores of every token: (..., hidden_size) to (..., vocab_size)."""
        return self.weight.matmul(x)
