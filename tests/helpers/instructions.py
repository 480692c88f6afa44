"""Instructions as nvdisasm prints them, and what a block of them does."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

CODE = re.compile(r"(?P<guard>@!?U?P\w+ )?(?P<name>[A-Z][\w.]*)(?P<operands>.*)")
REGISTER = re.compile(r"\bR(\d+)\b")


class Instruction(NamedTuple):
    """One instruction; opcode LDG of name LDG.E.128."""

    guarded: bool
    name: str
    operands: str

    @classmethod
    def parse(cls, code: str) -> Instruction:
        match = CODE.fullmatch(code)
        if match is None:
            raise ValueError(f"no instruction: {code!r}")
        return cls(match["guard"] is not None, match["name"], match["operands"].strip())

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Return how many bytes of 16 or more each thread accesses at a time, else 0."""
        for width in (128, 256):
            if f".{width}" in self.name:
                return width // 8
        return 0

    @property
    def loads(self) -> int:
        return self.bytes // 16 if self.opcode in ("LDG", "LDS", "LD") else 0

    @property
    def stores(self) -> int:
        """Packs that are written to global memory."""
        return self.bytes // 16 if self.opcode in ("STG", "ST") else 0

    @property
    def exponential(self) -> bool:
        """Return whether it takes the unit of special functions, also for logarithms."""
        return self.opcode == "MUFU"

    @property
    def conversion(self) -> bool:
        """Return whether it is a conversion, for which that unit is taken too."""
        return self.opcode in ("F2F", "F2I", "I2F", "FRND")

    @property
    def ends_block(self) -> bool:
        return self.opcode in ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX")

    @property
    def conditional(self) -> bool:
        """Return whether the next instruction may follow a branch."""
        return self.guarded or bool(re.match(r"!?U?P\d", self.operands)) or ".U" in self.name

    @property
    def first_registers(self) -> set[int]:
        """The registers of the first operand, which a load writes."""
        match = REGISTER.match(self.operands)
        first = int(match[1]) if match else 0
        return set(range(first, first + self.bytes // 4)) if match else set()

    def reads(self, registers: set[int]) -> bool:
        """Return whether an operand other than the destination is one of the registers."""
        operands = self.operands
        if not self.opcode.startswith(("ST", "RED")):
            operands = operands.partition(",")[2]
        return any(int(n) in registers for n in REGISTER.findall(operands))


Block = tuple[Instruction, ...]


def is_cold(block: Block) -> bool:
    """Whether a block of a loop is for rows off alignment, or for columns at an edge."""
    opcodes = Counter(i.opcode for i in block)
    single = [i for i in block if i.opcode in ("LDG", "LDS", "LD", "STG", "ST") and not i.bytes]
    narrow = any(".U16" in i.name or ".U8" in i.name for i in single)
    funnels = sum(i.name.startswith("SHF.R") and "U64" in i.name for i in block)
    cold = narrow or len(single) >= 3 or funnels >= 3 or opcodes["SEL"] >= 4
    return cold and not opcodes["MUFU"]


def is_edge(block: Block) -> bool:
    """Whether a block outside of loops loads columns off alignment, or one by one."""
    packs = sum(i.loads for i in block)
    narrow = sum(".U16" in i.name or ".U8" in i.name for i in block if i.opcode in ("LDG", "STG"))
    guarded = sum(i.guarded for i in block if i.opcode in ("LDG", "STG") and not i.bytes)
    return narrow >= 4 or guarded >= 4 or (packs >= 2 and is_cold(block))


class Work(NamedTuple):
    """What tells the paths through a loop apart."""

    loads: int  # of 16 bytes
    stores: int  # of 16 bytes
    exponentials: int
    cold: int = 0  # blocks that is_cold() describes

    @classmethod
    def of(cls, block: Block) -> Work:
        wide = [i for i in block if i.bytes]
        return cls(
            sum(i.loads for i in wide),
            sum(i.stores for i in wide),
            sum(i.exponential for i in block),
            int(is_cold(block)),
        )

    def plus(self, other: Work) -> Work:
        a, b = self, other
        return Work(a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])
