"""A compiled program's text (HLO), read: what it computes, and what it moves between devices.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it runs: a loop's
turns are in its `known_trip_count`, or the constant of its condition. Where neither is, as in loops that the data end,
one turn is counted and `Program.unknown_loops` says how many loops there are of this kind.
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
    """One array of a program, on one device."""

    dtype: str
    sizes: tuple[int, ...]
    near: bool
    """whether it lies in memory beside the processor (VMEM), not in HBM"""

    @property
    def values(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.values * (_BYTES[self.dtype] if self.dtype in _BYTES else max(1, int(bits[0]) // 8) if bits else 4)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    """of the result, or of the parts of a tuple"""
    operands: tuple[str, ...]
    rest: str
    """the operands and attributes, as they stand"""
    root: bool


Computation = dict[str, Instruction]


@dataclass
class Moved:
    """What one kind of collective moves over some axes of the mesh, in one step."""

    kind: str
    axes: tuple[str, ...]
    bytes: float = 0.0
    """that each device receives, at the least: `(n - 1) / n` of what is gathered, scattered or exchanged among `n`
    devices, twice that of what is summed and given to all"""
    times: int = 0


@dataclass
class Program:
    """What one step of a compiled program does on one device."""

    flops: float = 0.0
    """of matrix products and convolutions, but for those of kernels"""
    bytes: float = 0.0
    """that instructions read from HBM and write to it, as if none found its operands in a cache"""
    kernels: int = 0
    """calls of kernels, whose operations the text does not tell"""
    moved: dict[tuple[str, tuple[str, ...]], Moved] = field(default_factory=dict)
    kept: float = 0.0
    """bytes that loops over layers stack up for the backward pass"""
    unknown_loops: int = 0

    @property
    def sent(self) -> float:
        """Bytes of all collectives."""
        return sum((part.bytes for part in self.moved.values()), start=0.0)


def read_program(text: str, mesh: dict[str, int], *, turns: int = 1, room: int | None = None) -> Program:
    """What a compiled program does, from `compiled.as_text()`, for a mesh of these axes and sizes.

    `turns` are those of an outermost loop that the data end, such as a sampler's steps: one that does not say how many
    it has, or that has as many as there is `room` for, in most of which nothing may be done.
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
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    kind, opening, rest = right[end:].strip().partition("(")
    if end <= 0 or not opening or " " in kind:
        return None
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), "S(1)" in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(right[:end])
    )
    inner = rest[: _closing("(" + rest, 0) - 1]
    return Instruction(left.removeprefix("ROOT ").lstrip("%"), kind, shapes, tuple(_NAMES.findall(inner)), rest, root)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
        *("while", "conditional", "call", "opt-barrier", "async-start", "async-update", "async-done"),
    }
)
"""Instructions that read and write nothing themselves"""


_SLICES = frozenset({"slice", "slice-start", "dynamic-slice", "gather"})
"""Instructions that read no more of their first operand than they give"""


class _Reader:
    def __init__(self, computations: dict[str, Computation], mesh: dict[str, int], outermost: int, room: int | None):
        self.computations, self.mesh, self.outermost, self.room = computations, mesh, outermost, room
        self.found = Program()
        self._chains: set[tuple[str, str]] = set()

    def walk(self, name: str, times: int, *, inside: bool) -> None:
        """Count a computation that runs so many times; `inside` a fusion nothing is read from memory or written."""
        computation = self.computations.get(name, {})
        for each in computation.values():
            self._count(each, computation, times, inside)

    def _count(self, each: Instruction, computation: Computation, times: int, inside: bool) -> None:
        if each.kind == "while":
            self._loop(each, times)
            return
        if each.kind.endswith(("-done", "-update")):  # of what its start was counted for
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
        for kind, called in _CALLED.findall(each.rest):
            if kind != "to_apply" or each.kind == "call":
                self.walk(called, times, inside=fused)
        for branches in _BRANCHES.findall(each.rest):
            for called in re.findall(r"[\w.\-]+", branches):
                self.walk(called, times, inside=fused)

    def _loop(self, each: Instruction, times: int) -> None:
        called = dict(_CALLED.findall(each.rest))
        turns = self._turns(each, called.get("condition", ""))
        if turns is not None and turns == self.room and times == 1:
            turns = self.outermost
        if turns is None:
            turns = self.outermost if times == 1 else 1
            self.found.unknown_loops += turns == 1
        body = called.get("body", "")
        if "transpose(" not in each.rest and times == 1:
            self.found.kept += _stacked(self.computations, body, turns)
        self.walk(body, times * turns, inside=False)

    def _turns(self, each: Instruction, condition: str) -> int | None:
        if known := _TRIPS.search(each.rest):
            return int(known[1])
        test = self.computations.get(condition, {})
        if any(part.kind == "compare" and "direction=LT" in part.rest for part in self._within(test)):
            limits = [part for part in self._within(test) if part.kind == "constant" and part.shapes[0].values == 1]
            numbers = [int(part.rest.split(")")[0]) for part in limits if re.match(r"\d+\)", part.rest)]
            return max(numbers) if numbers else None
        return None

    def _within(self, computation: Computation) -> Iterator[Instruction]:
        for each in computation.values():
            yield each
            for kind, called in _CALLED.findall(each.rest):
                if kind == "calls":
                    yield from self._within(self.computations.get(called, {}))

    def _collective(self, each: Instruction, computation: Computation, times: int) -> None:
        kind = each.kind.removesuffix("-start")
        kind = _KIND.get(kind, kind)
        if kind not in COLLECTIVES:
            return
        if chain := _CHAIN.search(each.rest):
            # One collective that is printed in the computations of its start, its middle and its end.
            if (kind, chain[1]) in self._chains:
                return
            self._chains.add((kind, chain[1]))
        sources = [computation[name] for name in each.operands if name in computation]
        given = sum(shape.bytes for source in sources for shape in source.shapes)
        if kind == "collective-permute":
            pairs = lists(each.rest, "source_target_pairs")
            group = next((pair for pair in pairs if pair[0] != pair[1]), [])
            share = 1.0
        else:
            groups = replica_groups(each.rest, math.prod(self.mesh.values()))
            group = groups[0] if groups else []
            share = (len(group) - 1) / max(1, len(group))
        if len(group) < 2:
            return
        if kind == "all-reduce" and self._scatters(each, computation):
            kind = "reduce-scatter"
        amount = {"all-gather": given * len(group), "all-reduce": 2 * given}.get(kind, given) * share
        axes = axes_of(group, self.mesh, permuted=kind == "collective-permute")
        part = self.found.moved.setdefault((kind, axes), Moved(kind, axes))
        part.bytes += times * amount
        part.times += times

    def _scatters(self, each: Instruction, computation: Computation) -> bool:
        """Whether an all-reduce stands for a reduce-scatter: a fusion in which only slices of its results are taken."""
        users = list(_users(each.name, computation))
        return bool(users) and not each.root and all(user.kind == "dynamic-slice" for user in users)

    def _traffic(self, each: Instruction, computation: Computation) -> int:
        """Bytes that an instruction reads and writes."""
        inner = dict(_CALLED.findall(each.rest)).get("calls") if each.kind == "fusion" else None
        fused = self.computations.get(inner, {}) if inner else {}
        return sum(self._read(each, fused, computation)) + self._written(each, fused, computation)

    def _read(self, each: Instruction, fused: Computation, computation: Computation) -> Iterator[int]:
        parameters = {part.rest.split(")")[0]: part.name for part in fused.values() if part.kind == "parameter"}
        for place, name in enumerate(each.operands):
            source = computation.get(name)
            if source is None or len(source.shapes) != 1 or source.shapes[0].near:
                continue
            if each.kind in _SLICES:
                yield sum(shape.bytes for shape in _made(each)) if place == 0 else 0
                continue
            if each.kind == "dynamic-update-slice" and place == 0:
                continue
            inner = parameters.get(str(place))
            users = [part for part in fused.values() if inner is not None and inner in part.operands]
            sliced = [part for part in users if part.kind in _SLICES and part.operands[0] == inner]
            updated = [part for part in users if part.kind == "dynamic-update-slice" and part.operands[0] == inner]
            if users and len(sliced) + len(updated) == len(users):
                yield sum(part.shapes[0].bytes for part in sliced)
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
    """The arrays that an instruction makes. What starts names those that it reads, too: a copy last, others first."""
    if each.kind == "copy-start":
        return each.shapes[:1]
    if each.kind in ("slice-start", "all-gather-start", "collective-permute-start"):
        given = len(each.operands)
        return each.shapes[given : 2 * given]
    return each.shapes


def _users(name: str, computation: Computation) -> Iterator[Instruction]:
    """What reads an instruction's result, or a part of it."""
    for other in computation.values():
        if name not in other.operands:
            continue
        if other.kind == "get-tuple-element":
            yield from _users(other.name, computation)
        else:
            yield other


def _stacked(computations: dict[str, Computation], body: str, turns: int) -> float:
    """Bytes of what a loop writes turn by turn into an array of so many."""
    computation = computations.get(body, {})
    root = next((each for each in computation.values() if each.root), None)
    total = 0.0
    for name in root.operands if root is not None else ():
        each = computation.get(name)
        while each is not None and each.kind in ("bitcast", "copy", "get-tuple-element") and each.operands:
            each = computation.get(each.operands[0])
        if each is None or not each.shapes or each.shapes[0].sizes[:1] != (turns,) or turns < 2:
            continue
        inner = computations.get(dict(_CALLED.findall(each.rest)).get("calls", ""), {"": each})
        if any(part.kind == "dynamic-update-slice" for part in inner.values()):
            total += sum(shape.bytes for shape in each.shapes)
    return total
