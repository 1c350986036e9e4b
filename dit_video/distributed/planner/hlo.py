"""Operations, memory traffic and collectives of a compiled program, read from its text (HLO).

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it runs: the trip
count of a loop is its `known_trip_count`, or the constant of its condition. A loop with neither, whose end depends on
data, counts once, and `Program.unknown_loops` is the number of such loops.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from dit_video.distributed.planner.groups import axes_of, lists, replica_groups
from dit_video.distributed.planner.products import convolution_flops, dot_flops

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[suf]\d+\w*|c\d+)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHAIN = re.compile(r'"?chain_id"?[:=]"?(\w+)"?')
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Kinds of collectives; a ragged all-to-all counts as an all-to-all, a broadcast as a permutation."""
_KIND = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "collective-permute"}


class Shape(NamedTuple):
    """An array of a program, on one device."""

    dtype: str
    sizes: tuple[int, ...]
    near: bool
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
    kind: str
    shapes: tuple[Shape, ...]
    """Shapes of the result, or of the parts of a tuple."""
    operands: tuple[str, ...]
    rest: str
    """Operands and attributes as text."""
    root: bool


Computation = dict[str, Instruction]


@dataclass
class Moved:
    """Traffic of one kind of collective over some mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    bytes: float = 0.0
    """Lower bound on the bytes that each device receives.

    `(n - 1) / n` of what is gathered, scattered or exchanged among `n` devices, and twice that for an all-reduce.
    """
    times: int = 0
    """Number of executions in one step."""


@dataclass
class Program:
    """Operations of one step of a compiled program, on one device."""

    flops: float = 0.0
    """FLOPs of matrix products and convolutions, without those inside kernels."""
    bytes: float = 0.0
    """Bytes that instructions read from HBM and write to it, assuming that no operand is cached."""
    kernels: int = 0
    """Calls of custom kernels, whose FLOPs the text doesn't contain."""
    moved: dict[tuple[str, tuple[str, ...]], Moved] = field(default_factory=dict)
    """Traffic by kind of collective and mesh axes."""
    kept: float = 0.0
    """Bytes that loops over layers stack up for the backward pass."""
    unknown_loops: int = 0
    """Number of loops whose trip count is unknown, each counted once."""

    @property
    def sent(self) -> float:
        """Return the bytes that a device receives from all collectives."""
        return sum((part.bytes for part in self.moved.values()), start=0.0)


def read_program(text: str, mesh: dict[str, int], *, turns: int = 1, room: int | None = None) -> Program:
    """Read the operations of a compiled program from `compiled.as_text()`.

    Args:
      text: the program's HLO.
      mesh: sizes of the mesh's axes by name.
      outer_trip_count: assumed trip count of an outermost loop whose end depends on data, such as a sampler's steps:
        one with an unknown trip count, or with `max_outer_trip_count`, most of whose iterations may do nothing.
      max_outer_trip_count: upper bound of that loop's trip count.
    """
    computations, entry = _computations(text)
    reader = _Reader(computations, mesh, turns, room)
    if entry is not None:
        reader.walk(entry, 1, inside=False)
    return reader.found


def _computations(text: str) -> tuple[dict[str, Computation], str | None]:
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = None
    for line in text.splitlines():
        if not line.startswith(" "):
            if header := _HEADER.match(line):
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    name, separator, definition = line.strip().partition(" = ")
    if not separator:
        return None
    root = name.startswith("ROOT ")
    end = _closing(definition, 0) + 1 if definition.startswith("(") else definition.find(" ")
    kind, opening, rest = definition[end:].strip().partition("(")
    if end <= 0 or not opening or " " in kind:
        return None
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(1)" in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(definition[:end])
    )
    inner = rest[: _closing("(" + rest, 0) - 1]
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), kind, shapes, tuple(_NAMES.findall(inner)), rest, root)


def _closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text) - 1


_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
        *("while", "conditional", "call", "opt-barrier", "async-start", "async-update", "async-done"),
    }
)
"""Opcodes that don't access memory themselves."""


_SLICES = frozenset({"slice", "slice-start", "dynamic-slice", "gather"})
"""Opcodes that read no more of their first operand than they return."""


class _Reader:
    """Accumulates the costs of a program while walking through its computations."""

    def __init__(self, computations: dict[str, Computation], mesh: dict[str, int], outermost: int, room: int | None):
        self.computations, self.mesh, self.outermost, self.room = computations, mesh, outermost, room
        self.found = Program()
        self._chains: set[tuple[str, str]] = set()

    def walk(self, name: str, times: int, *, inside: bool) -> None:
        """Count a computation that runs `executions` times; nothing inside a fusion accesses memory."""
        computation = self.computations.get(name, {})
        for instruction in computation.values():
            self._count(instruction, computation, times, inside)

    def _count(self, each: Instruction, computation: Computation, times: int, inside: bool) -> None:
        if each.kind == "while":
            self._loop(each, times)
            return
        if each.kind.endswith(("-done", "-update")):  # Counted at its start.
            return
        if each.kind == "dot":
            self.found.flops += times * dot_flops(each, computation)
        elif each.kind == "convolution":
            self.found.flops += times * convolution_flops(each, computation)
        elif each.kind == "custom-call" and "tpu_custom_call" in each.rest:
            self.found.kernels += times
        self._collective(each, computation, times)
        if not inside and each.kind not in _FREE:
            self.found.bytes += times * self._traffic(each, computation)
        fused = inside or each.kind == "fusion"
        for kind, callee in _CALLED.findall(each.rest):
            if kind != "to_apply" or each.kind == "call":
                self.walk(callee, times, inside=fused)
        for branches in _BRANCHES.findall(each.rest):
            for callee in re.findall(r"[\w.\-]+", branches):
                self.walk(callee, times, inside=fused)

    def _loop(self, each: Instruction, times: int) -> None:
        callees = dict(_CALLED.findall(each.rest))
        trip_count = self._turns(each, callees.get("condition", ""))
        # A loop with the maximum trip count may end earlier, so the assumed trip count replaces it.
        if trip_count is not None and trip_count == self.room and times == 1:
            trip_count = self.outermost
        if trip_count is None:
            trip_count = self.outermost if times == 1 else 1
            self.found.unknown_loops += trip_count == 1
        body = callees.get("body", "")
        # Backward loops ("transpose") only consume what the forward loops have stacked up.
        if "transpose(" not in each.rest and times == 1:
            self.found.kept += _stacked(self.computations, body, trip_count)
        self.walk(body, times * trip_count, inside=False)

    def _turns(self, each: Instruction, condition: str) -> int | None:
        if known := _TRIPS.search(each.rest):
            return int(known[1])
        # A loop that counts up compares its counter with the largest scalar constant of its condition.
        instructions = self.computations.get(condition, {})
        if any(part.kind == "compare" and "direction=LT" in part.rest for part in self._within(instructions)):
            limits = [
                part for part in self._within(instructions) if part.kind == "constant" and part.shapes[0].values == 1
            ]
            numbers = [int(part.rest.split(")")[0]) for part in limits if re.match(r"\d+\)", part.rest)]
            return max(numbers) if numbers else None
        return None

    def _within(self, computation: Computation) -> Iterator[Instruction]:
        for instruction in computation.values():
            yield instruction
            for kind, callee in _CALLED.findall(instruction.rest):
                if kind == "calls":
                    yield from self._within(self.computations.get(callee, {}))

    def _collective(self, each: Instruction, computation: Computation, times: int) -> None:
        kind = each.kind.removesuffix("-start")
        kind = _KIND.get(kind, kind)
        if kind not in COLLECTIVES:
            return
        if chain := _CHAIN.search(each.rest):
            # One asynchronous collective is printed in the computations of its start, its middle and its end.
            if (kind, chain[1]) in self._chains:
                return
            self._chains.add((kind, chain[1]))
        sources = [computation[name] for name in each.operands if name in computation]
        operand_bytes = sum(shape.bytes for source in sources for shape in source.shapes)
        if kind == "collective-permute":
            pairs = lists(each.rest, "source_target_pairs")
            group = next((pair for pair in pairs if pair[0] != pair[1]), [])
            remote_share = 1.0
        else:
            groups = replica_groups(each.rest, math.prod(self.mesh.values()))
            group = groups[0] if groups else []
            remote_share = (len(group) - 1) / max(1, len(group))
        if len(group) < 2:
            return
        if kind == "all-reduce" and self._scatters(each, computation):
            kind = "reduce-scatter"
        received = {"all-gather": operand_bytes * len(group), "all-reduce": 2 * operand_bytes}.get(
            kind, operand_bytes
        ) * remote_share
        axes = axes_of(group, self.mesh, permuted=kind == "collective-permute")
        traffic = self.found.moved.setdefault((kind, axes), Moved(kind, axes))
        traffic.bytes += times * received
        traffic.times += times

    def _scatters(self, each: Instruction, computation: Computation) -> bool:
        """Return True if only slices of an all-reduce are used: a compiler pass turns it into a reduce-scatter."""
        users = list(_users(each.name, computation))
        return bool(users) and not each.root and all(user.kind == "dynamic-slice" for user in users)

    def _traffic(self, each: Instruction, computation: Computation) -> int:
        """Return the bytes that an instruction reads and writes."""
        callee = dict(_CALLED.findall(each.rest)).get("calls") if each.kind == "fusion" else None
        fused = self.computations.get(callee, {}) if callee else {}
        return sum(self._read(each, fused, computation)) + self._written(each, fused, computation)

    def _read(self, each: Instruction, fused: Computation, computation: Computation) -> Iterator[int]:
        parameters = {part.rest.split(")")[0]: part.name for part in fused.values() if part.kind == "parameter"}
        for number, name in enumerate(each.operands):
            source = computation.get(name)
            if source is None or len(source.shapes) != 1 or source.shapes[0].near:
                continue
            if each.kind in _SLICES:
                yield sum(shape.bytes for shape in _made(each)) if number == 0 else 0
                continue
            if each.kind == "dynamic-update-slice" and number == 0:
                continue
            parameter = parameters.get(str(number))
            users = [part for part in fused.values() if parameter is not None and parameter in part.operands]
            slices = [part for part in users if part.kind in _SLICES and part.operands[0] == parameter]
            updates = [part for part in users if part.kind == "dynamic-update-slice" and part.operands[0] == parameter]
            # A fusion that only slices an operand, or updates it in place, doesn't read the rest of it.
            if users and len(slices) + len(updates) == len(users):
                yield sum(part.shapes[0].bytes for part in slices)
            else:
                yield source.shapes[0].bytes

    def _written(self, each: Instruction, fused: Computation, computation: Computation) -> int:
        root = next((part for part in fused.values() if part.root), None)
        update = root if root is not None else each
        if update.kind == "dynamic-update-slice":
            value = (fused if root is not None else computation).get(update.operands[1])
            return value.shapes[0].bytes if value is not None and value.shapes else 0
        return sum(shape.bytes for shape in _made(each) if not shape.near)


def _made(each: Instruction) -> tuple[Shape, ...]:
    """Return the shapes of an instruction's results; asynchronous starts list those of their operands, too."""
    if each.kind == "copy-start":  # (destination, source, context); the others list their operands first
        return each.shapes[:1]
    if each.kind in ("slice-start", "all-gather-start", "collective-permute-start"):
        operands = len(each.operands)
        return each.shapes[operands : 2 * operands]
    return each.shapes


def _users(name: str, computation: Computation) -> Iterator[Instruction]:
    """Yield the instructions that read an instruction's result, or a part of it."""
    for user in computation.values():
        if name not in user.operands:
            continue
        if user.kind == "get-tuple-element":
            yield from _users(user.name, computation)
        else:
            yield user


def _stacked(computations: dict[str, Computation], body: str, turns: int) -> float:
    """Return the bytes of the arrays into which a loop writes one slice per iteration."""
    computation = computations.get(body, {})
    root = next((instruction for instruction in computation.values() if instruction.root), None)
    total = 0.0
    for name in root.operands if root is not None else ():
        instruction = computation.get(name)
        while (
            instruction is not None
            and instruction.kind in ("bitcast", "copy", "get-tuple-element")
            and instruction.operands
        ):
            instruction = computation.get(instruction.operands[0])
        if instruction is None or not instruction.shapes or instruction.shapes[0].sizes[:1] != (turns,) or turns < 2:
            continue
        inner = computations.get(dict(_CALLED.findall(instruction.rest)).get("calls", ""), {"": instruction})
        if any(part.kind == "dynamic-update-slice" for part in inner.values()):
            total += sum(shape.bytes for shape in instruction.shapes)
    return total
