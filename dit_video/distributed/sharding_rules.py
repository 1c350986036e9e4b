"""Rules outside the model: from an array's path and shape to its layout on the mesh.

A layout changes where numbers lie, never what they are. The rules see paths, so they lay out an optimizer's moments,
whose paths end in the same names (`opt_state/0/mu/blocks/up/kernel`), as they lay out the parameters.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.core import trees as trees
from dit_video.core.errors import UserError
from dit_video.distributed.mesh import AnyMesh

Axis = str | tuple[str, ...] | None
"""What one array axis is split over: a mesh axis, several, or none."""

ROWS = ("data", "fsdp")
"""what the rows of a batch are split over"""
_TOKENS = r"(^|/)(tokens|segments|coordinates)$"
"""arrays of packed rows whose second axis counts tokens"""

_LAYER = r"(^|/)(temporal_)?blocks/(.*/)?"
_COLUMNS = r"((cross_|image_)?(query|key|value)|up|gate)"
FUSED = ("qkv", "cross_key_value")
"""Maps that are several in one, by which a model's heads are made"""
TENSOR: tuple[tuple[str, int], ...] = (
    (_LAYER + rf"({'|'.join(FUSED)})/kernel$", -2),
    (_LAYER + _COLUMNS + r"/(kernel|bias)$", -1),
    (_LAYER + r"(out|cross_out|down)/kernel$", -2),
)
"""What of a transformer's layers is split over `tensor`: the way into heads and hidden widths along their outputs, the
way out of them along its input (arXiv 1909.08053, section 3). Where queries, keys and values are one map, a part of the
outputs would be no part of the heads: that one lies split along its input, and is laid anew where it is used."""


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Path rules, the first match deciding, and what holds for all other arrays.

    Without a match, weights of heads and hidden widths are split over `tensor`, and the largest other axis that `fsdp`
    divides over that (of equals the last); arrays that are small or not divisible lie whole on every device.
    """

    rules: tuple[tuple[str, tuple[Axis, ...]], ...] = ()
    """(regular expression, found anywhere in the path; what the *last* axes are split over). Axes before them are not
    split, so that one rule serves a layer and a stack of layers; `()` keeps the array whole."""
    tensor: tuple[tuple[str, int], ...] = TENSOR
    """(regular expression, which axis, counted from the end) of arrays that are split over `tensor`"""
    stacked: str = r"(^|/)(temporal_)?blocks/"
    """arrays whose first axis counts layers: it is not split, for a scan takes one layer at a time"""
    minimum: int = 2**14
    """arrays of fewer values lie whole on every device, if no rule names them"""

    def tensor_axis(self, path: str) -> int | None:
        """Which axis of an array is split over `tensor`, counted from the end; None of most arrays."""
        return next((axis for pattern, axis in self.tensor if re.search(pattern, path)), None)


DEFAULT_RULES = ShardingRules()


def shardings(tree: Any, mesh: AnyMesh, rules: ShardingRules = DEFAULT_RULES) -> Any:
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


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`, the same on every other axis."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def row_shards(mesh: AnyMesh) -> int:
    """Into how many parts a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def batch_shardings(batch: Any, mesh: AnyMesh) -> Any:
    """The layout of every array of a batch (anything with a `shape`): rows, and of packed rows the tokens.

    Raises:
      UserError: tokens that the devices along `context` do not divide.
    """
    ranks = mesh.shape["context"]

    def layout(path: str, leaf: Any) -> NamedSharding:
        if ranks == 1 or not re.search(_TOKENS, path):
            return batch_sharding(mesh)
        if leaf.shape[1] % ranks:
            raise UserError(
                f"rows of {leaf.shape[1]} tokens do not divide among context={ranks} devices; "
                f"use rows of {leaf.shape[1] + -leaf.shape[1] % ranks} tokens"
            )
        return NamedSharding(mesh, PartitionSpec(ROWS, "context"))

    return trees.map_with_path(layout, batch)


class RowPart(NamedTuple):
    """Which part of a batch's rows a process has on its devices: part `number` of `parts`.

    Processes that share rows, as they do where `tensor` or `context` reaches over several, have the same part.
    """

    number: int
    parts: int
    shards: tuple[int, ...]
    """which of the mesh's `row_shards` these are"""

    @staticmethod
    def of(mesh: Mesh, process: int | None = None) -> "RowPart":
        """Of a process, this one if None.

        Raises:
          UserError: two processes share some of their rows, but not all.
        """
        shards: dict[int, set[int]] = {}
        device: Any
        for device, (rows, *_) in batch_sharding(mesh).devices_indices_map((row_shards(mesh),)).items():
            shards.setdefault(device.process_index, set()).add(rows.start or 0)
        parts = sorted({tuple(sorted(held)) for held in shards.values()})
        if sum(map(len, parts)) != row_shards(mesh) or len({len(part) for part in parts}) > 1:
            raise UserError(
                f"processes share parts of their rows on the mesh {dict(mesh.shape)}; use one where the devices of a "
                "process divide tensor x context, or the other way round"
            )
        own = tuple(sorted(shards[jax.process_index() if process is None else process]))
        return RowPart(parts.index(own), len(parts), own)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Lay a batch (a tree of host arrays whose first axis is rows) out on the mesh; see `batch_shardings`.

    With several processes each gives the rows of its own devices, in the order of the mesh, whole: those of its
    `RowPart`. The result is the global batch.

    Raises:
      UserError: the rows, or their tokens, do not divide among the devices.
    """
    part = RowPart.of(mesh)
    local = len(part.shards)
    for path, leaf in trees.flatten(batch).items():
        if leaf.shape[0] % local:
            raise UserError(
                f"{path or 'the batch'} has {leaf.shape[0]} rows for {local} devices along data and fsdp; "
                f"use a multiple of {local}"
            )
    layouts = batch_shardings(batch, mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, layouts)

    def placed(leaf: Any, layout: NamedSharding) -> jax.Array:
        rows = leaf.shape[0] // local

        def piece(index: tuple[slice, ...] | None) -> Any:
            assert index is not None  # of no layout of rows
            first = part.shards.index((index[0].start or 0) // rows) * rows
            return leaf[(slice(first, first + rows), *index[1:])]

        shape = (rows * row_shards(mesh), *leaf.shape[1:])
        return jax.make_array_from_callback(shape, layout, piece)

    return jax.tree.map(placed, batch, layouts)


def _by_rule(path: str, shape: tuple[int, ...], pattern: str, axes: tuple[Axis, ...], mesh: AnyMesh) -> PartitionSpec:
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


def _by_default(path: str, shape: tuple[int, ...], mesh: AnyMesh, rules: ShardingRules) -> PartitionSpec:
    if math.prod(shape) < rules.minimum:
        return PartitionSpec()
    first = 1 if re.search(rules.stacked, path) else 0
    split: dict[int, str] = {}
    from_end = rules.tensor_axis(path)
    axis = -1 if from_end is None else len(shape) + from_end
    if mesh.shape["tensor"] > 1 and first <= axis and shape[axis] % mesh.shape["tensor"] == 0:
        split[axis] = "tensor"
    count = mesh.shape["fsdp"]
    divisible = [axis for axis in range(first, len(shape)) if shape[axis] % count == 0 and axis not in split]
    if count > 1 and divisible:
        split[max(divisible, key=lambda axis: (shape[axis], axis))] = "fsdp"
    return PartitionSpec(*(split.get(axis) for axis in range(len(shape)))) if split else PartitionSpec()
