"""A batch that is refilled behind a recording says what a batch made for the occasion says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfxlm.device.mailbox import Mailbox
from gfxlm.kernels.attention.prefill import Tiles, prefill
from gfxlm.kernels.batch import Batch, RefilledBatch, Span, Table
from gfxlm.kernels.delta.chunks import delta_chunked
from gfxlm.kernels.delta.recurrent import delta_recurrent
from gfxlm.kernels.delta.rows import Chunks, Sequences

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [Tiles(4, True), Tiles(16, False), Tiles(1, True), Chunks(), Sequences()]


def spans(lengths: list[int], offsets: list[int], slots: list[int]) -> list[Span]:
    found, start = [], 0
    for length, offset, slot in zip(lengths, offsets, slots, strict=True):
        found.append(Span(slot, start, start + length, offset + length))
        start += length
    return found


def refilled(rows: int, sequences: int) -> tuple[RefilledBatch, Mailbox]:
    mailbox = Mailbox(16 * (rows + sequences), DEVICE)
    return RefilledBatch(rows, sequences, mailbox), mailbox


@settings(deadline=None)  # a GPU's first copy is slow
@given(st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=5), min_size=1, max_size=4))
def test_tables_are_those_of_a_new_batch_and_zeros(batches: list[list[int]]) -> None:
    batch, mailbox = refilled(1000, 5)
    before: dict[Table, torch.Tensor] = {}
    for lengths in batches:
        wanted = Batch(spans(lengths, [7] * len(lengths), list(range(len(lengths)))), DEVICE)
        batch.fill(wanted.spans)
        mailbox.send()
        for kind in KINDS:
            table = batch.table(kind)
            assert before.setdefault(kind, table).data_ptr() == table.data_ptr()
            entries = wanted.table(kind)
            assert table[: len(entries)].tolist() == entries.tolist()
            assert not table[len(entries) :].any()


@given(st.integers(1, 3000), st.integers(1, 40), st.data())
def test_most_is_enough(rows: int, sequences: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=sequences - 1, max_size=sequences - 1)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    batch = Batch(spans(lengths, [0] * sequences, [0] * sequences), torch.device("cpu"))
    for kind in KINDS:
        assert len(kind.entries(batch.spans)) <= kind.most(rows, sequences)


def test_a_mailbox_has_an_end() -> None:
    mailbox = Mailbox(10, DEVICE)
    first, second = mailbox.tensor((3,), torch.int32), mailbox.tensor((2,), torch.int64)
    with pytest.raises(RuntimeError, match="4 words do not fit beside 8 of 10"):
        mailbox.tensor((2, 2), torch.int32)
    mailbox.write(second, [1 << 40, -1])
    mailbox.write(first, [1, 2, 3])
    assert not second.any()
    mailbox.send()
    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [1 << 40, -1])


LENGTHS, OFFSETS, SLOTS, ROWS = [5, 1, 70], [0, 33, 64], [2, 0, 1], 96


def test_attention_of_a_refilled_batch() -> None:
    real = spans(LENGTHS, OFFSETS, SLOTS)
    padding = Span(-1, 76, ROWS, 20)
    batch, mailbox = refilled(ROWS, 6)
    k, v = torch.randn(2, 3, 150, 2, 16, device=DEVICE)
    q = torch.randn(1, ROWS, 4, 16, device=DEVICE)
    for filled in ([Span(-1, 0, ROWS, ROWS)], [*real, padding]):
        out = torch.full_like(q, torch.nan)
        batch.fill(filled)
        mailbox.send()
        prefill(q, k, v, out, batch, scale=0.25)
        wanted = torch.zeros_like(q)
        prefill(q, k, v, wanted, Batch([span for span in filled if span.slot >= 0], DEVICE), scale=0.25)
        assert not wanted[:, padding.start :].any()
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_delta_rule_of_a_refilled_batch(dtype: torch.dtype) -> None:
    real = spans(LENGTHS, OFFSETS, SLOTS)
    filled = [*real, Span(-1, 76, ROWS, 20)]
    q, k = (torch.nn.functional.normalize(torch.randn(ROWS, 1, 16), dim=-1).to(DEVICE, dtype) for _ in range(2))
    v = torch.randn(ROWS, 2, 16).to(DEVICE, dtype)
    gamma, beta = torch.rand(2, ROWS, 2, device=DEVICE)
    state = torch.randn(4, 2, 16, 16, device=DEVICE)
    positions = torch.tensor([p for s in filled for p in range(s.context - s.rows, s.context)], device=DEVICE)
    slots = torch.tensor([s.slot for s in filled for _ in range(s.rows)], device=DEVICE)
    batch, mailbox = refilled(ROWS, 6)
    results = []
    for of in (batch, Batch(filled, DEVICE)):
        if of is batch:
            batch.fill(filled)
            mailbox.send()
        after = state.clone()
        if dtype == torch.float32:
            y = delta_recurrent(q, k, v, gamma, beta, after, of, dtype, slots, positions)
        else:
            y = delta_chunked(q, k, v, gamma, beta, after, of, slots, positions)
        results.append((y, after))
    (y, after), (wanted, wanted_after) = results
    assert torch.equal(y, wanted)
    assert torch.equal(after, wanted_after)
    assert torch.equal(after[3], state[3])
    assert not torch.equal(after[0], state[0])
