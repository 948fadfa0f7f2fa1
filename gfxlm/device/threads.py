"""How many processor threads an operation is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread(wanted: bool) -> Iterator[None]:
    """Run torch's CPU operations on one thread while inside, if `wanted`.

    Waking the others costs some microseconds an operation, and milliseconds where another process holds their core.
    """
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
