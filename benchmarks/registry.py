"""What is measured: the kernels' cases, held against the device's ceilings and, where there is one, a bar."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bars import BARS, Bar
from gfxlm.device.ceilings import matmul_rate
from gfxlm.device.timing import microseconds, rotated
from gfxlm.kernels.case import Case

_READ_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device does at best, measured in the same run: bytes a second read, bf16 operations a second."""

    read_bandwidth: float
    matmul_rate: float

    @classmethod
    def measure(cls, device: torch.device) -> "Ceilings":
        """A maximum over 2 GiB, replayed from a graph; the best single product of two large random matrices."""
        x = torch.ones(_READ_BYTES // 4, device=device)
        return cls(x.nbytes / microseconds([x.amax], 10) * 1e6, matmul_rate(device))


@dataclass(frozen=True, slots=True)
class Measured:
    """A case's time, and what it makes of it."""

    name: str
    us: float
    nbytes: int
    flops: int
    ceilings: Ceilings

    @property
    def tb_s(self) -> float:
        """TB/s of the bytes that must be moved."""
        return self.nbytes / self.us * 1e-6

    @property
    def tflops(self) -> float:
        """TFLOP/s of the operations that must be done."""
        return self.flops / self.us * 1e-6

    @property
    def share(self) -> float:
        """The larger of the shares of the two ceilings: that of what bounds the work."""
        return max(
            self.tb_s * 1e12 / self.ceilings.read_bandwidth,
            self.tflops * 1e12 / self.ceilings.matmul_rate,
        )

    @property
    def bar(self) -> Bar | None:
        """What it has to reach on an H200."""
        return BARS.get(self.name)

    @property
    def passes(self) -> bool | None:
        """Whether it reaches its bar; None where there is none."""
        bar = self.bar
        return bar and (
            (bar.us is None or self.us <= bar.us)
            and (bar.tb_s is None or self.tb_s >= bar.tb_s)
            and (bar.tflops is None or self.tflops >= bar.tflops)
            and (bar.share is None or self.share >= bar.share)
        )

    def row(self) -> dict[str, Any]:
        """As JSON."""
        figures = {"name": self.name, "us": self.us, "tb_s": self.tb_s, "tflops": self.tflops, "share": self.share}
        return {**figures, "bar": str(self.bar) if self.bar else None, "passes": self.passes}


def measure(case: Case, device: torch.device, ceilings: Ceilings) -> Measured:
    """Time a case with inputs rotated past the cache, replayed from a graph."""
    with torch.inference_mode():
        return Measured(case.name, microseconds(rotated(case.make, device)), case.nbytes, case.flops, ceilings)
