"""Which part of a model went wrong, or whether the device has."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gfxlm.engine.request import Request
from gfxlm.models.base import CausalLM
from gfxlm.ops.ragged import ragged


@torch.inference_mode()
def first_nan_module(model: CausalLM, tokens: Sequence[int]) -> str:
    """Run the tokens again, from nothing, and name the first module to put out a NaN or an infinity.

    "the output head" where the hidden states are finite still, "no module" where the second run is clean.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        positions, slots = ragged([0], [len(tokens)], [0], model.device)
        cache = model.make_cache(1, len(tokens))
        hidden = model.forward(torch.tensor(list(tokens), device=model.device), positions, slots, cache)
        if not found and not model.logits(hidden[-1:]).isfinite().all():
            found.append("the output head")
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "no module on a second run"


def check_device(requests: Iterable[Request], device: torch.device) -> None:
    """Raise torch.AcceleratorError if one of these has failed because the device is lost to this process."""
    for request in requests:
        if isinstance(request.exception, torch.AcceleratorError):
            torch.zeros(1, device=device).cpu()  # a lost one refuses even this
