"""How much memory there is, how much is free, and how much this process has taken."""

import re
import resource
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import torch

from gfxlm.errors import UserError

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USAGE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b|(%))?", re.IGNORECASE)


class Holder(Protocol):
    """Who holds memory of a device past torch's allocator: bytes now, and the most so far."""

    @property
    def held_bytes(self) -> int: ...

    @property
    def most_bytes(self) -> int: ...


_holders: defaultdict[int, list[Holder]] = defaultdict(list)  # by the index of their GPU


def count_in(holder: Holder, device: torch.device) -> None:
    """From now on, what this one holds of a GPU counts as taken by this process."""
    _holders[device.index or 0].append(holder)


def available_bytes(device: torch.device, limit: int | None = None) -> int:
    """Bytes that can still be allocated on the device: free memory of a GPU, of the host or of its cgroup.

    What torch holds of a GPU and does not use counts as free. With a limit, no more than leaves this process within it.
    """
    free = _free_of_gpu(device) if device.type == "cuda" else _free_of_host()
    return free if limit is None else max(0, min(free, limit - taken_bytes(device)))


def total_bytes(device: torch.device) -> int:
    """Bytes of a GPU, or of the host or its cgroup, whoever uses them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total, limit = _meminfo("MemTotal"), _first_number(_CGROUP_LIMITS)
    return total if limit is None else min(total, limit)


def taken_bytes(device: torch.device) -> int:
    """What this process holds on the device at the moment, by torch's allocator or past it."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device)) + sum(x.held_bytes for x in _holders[device.index or 0])
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def peak_bytes(device: torch.device) -> int:
    """The most this process has held on the device so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device)) + sum(x.most_bytes for x in _holders[device.index or 0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def empty_cache(device: torch.device) -> None:
    """Give back what torch holds of a GPU and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def parsed_bytes(amount: str | int, device: torch.device) -> int:
    """Bytes of "24GB", "24GiB", "80%" of what the device has, or a number of them. UserError for anything else."""
    text = str(amount).strip()
    match = _AMOUNT.fullmatch(text)
    number = float(match[1]) if match else 0.0
    if match is None or number == 0 or (match[4] and number > 100):
        raise UserError(f"memory limit {text!r}: expected an amount like 24GB, 24GiB or 80%")
    if match[4]:
        return int(total_bytes(device) * number / 100)
    step = 1024 if match[3] else 1000
    return int(number * step ** (" kmgt".index(match[2].lower()) if match[2] else 0))


def shown(nbytes: int) -> str:
    """An amount of memory, for reading."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


def _free_of_gpu(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_properties(device).is_integrated and total <= _meminfo("MemTotal"):
        # Its memory is the host's, of which the driver does not know what others have taken.
        free = min(free, _free_of_host())
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _free_of_host() -> int:
    free, limit, usage = _meminfo("MemAvailable"), _first_number(_CGROUP_LIMITS), _first_number(_CGROUP_USAGE)
    return free if limit is None or usage is None else min(free, max(limit - usage, 0))


def _meminfo(name: str) -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def _first_number(paths: tuple[str, ...]) -> int | None:
    for path in map(Path, paths):
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None
