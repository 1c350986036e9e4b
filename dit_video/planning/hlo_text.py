"""A compiled program's text (HLO) as computations and instructions."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[suf]\d+\w*|c\d+)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAMES = re.compile(r"%([\w.\-]+)")
CALLEES = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Shape(NamedTuple):
    """An array of a program, on one device."""

    dtype: str
    sizes: tuple[int, ...]
    is_in_vmem: bool
    """The array is in the processor's on-chip memory (VMEM), not in HBM."""

    @property
    def values(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.values * (_BYTES[self.dtype] if self.dtype in _BYTES else max(1, int(bits[0]) // 8) if bits else 4)


class Instruction(NamedTuple):
    """An instruction: one line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Shapes of the result, or of the parts of a tuple."""
    operands: tuple[str, ...]
    rest: str
    """Operands and attributes as text."""
    is_root: bool


Computation = dict[str, Instruction]
"""Instructions by name."""


def parse_computations(text: str) -> tuple[dict[str, Computation], str | None]:
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = None
    for line in text.splitlines():
        if not line.startswith(" "):
            if header := _HEADER.match(line):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif (instruction := _parse_instruction(line)) is not None:
            current[instruction.name] = instruction
    return computations, entry


def _parse_instruction(line: str) -> Instruction | None:
    name, separator, definition = line.strip().partition(" = ")
    if not separator:
        return None
    root = name.startswith("ROOT ")
    end = _find_closing_bracket(definition, 0) + 1 if definition.startswith("(") else definition.find(" ")
    kind, opening, rest = definition[end:].strip().partition("(")
    if end <= 0 or not opening or " " in kind:
        return None
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(1)" in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(definition[:end])
    )
    inner = rest[: _find_closing_bracket("(" + rest, 0) - 1]
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), kind, shapes, tuple(_NAMES.findall(inner)), rest, root)


def _find_closing_bracket(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text) - 1


def find_users(name: str, computation: Computation) -> Iterator[Instruction]:
    """Yield the instructions that read an instruction's result, or a part of it."""
    for user in computation.values():
        if name not in user.operands:
            continue
        if user.opcode == "get-tuple-element":
            yield from find_users(user.name, computation)
        else:
            yield user
