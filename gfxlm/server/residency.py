"""Several models in memory at a time, where it does for all of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from gfxlm.models.base import CausalLM


class Residency:
    """What each model by its path needs at least of `free` bytes, which this process may take beside those `taken`.

    An engine takes for its caches what it can get: a model that is loaded early has to leave the others theirs.
    """

    def __init__(self, free: int, taken: int, needs: Mapping[str, int]) -> None:
        self._free, self._taken, self._needs = free, taken, dict(needs)
        self._open: WeakValueDictionary[str, CausalLM] = WeakValueDictionary()

    @property
    def fits(self) -> bool:
        """Whether all can stay."""
        return sum(self._needs.values()) <= self._free

    def limit(self, path: str) -> int:
        """What the process may have taken when this model is there: all but what those need that are not."""
        others = sum(need for other, need in self._needs.items() if other != path and other not in self._open)
        return self._taken + self._free - others

    def opened(self, path: str, model: "CausalLM") -> None:
        """This model has its memory now."""
        self._open[path] = model
