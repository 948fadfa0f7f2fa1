"""Which tokens may follow: rows that the host writes one step after the other, while the device reads them."""

import pytest
import torch

from gfxlm.engine.masks import TokenMasks


def write(device: str, slots: int, words: int, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What was there behind each step, and what was to be."""
    masks = TokenMasks(slots, 32 * words - 5, device)
    assert masks.bits.shape == (slots, words)
    expected, seen, wanted = torch.full((slots, words), -1, dtype=torch.int32), [], []
    for step in range(steps):
        chosen = [slot for slot in reversed(range(slots)) if (slot + step) % 3]
        rows = torch.randint(-(2**31), 2**31 - 1, (len(chosen), 2 * words), dtype=torch.int32)[:, :words]
        expected[chosen] = rows
        masks.write(chosen, rows)
        rows.zero_()  # it is nobody's any longer
        if step % 4 == 3:
            masks.clear(step % slots)
            expected[step % slots] = -1
        seen.append(masks.bits.clone())
        wanted.append(expected.clone())
    return seen, wanted


def test_slots_have_the_rows_that_they_were_given() -> None:
    for seen, wanted in zip(*write("cpu", 5, 3, 8), strict=True):
        assert torch.equal(seen, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_row_is_not_written_over_before_it_was_sent() -> None:
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        busy = busy @ busy  # the host is far ahead
    for seen, wanted in zip(*write("cuda", 32, 4748, 40), strict=True):
        assert torch.equal(seen.cpu(), wanted)
