"""Device groups of collectives in a program's text, and the mesh axes that they span."""

import math
import re


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
