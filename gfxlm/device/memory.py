"""How much memory there is, how much is free, and how much this process has taken."""

import resource
from pathlib import Path

import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USAGE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device: free memory of a GPU, of the host or of its cgroup."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, usage = _first_number(_CGROUP_LIMITS), _first_number(_CGROUP_USAGE)
    return free if limit is None or usage is None else min(free, max(limit - usage, 0))


def peak_bytes(device: torch.device) -> int:
    """The most this process has held on the device so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _first_number(paths: tuple[str, ...]) -> int | None:
    for path in map(Path, paths):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None
