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
    devices, transposed and cut into rows; or `mesh['a'=2,'b'=2] {'b'}`, an array with names for its axes."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        return [_along(named[1], named[2])]
    compact = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if compact is None:
        return lists(text, "replica_groups") or [list(range(devices))]
    rows, length, sizes = int(compact[1]), int(compact[2]), [int(size) for size in compact[3].split(",")]
    order = [int(axis) for axis in compact[4].split(",")] if compact[4] else list(range(len(sizes)))
    steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    ids = [0]
    for axis in order:
        ids = [first + place * steps[axis] for first in ids for place in range(sizes[axis])]
    return [ids[row * length : (row + 1) * length] for row in range(rows)]


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
