"""A compiled program's text (HLO) as computations and instructions, and the devices that its collectives connect."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|bf16|token|opaque|[suf]\d+\w*|c\d+)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CONTINUATION = re.compile(r"\n(?=[\"}]\S)")
"""End of a line within an instruction: the metadata of a TPU's kernel are written on lines of their own."""
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
    for line in _CONTINUATION.sub(" ", text).splitlines():
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


def parse_lists(text: str, name: str) -> list[list[int]]:
    """Parse an attribute such as `name={{0,1},{2,3}}`; return an empty list if it is absent."""
    match = re.search(name + r"=\{(\{.*?\})\}", text)
    parts = re.findall(r"\{([^}]*)\}", match[1]) if match else []
    return [[int(number) for number in part.split(",") if number] for part in parts]


def parse_replica_groups(text: str, devices: int) -> list[list[int]]:
    """Parse the groups of devices among which a collective communicates.

    HLO has three notations: `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, an array of all devices that is transposed and cut
    into rows; and `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`, an array with named axes, for which only the
    first group is returned.
    """
    if mesh_form := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        group = _get_first_group(mesh_form[1], mesh_form[2])
        order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", mesh_form[0])
        ids = list(range(devices)) if order is None else _transpose_devices(order[1], order[2])
        return [[ids[index] for index in group]]
    iota_form = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota_form is None:
        return parse_lists(text, "replica_groups") or [list(range(devices))]
    rows, length, ids = int(iota_form[1]), int(iota_form[2]), _transpose_devices(iota_form[3], iota_form[4])
    return [ids[row * length : (row + 1) * length] for row in range(rows)]


def _transpose_devices(sizes_text: str, axes: str | None) -> list[int]:
    """Return all device ids, laid out in an array of these sizes and transposed."""
    sizes = [int(size) for size in sizes_text.split(",")]
    order = [int(axis) for axis in axes.split(",")] if axes else list(range(len(sizes)))
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    ids = [0]
    for axis in order:
        ids = [first + index * steps[axis] for first in ids for index in range(sizes[axis])]
    return ids


def _get_first_group(mesh: str, axes: str) -> list[int]:
    """Return the first group along some axes of a mesh such as `'a'=2,'b'=8`.

    An axis may be split: `'b':(2)4` is its middle factor of size 4, with 2 blocks outside and the rest of the axis
    inside.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids, inner = [0], math.prod(sizes.values())
    for name, size in sizes.items():
        inner //= size
        part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", axes)
        if part is None:
            continue
        outer, count = (int(part[1]), int(part[2])) if part[1] else (1, size)
        step = inner * size // (outer * count)
        ids = [first + index * step for first in ids for index in range(count)]
    return ids


def find_mesh_axes(group: list[int], mesh: dict[str, int], *, permuted: bool = False) -> tuple[str, ...]:
    """Return the mesh axes that a group spans; `('part of', …)` if the group doesn't span them completely."""
    sizes = list(mesh.values())
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    positions = [[device // step % size for step, size in zip(steps, sizes, strict=True)] for device in group]
    axes = tuple(name for axis, name in enumerate(mesh) if len({position[axis] for position in positions}) > 1)
    complete = math.prod(mesh[name] for name in axes) == len(group)
    return axes if complete or permuted else ("part of", *axes)


_TRANSFER_TYPE = re.compile(r'_xla_megascale_transfer_type="?(\w+)')
_TARGET_SLICES = re.compile(r'_xla_megascale_target="?\{([\d,]+)\}x')
_TARGET_DEVICES = re.compile(r'_xla_megascale_target="?\{(\{.*?\})\}')
_TRANSFER_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "ALL_TO_ALL": "all-to-all",
    "REDUCE_SCATTER": "reduce-scatter",
    "ONE_TO_ONE": "collective-permute",
}
_MAX_SLICE_DEVICES = 100_000


class SliceTransfer(NamedTuple):
    """A collective's part between slices."""

    kind: str
    """Kind of the collective, as in `hlo.COLLECTIVES`."""
    slices: list[int]
    """Slices that exchange data with each other, counted from 0."""
    bytes: float
    """Lower bound on the bytes that each device receives from other slices."""


def read_slice_transfer(attributes: str, result_bytes: int) -> SliceTransfer | None:
    """Return the transfer of a `recv` instruction; None if it doesn't receive from another slice.

    Args:
      attributes: The instruction's attributes.
      result_bytes: Bytes of its result.
    """
    kind = _TRANSFER_TYPE.search(attributes)
    if kind is None:
        return None
    if named := _TARGET_SLICES.search(attributes):
        slices = [int(number) - 1 for number in named[1].split(",")]
    else:
        groups = _TARGET_DEVICES.search(attributes)
        numbers = re.findall(r"\d+", groups[1].split("}")[0]) if groups else []
        slices = sorted({int(number) // _MAX_SLICE_DEVICES - 1 for number in numbers})
    count = max(1, len(slices))
    # The results of a gather and of an exchange include a device's own part; that of a scatter is one of `count`.
    shares = {
        "ALL_REDUCE": 2 * (count - 1) / count,
        "ALL_GATHER": (count - 1) / count,
        "ALL_TO_ALL": (count - 1) / count,
        "REDUCE_SCATTER": count - 1,
    }
    received = result_bytes * shares.get(kind[1], 1)
    return SliceTransfer(_TRANSFER_KINDS.get(kind[1], kind[1].lower().replace("_", "-")), slices, received)
