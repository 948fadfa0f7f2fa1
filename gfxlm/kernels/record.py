"""What a case would launch on an architecture."""

import torch
from torch import Tensor

from gfxlm.device.arch import Architecture
from gfxlm.kernels.case import Case
from gfxlm.kernels.launch import Launch, recording


def record(case: Case, arch: Architecture) -> list[Launch]:
    """The launches of one call of the case, in order. Inputs are on the "meta" device: they take no memory."""
    with torch.inference_mode(), recording(arch) as launches:
        call = case.make(torch.device("meta"))
        launches.clear()
        call()
    return launches


def argument_words(launch: Launch, signature: dict[str, str]) -> list[int | None]:
    """The arguments as the compiled kernel finds them: 32-bit words, pointers and all that is not an int being None."""
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    words: list[int | None] = []
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        value, size = values.get(name), 2 if kind.startswith("*") or kind.endswith("64") else 1
        if size == 2 and len(words) % 2:
            words.append(None)
        if isinstance(value, Tensor) or not isinstance(value, int):
            words += [None] * size
        else:
            words += [(value >> 32 * i) & 0xFFFFFFFF for i in range(size)]
    return words
