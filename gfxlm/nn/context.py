"""What every layer of one forward pass is told besides its input."""

from dataclasses import dataclass

from torch import Tensor

from gfxlm.nn.ring import Turned
from gfxlm.ops.ragged import Slots


@dataclass(frozen=True, slots=True)
class Context:
    """Where the rows of a flattened batch belong, and their rotary angles.

    `positions` is int64 (N,); `cos` and `sin` are fp32 (N, 1, rotary_dims / 2), so that they broadcast over heads.
    Where keys and values are kept in rings, `turned` says what attention layers need besides.
    """

    positions: Tensor
    slots: Slots
    cos: Tensor
    sin: Tensor
    turned: Turned | None = None
