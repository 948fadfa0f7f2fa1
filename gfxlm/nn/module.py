"""The base of every module: how weights come in, and which matrices there are."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gfxlm.weights.source import WeightSource


class Module(nn.Module):
    """A torch module that fetches its weights from a source by its path in MLX's naming."""

    if TYPE_CHECKING:

        def __call__(self, *args: Any) -> Tensor: ...

    def load(self, source: WeightSource, path: str = "") -> None:
        """Take the weights of this module and its children out of `source`."""
        for name, child in self.named_children():
            if isinstance(child, Module):
                child.load(source, join(path, name))

    def matrices(self, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        """MLX's path and the shape of every matrix that may be quantised, in the model's order."""
        for name, child in self.named_children():
            if isinstance(child, Module):
                yield from child.matrices(join(path, name))


class ModuleList(Module):
    """Modules that are called by their number."""

    def __init__(self, modules: list[Module]) -> None:
        super().__init__()
        for number, module in enumerate(modules):
            self.add_module(str(number), module)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children())

    def __len__(self) -> int:
        return len(self._modules)


def join(path: str, name: str) -> str:
    """A dotted path with one more step."""
    return f"{path}.{name}" if path else name


def parent(path: str) -> str:
    """A dotted path without its last step."""
    return path.rpartition(".")[0]
