"""Rules outside the model: from an array's path and shape to its layout on the mesh.

A layout changes where numbers lie, never what they are. The rules see paths, so they lay out an optimizer's moments,
whose paths end in the same names (`opt_state/0/mu/blocks/up/kernel`), as they lay out the parameters.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video import tree as trees
from dit_video.errors import UserError

Axis = str | tuple[str, ...] | None
"""What one array axis is split over: a mesh axis, several, or none."""

_ROWS = ("data", "fsdp")


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Path rules, the first match deciding, and what holds for all other arrays.

    Without a match, the largest axis that `fsdp` divides is split over it (of equals the last); arrays that are small
    or not divisible lie whole on every device.
    """

    rules: tuple[tuple[str, tuple[Axis, ...]], ...] = ()
    """(regular expression, found anywhere in the path; what the *last* axes are split over). Axes before them are not
    split, so that one rule serves a layer and a stack of layers; `()` keeps the array whole."""
    stacked: str = r"(^|/)blocks/"
    """arrays whose first axis counts layers: it is not split, for a scan takes one layer at a time"""
    minimum: int = 2**14
    """arrays of fewer values lie whole on every device, if no rule names them"""


DEFAULT_RULES = ShardingRules()


def shardings(tree: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """The layout of every leaf (anything with a `shape`), as a tree of `NamedSharding`.

    Raises:
      UserError: a rule names an axis that the mesh lacks, has more axes than the array, or does not divide it.
    """

    def layout(path: str, leaf: Any) -> NamedSharding:
        shape = tuple(leaf.shape)
        for pattern, axes in rules.rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, _by_rule(path, shape, pattern, axes, mesh))
        return NamedSharding(mesh, _by_default(path, shape, mesh, rules))

    return trees.map_with_path(layout, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`, the same on every other axis."""
    return NamedSharding(mesh, PartitionSpec(_ROWS))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in _ROWS)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Lay a batch (a tree of host arrays whose first axis is rows) out on the mesh.

    With several processes each gives the rows of its own devices, in the order of the mesh; the result is the global
    batch.

    Raises:
      UserError: the rows do not divide among the devices.
    """
    sharding = batch_sharding(mesh)
    processes = jax.process_count()
    indices = sharding.addressable_devices_indices_map((row_shards(mesh),)).values()
    local = len({index[0].start for index in indices if index is not None})
    for path, leaf in trees.flatten(batch).items():
        if leaf.shape[0] % local:
            raise UserError(
                f"{path or 'the batch'} has {leaf.shape[0]} rows for {local} devices along data and fsdp; "
                f"use a multiple of {local}"
            )
    if processes == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def _by_rule(path: str, shape: tuple[int, ...], pattern: str, axes: tuple[Axis, ...], mesh: Mesh) -> PartitionSpec:
    if len(axes) > len(shape):
        raise UserError(
            f"sharding rule {pattern!r} has {len(axes)} axes, {path} has {len(shape)}; "
            f"put a rule for {path} before it, () to keep it whole"
        )
    for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        if unknown := [name for name in names if name not in mesh.shape]:
            raise UserError(f"sharding rule {pattern!r} names {unknown[0]}; the mesh has {', '.join(mesh.shape)}")
        count = math.prod(mesh.shape[name] for name in names)
        if size % count:
            raise UserError(
                f"sharding rule {pattern!r} splits an axis of {path} {list(shape)} over {' x '.join(names)}={count}, "
                f"which does not divide {size}; use another mesh, or put a rule for {path} before it"
            )
    if not any(axes):
        return PartitionSpec()
    return PartitionSpec(*(None,) * (len(shape) - len(axes)), *axes)


def _by_default(path: str, shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules) -> PartitionSpec:
    count = mesh.shape["fsdp"]
    first = 1 if re.search(rules.stacked, path) else 0
    divisible = [axis for axis in range(first, len(shape)) if shape[axis] % count == 0]
    if count == 1 or not divisible or math.prod(shape) < rules.minimum:
        return PartitionSpec()
    split = max(divisible, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*("fsdp" if axis == split else None for axis in range(len(shape))))
