"""Where in a store a sequence's keys are.

With pages, a slot of the store is a page, and a table (slots, n_pages) says where a sequence's pages are.
"""

import triton
import triton.language as tl


@triton.jit
def page_at(pages, slot, keys, last, page_size: tl.constexpr):
    """The pages (int64) that hold some keys of a sequence, as far as these are before `last`."""
    p_page = pages[0] + slot.to(tl.int64) * pages[1] + keys // page_size
    return tl.load(p_page, mask=keys < last, other=0).to(tl.int64)


@triton.jit
def locate(
    store, pages, slot, i_head, start, last, page_size: tl.constexpr, in_one: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Offsets of the keys from `start` on: one for all of them (int64), and one for each.

    If they all lie `in_one` slot of the store, that is the slot; else they are in pages of the sequence's slot.
    """
    stride_slot, stride_key, stride_head = store[2], store[3], store[4]
    o_n = tl.arange(0, BLOCK_N)
    first = i_head.to(tl.int64) * stride_head
    if in_one:
        o_key = start if page_size == 0 else start % page_size
        return first + slot.to(tl.int64) * stride_slot + tl.cast(o_key, tl.int64) * stride_key, o_n * stride_key
    else:
        o_key = start + o_n
        page = page_at(pages, slot, o_key, last, page_size)
        return first, page * stride_slot + (o_key % page_size).to(tl.int64) * stride_key
