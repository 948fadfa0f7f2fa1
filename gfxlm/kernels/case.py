"""What a kernel is tried on: real shapes, from which the code checks, warm-up, tuning and benchmarks all draw."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of one operation.

    `make(device)` allocates the inputs and returns the call. nbytes and flops are the work that must be done, the one
    that bounds it being the one to state. A headline case is compiled in every test run.
    """

    name: str  # "matvec/4096x4096/affine4/m1"
    make: Callable[[torch.device], Call]
    nbytes: int = 0
    flops: int = 0
    headline: bool = False
