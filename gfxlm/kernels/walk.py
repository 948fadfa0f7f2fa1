"""How often each instruction of AMD machine code is executed, found by following one wave through it.

Loops of a kernel turn on scalar registers, so only those are given values: kernel arguments are the launch's own,
program ids are 0, what is loaded from memory or computed by lanes is unknown. A skip over code that depends on an
unknown value is not taken. A loop that does so is gone through once, and the walk then says that it is not exact.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from gfxlm.kernels.scalar import ARITHMETIC, COMPARISONS, register_place, signed

_MASK = 0xFFFFFFFF
_STEPS = 2_000_000  # of a walk, before it is given up
_KERNARG = 1 << 44  # where kernel arguments are made out to lie
_EXEC = (1002, 1003)
_MATRIX = re.compile(r"v_(wmma|mfma|swmmac|smfmac)")


@dataclass(frozen=True, slots=True)
class Walked:
    """Executions by one wave. `vector` counts vector-ALU instructions, matrix ones left out; per name in `all`."""

    counts: Counter[str]
    exact: bool

    @property
    def vector(self) -> int:
        """Vector-ALU instructions that were issued."""
        return sum(n for name, n in self.counts.items() if name.startswith("v_") and not _MATRIX.match(name))


def walk(assembly: str, arguments: list[int | None]) -> Walked:
    """Follow the wave of program (0, 0, 0). `arguments` are the compiled kernel's, in order; None where not known."""
    return _Wave(assembly, arguments).run()


_TYPED = re.compile(r"(\w+?)_([iub])(16|32|64)$")


@dataclass(slots=True)
class _Wave:
    assembly: str
    arguments: list[int | None]
    registers: dict[int, int | None] = field(default_factory=dict)
    scc: int | None = None
    exact: bool = True

    def run(self) -> Walked:
        code, labels = _parse(self.assembly)
        self._start()
        executed = [0] * len(code)
        place, steps = 0, 0
        while place < len(code) and steps < _STEPS:
            name, operands = code[place]
            executed[place] += 1
            steps += 1
            if name == "s_endpgm":
                break
            if name.startswith(("s_cbranch", "s_branch")):
                target = labels[operands[-1]]
                place = target if self._jumps(name, backward=target <= place) else place + 1
                continue
            self._execute(name, operands)
            place += 1
        counts: Counter[str] = Counter()
        for (name, _), times in zip(code, executed, strict=True):
            counts[name] += times
        return Walked(+counts, self.exact and steps < _STEPS)

    def _start(self) -> None:
        def setting(name: str) -> int:
            found = re.search(rf"\.amdhsa_{name} (\d+)", self.assembly)
            return int(found[1]) if found else 0

        kernarg = 4 * setting("user_sgpr_private_segment_buffer")
        kernarg += 2 * setting("user_sgpr_dispatch_ptr") + 2 * setting("user_sgpr_queue_ptr")
        self._write(kernarg, 2, _KERNARG)
        user = setting("user_sgpr_count")
        preloaded = setting("user_sgpr_kernarg_preload_length")
        for i in range(preloaded):
            address = _KERNARG + 4 * (setting("user_sgpr_kernarg_preload_offset") + i)
            self._write(user - preloaded + i, 1, self._load(address))
        for i in range(3):
            self._write(user + i, 1, 0)
        self._write(2007, 1, 0)  # ttmp7 and ttmp9 hold program ids on gfx12
        self._write(2009, 1, 0)

    def _jumps(self, name: str, *, backward: bool) -> bool:
        if name == "s_branch":
            return True
        condition = name.removeprefix("s_cbranch_")
        if condition.startswith("exec"):  # some lane is always at work
            return condition == "execnz" and not backward
        value = self.scc if condition.startswith("scc") else self._read_register(1000, 2 if self._wide() else 1)
        if value is None:
            self.exact &= not backward
            return False
        return bool(value) == condition.endswith(("1", "nz"))

    def _wide(self) -> bool:
        return ".amdhsa_wavefront_size32 1" not in self.assembly

    def _execute(self, name: str, operands: list[str]) -> None:
        if name.startswith(("s_load_", "s_buffer_load_")):
            self._load_scalars(name, operands)
        elif name.startswith(("s_cmp", "s_bitcmp")):
            self.scc = self._compare(name, operands)
        elif name.startswith("s_"):
            self._compute(name, operands)
        elif operands:  # a lane's result in a scalar register: a comparison's, a carry, readfirstlane's
            for operand in operands[: 2 if "_co_" in name or "div_scale" in name else 1]:
                place = register_place(operand)
                if place is not None:
                    self._write(*place, None)

    def _compute(self, name: str, operands: list[str]) -> None:
        place = register_place(operands[0]) if operands else None
        if place is None:
            return
        values = [self._read(operand) for operand in operands[1:]]
        if "saveexec" in name:
            self._write(*place, _ones(place[1]))
            self.scc = 1
            return
        value = self._value(name, operands, values)
        self._write(*place, value)

    def _value(self, name: str, operands: list[str], values: list[int | None]) -> int | None:
        if name.startswith("s_cselect"):
            return None if self.scc is None else values[0 if self.scc else 1]
        if name.startswith("s_cmov"):
            return None if self.scc is None else values[0] if self.scc else self._read(operands[0])
        kind = _TYPED.match(name)
        stem, sign, bits = (kind[1].replace("_co", ""), kind[2], int(kind[3])) if kind else (name, "u", 32)
        if name.startswith("s_sext_i32"):
            kind = re.match(r".*_i(8|16)$", name)
            return None if values[0] is None or kind is None else signed(values[0], int(kind[1]))
        if stem in ("s_addk", "s_mulk"):
            values = [self._read(operands[0]), *values]
        known = [value for value in values if value is not None]
        carry = self.scc
        if stem != "s_mov" and stem != "s_movk" and not stem.startswith(("s_mul", "s_cselect")):
            self.scc = None
        if len(known) != len(values):
            return 0 if stem == "s_and" and 0 in known else None
        if stem in ("s_min", "s_max"):
            return self._extreme(stem, sign, bits, known)
        if stem == "s_mul_hi":
            pair = [signed(value) if sign == "i" else value & _MASK for value in known]
            return pair[0] * pair[1] >> 32
        if stem in ("s_addc", "s_subb", "s_add_ci", "s_sub_ci"):
            if carry is None:
                return None
            total = known[0] + known[1] + carry if "add" in stem else known[0] - known[1] - carry
            self.scc = int(not 0 <= total <= _MASK)
            return total
        if stem not in ARITHMETIC:
            return None
        width = 64 if bits == 64 else 32
        result: int = ARITHMETIC[stem](width, *(value & ((1 << width) - 1) for value in known))
        if stem == "s_bfe" and sign == "i" and known[1] >> 16 & 127:
            result = signed(result, known[1] >> 16 & 127)
        if stem in ("s_add", "s_sub") and sign == "u":
            self.scc = int(not 0 <= result < 1 << width)
        elif stem not in ("s_mov", "s_movk", "s_add", "s_sub", "s_addk") and not stem.startswith("s_mul"):
            self.scc = int(result & ((1 << width) - 1) != 0)
        return result

    def _extreme(self, stem: str, sign: str, bits: int, known: list[int]) -> int:
        pair = [signed(value, bits) if sign == "i" else value & _MASK for value in known]
        best = min(pair) if stem == "s_min" else max(pair)
        self.scc = int(best == pair[0])
        return best

    def _compare(self, name: str, operands: list[str]) -> int | None:
        a, b = (self._read(operand) for operand in operands[:2])
        if a is None or b is None:
            return None
        if name.startswith("s_bitcmp"):
            return int((a >> (b & 31) & 1) == int(name[8]))
        found = re.match(r"s_cmpk?_(\w\w)_([iu])(32|64)$", name)
        if found is None:
            return None
        bits = int(found[3])
        if name.startswith("s_cmpk"):
            b = signed(b, 16) if found[2] == "i" else b & 0xFFFF
        sides = (signed(v, bits) if found[2] == "i" else v & ((1 << bits) - 1) for v in (a, b))
        return int(COMPARISONS[found[1]](*sides))

    def _load_scalars(self, name: str, operands: list[str]) -> None:
        place, base = register_place(operands[0]), self._read(operands[1])
        assert place is not None
        offset = self._read(operands[2].split(" ")[0]) if len(operands) > 2 else 0
        for i in range(place[1]):
            known = base is not None and offset is not None and not name.startswith("s_buffer")
            self._write(place[0] + i, 1, self._load((base or 0) + (offset or 0) + 4 * i) if known else None)

    def _load(self, address: int) -> int | None:
        word = (address - _KERNARG) // 4
        return self.arguments[word] if 0 <= word < len(self.arguments) else None

    def _read(self, operand: str) -> int | None:
        place = register_place(operand)
        if place is not None:
            return self._read_register(*place)
        try:
            return int(operand, 0)
        except ValueError:
            return None

    def _read_register(self, first: int, width: int) -> int | None:
        if first in _EXEC:
            return _ones(width)
        words = [self.registers.get(first + i) for i in range(width)]
        if any(word is None for word in words):
            return None
        return sum((word or 0) << 32 * i for i, word in enumerate(words))

    def _write(self, first: int, width: int, value: int | None) -> None:
        for i in range(width):
            self.registers[first + i] = None if value is None else (value >> 32 * i) & _MASK


def _ones(width: int) -> int:
    return (1 << 32 * width) - 1


def _parse(assembly: str) -> tuple[list[tuple[str, list[str]]], dict[str, int]]:
    """Instructions and the index that each label stands before."""
    code: list[tuple[str, list[str]]] = []
    labels: dict[str, int] = {}
    for line in assembly[: assembly.find("\n.Lfunc_end0:")].splitlines():
        text = line.split(";")[0].strip()
        if re.match(r"[\w.$]+:$", text):
            labels[text[:-1]] = len(code)
        elif text and not text.startswith("."):
            name, _, rest = text.partition(" ") if "\t" not in text else text.partition("\t")
            code.append((name, [part.strip() for part in rest.split(",")] if rest else []))
    return code, labels
