"""AMD's scalar registers by name, and what the instructions on them compute, as `walk` follows them."""

import re
from typing import Any

_NAMED = {"vcc_lo": 1000, "vcc_hi": 1001, "exec_lo": 1002, "exec_hi": 1003, "m0": 1004, "flat_scratch_lo": 1006}
_PAIRS = {"vcc": 1000, "exec": 1002}


def register_place(operand: str) -> tuple[int, int] | None:
    """First scalar register of an operand and how many there are; None where it is something else."""
    if operand in _NAMED:
        return _NAMED[operand], 1
    if operand in _PAIRS:
        return _PAIRS[operand], 2
    found = re.match(r"(s|ttmp)(?:(\d+)$|\[(\d+):(\d+)\]$)", operand)
    if found is None:
        return None
    first = int(found[2] or found[3]) + (2000 if found[1] == "ttmp" else 0)
    return first, int(found[4]) - int(found[3]) + 1 if found[3] else 1


def signed(value: int, bits: int = 32) -> int:
    """The two's complement number in the lowest bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


# By name without its type: of the width in bits and unsigned operands, to a result of any width.
ARITHMETIC: dict[str, Any] = {
    "s_mov": lambda w, a: a,
    "s_movk": lambda w, a: signed(a, 16),
    "s_add": lambda w, a, b: a + b,
    "s_addk": lambda w, a, b: a + signed(b, 16),
    "s_add_nc": lambda w, a, b: a + b,
    "s_sub": lambda w, a, b: a - b,
    "s_sub_nc": lambda w, a, b: a - b,
    "s_mul": lambda w, a, b: a * b,
    "s_mulk": lambda w, a, b: a * signed(b, 16),
    "s_lshl": lambda w, a, b: a << (b % w),
    "s_lshr": lambda w, a, b: a >> (b % w),
    "s_ashr": lambda w, a, b: signed(a, w) >> (b % w),
    "s_and": lambda w, a, b: a & b,
    "s_or": lambda w, a, b: a | b,
    "s_xor": lambda w, a, b: a ^ b,
    "s_andn2": lambda w, a, b: a & ~b,
    "s_and_not1": lambda w, a, b: a & ~b,
    "s_orn2": lambda w, a, b: a | ~b,
    "s_or_not1": lambda w, a, b: a | ~b,
    "s_nand": lambda w, a, b: ~(a & b),
    "s_nor": lambda w, a, b: ~(a | b),
    "s_not": lambda w, a: ~a,
    "s_abs": lambda w, a: abs(signed(a, w)),
    "s_lshl1_add": lambda w, a, b: (a << 1) + b,
    "s_lshl2_add": lambda w, a, b: (a << 2) + b,
    "s_lshl3_add": lambda w, a, b: (a << 3) + b,
    "s_lshl4_add": lambda w, a, b: (a << 4) + b,
    "s_bfe": lambda w, a, b: (a >> (b & 31)) & ((1 << ((b >> 16) & 127)) - 1),
    "s_bfm": lambda w, a, b: ((1 << (a & 31)) - 1) << (b & 31),
}
COMPARISONS: dict[str, Any] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
