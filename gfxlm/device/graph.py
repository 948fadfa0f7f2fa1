"""Work that is recorded once and replayed as one."""

import os
import warnings
from collections.abc import Callable

import torch

_DISABLED = "GFXLM_NO_GRAPH"


class Pool:
    """Memory that recordings share which never run at the same time."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin anew once every recording is reset: torch records into no pool that has lost all of its own."""
        self.handle = torch.cuda.graph_pool_handle()


class Graph:
    """A function without arguments over tensors of fixed address, recorded where the device can do that.

    Where it is not, `replay` calls the function, and one warning says why. What the function allocates stays where it
    was recorded, so its results are found at the same place after every replay. The function is called once before it
    is recorded, because no kernel may be compiled meanwhile; what it is to work on then must be nothing.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, pool: Pool | None = None) -> None:
        self._function: Callable[[], None] | None = function
        self._device = device
        self._pool = pool
        self._recorded: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Call the function once, record it, and replay that once. Only where there is a pool."""
        function = self._function
        assert function is not None
        assert self._pool is not None
        with torch.cuda.device(self._device):
            function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool.handle):
                    function()
            except RuntimeError as error:
                torch.cuda.synchronize()
                _warn(str(error).strip().splitlines()[0])
                return
        graph.replay()  # the first replay brings it to the device, which takes a millisecond
        # Whoever holds the graph is often held by the function: its memory is not to wait for the garbage collector.
        self._recorded, self._function = graph, None

    def replay(self) -> None:
        """Run what was recorded, or the function itself. RuntimeError after `reset`."""
        if self._recorded is not None:
            self._recorded.replay()
        elif self._function is not None:
            self._function()
        else:
            raise RuntimeError("the graph was reset: there is nothing to replay")

    def reset(self) -> None:
        """Let go of the recording and of the function, for good, and of memory: the pool's goes with its last one."""
        if self._recorded is not None:
            self._recorded.reset()
        self._recorded = self._function = None


def shared_pool(device: torch.device) -> Pool | None:
    """A pool of its own, None where nothing is to be recorded."""
    if device.type != "cuda":
        return None
    if os.environ.get(_DISABLED):
        _warn(f"{_DISABLED} is set")
        return None
    return Pool()


def _warn(reason: str) -> None:
    warnings.warn(f"the decode step is not captured, and runs kernel by kernel: {reason}", stacklevel=3)
