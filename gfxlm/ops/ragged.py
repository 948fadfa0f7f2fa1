"""The flattened ragged batch: the tokens of several sequences laid end to end, with no padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfxlm.kernels.batch import Batch, Span
from gfxlm.ops._common import on_gpu


@dataclass(frozen=True, slots=True)
class Slots:
    """Which cache slot every row of a flattened batch belongs to.

    `index` is the slot of each row, on the device, int64 (N,). `spans` says the same once more in host integers,
    which the scheduler knows anyway: nobody ever reads `index` back. With a `batch` there are no spans: kernels find in
    its tables what the batch is at the time, and a row with a negative slot is padding.
    """

    index: Tensor
    spans: tuple[Span, ...]
    batch: Batch | None = None


def check_slots(op: str, rows: int, positions: Tensor, slots: Slots) -> None:
    """ValueError unless every row of a batch has a position and a slot: kernels read as many as there are rows.

    And for a batch that is refilled where no kernels are: all else goes by the spans, which it does not have.
    """
    if slots.batch is not None and not on_gpu(positions):
        raise ValueError(f"{op}: a batch that is refilled is for kernels, and there are none on {positions.device}")
    for name, x in (("positions", positions), ("slots.index", slots.index)):
        if x.shape != (rows,) or x.dtype != torch.int64:
            raise ValueError(f"{op}: {name} must be int64 ({rows},), got {x.dtype} {tuple(x.shape)}")


def ragged(
    slots: Sequence[int], lengths: Sequence[int], offsets: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Slots]:
    """Lay out sequences end to end: `lengths[i]` new tokens for `slots[i]`, which already holds `offsets[i]`.

    Returns the positions, int64 (N,), and the `Slots` that `model.forward(tokens, positions, slots, cache)` takes.
    ValueError if there are not as many of each, or a length or an offset is negative.
    """
    if not len(slots) == len(lengths) == len(offsets) or min((*lengths, *offsets), default=0) < 0:
        raise ValueError(
            "ragged: slots, lengths and offsets must be one of each a sequence, none below 0, "
            f"got {list(slots)}, {list(lengths)} and {list(offsets)}"
        )
    spans = []
    start = 0
    for slot, length, offset in zip(slots, lengths, offsets, strict=True):
        spans.append(Span(slot, start, start + length, offset + length))
        start += length
    index = [span.slot for span in spans for _ in range(span.start, span.stop)]
    places = [p for span in spans for p in range(span.context - (span.stop - span.start), span.context)]
    positions = torch.tensor(places, dtype=torch.int64, device=device)
    return positions, Slots(torch.tensor(index, dtype=torch.int64, device=device), tuple(spans))
