"""How long the GPU takes for a call, without what Python and the driver add: replays of a captured graph."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

# Several times what any last-level cache holds.
_ROTATED_BYTES = 768 << 20
_CALLS_A_GRAPH = 40


def microseconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of one call, in µs. The calls do the same work on different inputs, so that no cache helps.

    RuntimeError where a call cannot be captured: it asks the host, or allocates what it should not.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, too
            call()
    torch.cuda.synchronize()
    rounds = max(1, _CALLS_A_GRAPH // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return median(times) / (rounds * len(calls))


def rotated(make: Callable[[torch.device], Callable[[], object]], device: torch.device) -> list[Callable[[], object]]:
    """As many calls as it takes for their inputs to pass the cache: at least 2, at most 64."""
    before = torch.cuda.memory_allocated(device)
    calls = [make(device)]
    size = max(1, torch.cuda.memory_allocated(device) - before)
    room = torch.cuda.mem_get_info(device)[0] // 2 // size
    wanted = min(64, max(2, -(-_ROTATED_BYTES // size)), max(1, room))
    return calls + [make(device) for _ in range(wanted - 1)]
