"""Which devices take part in a collective, as a program's text says it, and along which axes of the mesh they lie."""

import math
import re


def lists(text: str, name: str) -> list[list[int]]:
    found = re.search(name + r"=\{(\{.*?\})\}", text)
    return (
        []
        if found is None
        else [[int(n) for n in part.split(",") if n] for part in re.findall(r"\{([^}]*)\}", found[1])]
    )


def replica_groups(text: str, devices: int) -> list[list[int]]:
    """The groups of devices among which a collective works: `{{0,1},{2,3}}`; or `[2,2]<=[2,2]T(1,0)`, an array of all
    devices, transposed and cut into rows; or `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`, an array with names
    for its axes, of whose groups this gives the first."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        group = _along(named[1], named[2])
        laid = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", named[0])
        ids = list(range(devices)) if laid is None else _transposed(laid[1], laid[2])
        return [[ids[place] for place in group]]
    compact = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if compact is None:
        return lists(text, "replica_groups") or [list(range(devices))]
    rows, length, ids = int(compact[1]), int(compact[2]), _transposed(compact[3], compact[4])
    return [ids[row * length : (row + 1) * length] for row in range(rows)]


def _transposed(sizes_text: str, axes: str | None) -> list[int]:
    """All devices in an array of these sizes, whose axes are transposed."""
    sizes = [int(size) for size in sizes_text.split(",")]
    order = [int(axis) for axis in axes.split(",")] if axes else list(range(len(sizes)))
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    ids = [0]
    for axis in order:
        ids = [first + place * steps[axis] for first in ids for place in range(sizes[axis])]
    return ids


def _along(mesh: str, axes: str) -> list[int]:
    """The first group along some axes of a mesh such as `'a'=2,'b'=8`; `'b':(2)4` is a part of an axis: 4 places, of
    which there are 2 sets, and what is left of the axis lies inside."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids, behind = [0], math.prod(sizes.values())
    for name, size in sizes.items():
        behind //= size
        part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", axes)
        if part is None:
            continue
        before, places = (int(part[1]), int(part[2])) if part[1] else (1, size)
        step = behind * size // (before * places)
        ids = [first + place * step for first in ids for place in range(places)]
    return ids


def axes_of(group: list[int], mesh: dict[str, int], *, permuted: bool = False) -> tuple[str, ...]:
    """The axes of the mesh along which devices of a group lie; `('part of', …)` where they are not all along them."""
    sizes = list(mesh.values())
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    places = [[device // step % size for step, size in zip(steps, sizes, strict=True)] for device in group]
    axes = tuple(name for axis, name in enumerate(mesh) if len({place[axis] for place in places}) > 1)
    whole = math.prod(mesh[name] for name in axes) == len(group)
    return axes if whole or permuted else ("part of", *axes)
