"""Amounts of memory: how they are written, and that what there is adds up."""

import pytest
import torch

from gfxlm.device.memory import available_bytes, parsed_bytes, peak_bytes, shown, taken_bytes, total_bytes
from gfxlm.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("amount", "nbytes"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 24 << 30),
        (" 1.5 g ", 1_500_000_000),
        ("512mib", 512 << 20),
        ("2T", 2_000_000_000_000),
        ("10kB", 10_000),
        ("4096", 4096),
        ("4096b", 4096),
        (1 << 33, 1 << 33),
    ],
)
def test_amounts(amount: str | int, nbytes: int) -> None:
    assert parsed_bytes(amount, DEVICE) == nbytes


def test_shares_are_of_all_there_is() -> None:
    assert parsed_bytes("50%", DEVICE) == total_bytes(DEVICE) // 2


@pytest.mark.parametrize("amount", ["", "much", "-3GB", "0", "0%", "101%", "3 XB", "24GB or so", "1e9", "GB"])
def test_what_is_no_amount(amount: str) -> None:
    with pytest.raises(UserError, match="expected an amount like 24GB, 24GiB or 80%"):
        parsed_bytes(amount, DEVICE)


def test_what_is_taken_is_not_available() -> None:
    assert 0 < available_bytes(DEVICE) <= total_bytes(DEVICE)
    before = taken_bytes(DEVICE)
    held = torch.ones(64 << 20, dtype=torch.uint8, device=DEVICE)
    taken = taken_bytes(DEVICE)
    assert 0.9 * held.nbytes <= taken - before <= 1.5 * held.nbytes
    assert peak_bytes(DEVICE) >= taken
    limit = taken + 1000
    assert available_bytes(DEVICE, limit) <= 1000
    assert available_bytes(DEVICE, 1000) == 0
    assert available_bytes(DEVICE, 1 << 60) == pytest.approx(available_bytes(DEVICE), rel=0.2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_torch_keeps_unused_is_available() -> None:
    torch.cuda.empty_cache()
    before = available_bytes(DEVICE)
    held = torch.ones(256 << 20, dtype=torch.uint8, device=DEVICE)
    assert available_bytes(DEVICE) <= before - held.nbytes
    del held
    assert abs(available_bytes(DEVICE) - before) <= 4 << 20


@pytest.mark.parametrize(
    ("nbytes", "text"), [(4_610_000_000, "4.61 GB"), (2_000_000, "2.00 MB"), (1500, "1.50 kB"), (12, "12 bytes")]
)
def test_amounts_for_reading(nbytes: int, text: str) -> None:
    assert shown(nbytes) == text
