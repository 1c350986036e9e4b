"""Sharding rules of parameters, and the sharding of optimizer updates and weight gradients that follows from them."""

import functools
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dit_video.core import trees
from dit_video.core.errors import UserError
from dit_video.distributed.mesh import AnyMesh
from dit_video.nn.layers import compute_kernel_gradient
from dit_video.nn.partitioner import Precision

Axis = str | tuple[str, ...] | None
"""Sharding of one array axis: a mesh axis, several, or none."""

ROW_AXES = ("data", "fsdp")
"""Mesh axes that share the rows of the batch."""
STATE_AXES = ("fsdp", "context")
"""Mesh axes that share parameters and optimizer state: devices of `context` compute tokens of the same rows, with the
same weights."""
_TOKEN_PATTERN = r"(^|/)(tokens|segments|positions)$"
"""Arrays of packed rows whose second axis counts tokens."""

_LAYER_PATTERN = r"(^|/)(temporal_)?blocks/(.*/)?"
_COLUMN_PATTERN = r"((cross_|image_)?(query|key|value)|up|gate)"
FUSED_MAPS = ("qkv", "cross_key_value")
"""Names of maps that fuse several maps, from which a model's heads are made."""
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (_LAYER_PATTERN + rf"({'|'.join(FUSED_MAPS)})/kernel$", -2),
    (_LAYER_PATTERN + _COLUMN_PATTERN + r"/(kernel|bias)$", -1),
    (_LAYER_PATTERN + r"(out|cross_out|down)/kernel$", -2),
)
"""Arrays of a transformer's layers that `tensor` shards: maps into heads and hidden widths along their outputs, maps
out of them along their input (arXiv 1909.08053, section 3). If queries, keys and values are one map, a shard of its
outputs would not be a set of heads: it is sharded along its input, and resharded during use."""


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Path rules, the first match of which decides, and defaults for all other arrays.

    Without a match, weights of heads and hidden widths are sharded over `tensor`, and the largest other axis that
    `fsdp` x `context` divides over both (the last of equal ones); where these divide no axis, over the larger of the
    two that divides one. Small or indivisible arrays are replicated.

    Raises:
      UserError: If `rules` are not pairs of a pattern and a tuple of axes, or if a pattern is not a regular expression.
    """

    rules: tuple[tuple[str, tuple[Axis, ...]], ...] = ()
    """Pairs of a regular expression, found anywhere in the path, and the sharding of the *last* axes. Axes before them
    are not sharded, so that one rule serves a layer and a stack of layers; `()` replicates the array."""
    tensor_rules: tuple[tuple[str, int], ...] = TENSOR_RULES
    """Pairs of a regular expression and the axis, counted from the end, that is sharded over `tensor`."""
    stacked_pattern: str = r"(^|/)(temporal_)?blocks/(?!\d)"
    """Regular expression of arrays whose first axis counts layers, unlike those of a list of layers (`blocks/0/…`); it
    is not sharded, since a scan takes one layer at a time."""
    min_size: int = 2**14
    """Number of values below which arrays without a rule are replicated."""

    def __post_init__(self) -> None:
        if any(isinstance(rule, str) or isinstance(rule[1], str) for rule in self.rules):
            rule = "it must be a tuple of pairs of a pattern and a tuple of axes"
            raise UserError(f"rules={self.rules} is invalid: {rule}. Use rules=(('up/kernel$', (None, 'fsdp')),).")
        patterns = {name: [pattern for pattern, _ in getattr(self, name)] for name in ("rules", "tensor_rules")}
        trees.check_patterns(**patterns, stacked_pattern=[self.stacked_pattern])

    def get_tensor_axis(self, path: str) -> int | None:
        """Return the axis of an array that is sharded over `tensor`, counted from the end; None for most arrays."""
        return next((axis for pattern, axis in self.tensor_rules if re.search(pattern, path)), None)


DEFAULT_RULES = ShardingRules()


def make_shardings(tree: Any, mesh: AnyMesh, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """Return the layout of every leaf (anything with a `shape`), as a tree of `NamedSharding`.

    Raises:
      UserError: If a rule names an axis that the mesh lacks, has more axes than the array, or does not divide it; or if
        the pattern of a rule of a user matches no array.
    """
    own_tensor_rules = () if rules.tensor_rules is TENSOR_RULES else rules.tensor_rules
    for name, own in (("rules", rules.rules), ("tensor_rules", own_tensor_rules)):
        trees.check_path_patterns(name, (pattern for pattern, *_ in own), trees.flatten(tree))

    def layout(path: str, leaf: Any) -> NamedSharding:
        shape = tuple(leaf.shape)
        for pattern, axes in rules.rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, _apply_rule(path, shape, pattern, axes, mesh))
        return NamedSharding(mesh, _apply_default(path, shape, mesh, rules))

    return trees.map_with_path(layout, tree)


def make_batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Return the sharding of rows over `data` and `fsdp`, replicated on every other axis."""
    return NamedSharding(mesh, P(ROW_AXES))


def count_row_shards(mesh: AnyMesh) -> int:
    """Return the number of shards of a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def make_batch_shardings(batch: Any, mesh: AnyMesh) -> Any:
    """Return the layout of every array of a batch (anything with a `shape`): of rows, and of tokens in packed rows.

    Raises:
      UserError: If the devices along `context` do not divide the tokens.
    """
    ranks = mesh.shape["context"]

    def layout(path: str, leaf: Any) -> NamedSharding:
        if ranks == 1 or not re.search(_TOKEN_PATTERN, path):
            return make_batch_sharding(mesh)
        if leaf.shape[1] % ranks:
            fix = f"Use rows of {leaf.shape[1] + -leaf.shape[1] % ranks} tokens."
            raise UserError(f"rows of {leaf.shape[1]} tokens do not divide among context={ranks} devices. {fix}")
        return NamedSharding(mesh, P(ROW_AXES, "context"))

    return trees.map_with_path(layout, batch)


class RowPart(NamedTuple):
    """The part of a batch's rows on the devices of a process.

    Processes that share rows, because `tensor` or `context` spans several, have the same part.
    """

    part_index: int
    """Number of the part, from 0 on."""
    part_count: int
    """Number of parts."""
    shards: tuple[int, ...]
    """Shards of the mesh's `count_row_shards` in this part."""

    @staticmethod
    def from_mesh(mesh: Mesh, process: int | None = None) -> "RowPart":
        """Return the part of a process, this one if None.

        Raises:
          UserError: If two processes share some of their rows, but not all.
        """
        shards: dict[int, set[int]] = {}
        device: Any
        for device, (rows, *_) in make_batch_sharding(mesh).devices_indices_map((count_row_shards(mesh),)).items():
            shards.setdefault(device.process_index, set()).add(rows.start or 0)
        parts = sorted({tuple(sorted(process_shards)) for process_shards in shards.values()})
        if sum(map(len, parts)) != count_row_shards(mesh) or len({len(part) for part in parts}) > 1:
            fix = "Use a mesh where the devices of a process divide tensor x context, or the other way round."
            raise UserError(f"processes share parts of their rows on the mesh {dict(mesh.shape)}. {fix}")
        local_shards = tuple(sorted(shards[jax.process_index() if process is None else process]))
        return RowPart(parts.index(local_shards), len(parts), local_shards)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Shard a batch (a tree of host arrays whose first axis is rows) over the mesh; see `make_batch_shardings`.

    With several processes each one passes the complete rows of its own devices (its `RowPart`), in mesh order. The
    result is the global batch.

    Raises:
      UserError: If the rows, or their tokens, do not divide among the devices.
    """
    part = RowPart.from_mesh(mesh)
    local = len(part.shards)
    for path, leaf in trees.flatten(batch).items():
        if leaf.shape[0] % local:
            raise UserError(
                f"{path or 'the batch'} has {leaf.shape[0]} rows for {local} devices along data and fsdp. "
                f"Use a multiple of {local}."
            )
    layouts = make_batch_shardings(batch, mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, layouts)

    def make_global(leaf: Any, layout: NamedSharding) -> jax.Array:
        rows = leaf.shape[0] // local

        def read_shard(index: tuple[slice, ...] | None) -> Any:
            assert index is not None  # A layout of rows has an index on every device.
            first = part.shards.index((index[0].start or 0) // rows) * rows
            return leaf[(slice(first, first + rows), *index[1:])]

        shape = (rows * count_row_shards(mesh), *leaf.shape[1:])
        return jax.make_array_from_callback(shape, layout, read_shard)

    return jax.tree.map(make_global, batch, layouts)


def _apply_rule(path: str, shape: tuple[int, ...], pattern: str, axes: tuple[Axis, ...], mesh: AnyMesh) -> P:
    if len(axes) > len(shape):
        fix = f"Put a rule for {path} before it, such as () to replicate it."
        raise UserError(f"sharding rule {pattern!r} has {len(axes)} axes, {path} has {len(shape)}. {fix}")
    for axis, size in zip(axes, shape[len(shape) - len(axes) :], strict=True):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        if unknown := [name for name in names if name not in mesh.shape]:
            raise UserError(f"sharding rule {pattern!r} names {unknown[0]}; the mesh has {', '.join(mesh.shape)}")
        count = math.prod(mesh.shape[name] for name in names)
        if size % count:
            raise UserError(
                f"sharding rule {pattern!r} splits an axis of {path} {list(shape)} over {' x '.join(names)}={count}, "
                f"which does not divide {size}. Use another mesh, or put a rule for {path} before it."
            )
    if not any(axes):
        return P()
    return P(*(None,) * (len(shape) - len(axes)), *axes)


def _apply_default(path: str, shape: tuple[int, ...], mesh: AnyMesh, rules: ShardingRules) -> P:
    if math.prod(shape) < rules.min_size:
        return P()
    first = 1 if re.search(rules.stacked_pattern, path) else 0
    split: dict[int, Axis] = {}
    from_end = rules.get_tensor_axis(path)
    axis = -1 if from_end is None else len(shape) + from_end
    if mesh.shape["tensor"] > 1 and first <= axis and shape[axis] % mesh.shape["tensor"] == 0:
        split[axis] = "tensor"
    if (state := choose_state_split(shape, mesh, taken={*range(first), *split})) is not None:
        axis, names = state
        split[axis] = names[0] if len(names) == 1 else names
    return P(*(split.get(axis) for axis in range(len(shape)))) if split else P()


def choose_state_split(
    shape: tuple[int, ...], mesh: AnyMesh, *, taken: Collection[int] = ()
) -> tuple[int, tuple[str, ...]] | None:
    """Return the axis of an array that `STATE_AXES` shard, and which of them do; None if they divide none.

    Args:
      shape: Shape of the array.
      mesh: The mesh.
      taken: Axes of the array that are not sharded, or over other axes of the mesh.
    """
    used = tuple(name for name in STATE_AXES if mesh.shape[name] > 1)
    alone = sorted(((name,) for name in used), key=lambda names: -mesh.shape[names[0]])
    for names in (used, *alone) if used else ():
        count = math.prod(mesh.shape[name] for name in names)
        if divisible := [axis for axis, size in enumerate(shape) if size % count == 0 and axis not in taken]:
            return max(divisible, key=lambda axis: (shape[axis], axis)), names
    return None


def choose_kernel_split(shape: tuple[int, ...], spec: P, mesh: AnyMesh) -> tuple[int, tuple[str, ...]] | None:
    """Return the axis of a layer's kernel `[i o]` that `STATE_AXES` shard at rest, and which do; None if none does.

    Args:
      shape: Shape of the kernel.
      spec: Sharding of the kernel during use.
      mesh: The mesh.
    """
    return choose_state_split(shape, mesh, taken=[axis for axis, name in enumerate(spec) if name is not None])


Matrices = Float[Array, "L m n"]


def constrain_like_params(tree: Any, mesh: AnyMesh | None) -> Any:
    """Constrain the arrays of a tree to the sharding of the parameters with the same paths.

    Args:
      tree: Arrays with the paths and shapes of parameters, such as gradients.
      mesh: Mesh of the parameters; None for a single device.
    """
    if mesh is None or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, make_shardings(tree, mesh))


def apply_to_matrices(function: Callable[[Matrices], Matrices], stack: Matrices, sharding: NamedSharding) -> Matrices:
    """Apply a function to a stack of matrices, whole matrices on each device.

    Devices that share the matrices exchange their shards before and after, and devices with copies compute a part of
    the stack each. With fewer matrices than devices, some devices compute nothing but padding.

    Args:
      function: Function of each matrix by itself, which returns its shape; it also gets matrices of zeros.
      stack: Matrices.
      sharding: Sharding of the stack and of the result.
    """
    mesh, spec = sharding.mesh, (*sharding.spec, None, None, None)[:3]
    axes = [(names,) if isinstance(names, str) else tuple(names or ()) for names in spec]
    copies = tuple(name for name in mesh.shape if not any(name in names for names in axes))
    num_copies = math.prod(mesh.shape[name] for name in copies)
    shared = [(axis, names) for axis, names in enumerate(axes) if axis > 0 and names]
    num_shards = math.prod(mesh.shape[name] for _, names in shared for name in names)

    def apply_on_device(shards: Matrices) -> Matrices:
        matrices = _pad(shards, num_shards)
        for axis, names in shared:
            matrices = jax.lax.all_to_all(matrices, names, split_axis=0, concat_axis=axis, tiled=True)
        padded = _pad(matrices, num_copies)
        size = len(padded) // num_copies
        own = jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(copies) * size, size) if copies else padded
        result = function(own)
        if copies:
            result = jax.lax.all_gather(result, copies, tiled=True)[: len(matrices)]
        for axis, names in reversed(shared):
            result = jax.lax.all_to_all(result, names, split_axis=axis, concat_axis=0, tiled=True)
        return result[: len(shards)]

    on_devices = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    return on_devices(apply_on_device, in_specs=sharding.spec, out_specs=sharding.spec)(stack)


def _pad(matrices: Matrices, divisor: int) -> Float[Array, "padded m n"]:
    """Pad a stack with zeros to a multiple of a number of matrices."""
    return jnp.pad(matrices, ((0, -len(matrices) % divisor), (0, 0), (0, 0)))


LayerInputs = Literal["tokens", "context"]
"""Inputs of a linear layer: a row's tokens, which devices of `context` share, or those of a context, which all of them
have.

If gradients took the other layout, XLA would compute forward passes in it, too, and gather their results.
"""


def compute_sharded_gradient(
    mesh: AnyMesh,
    spec: P,
    inputs: LayerInputs,
    x: Float[Array, "*batch i"],
    cotangent: Float[Array, "*batch o"],
    precision: Precision = None,
) -> Float[Array, "i o"]:
    """Return a kernel's gradient, summed in float32, with the kernel's default sharding at rest.

    XLA's partitioner chooses how to sum gradients that are sharded over one axis of `STATE_AXES` alone, and those of
    inputs whose rows and tokens are not two axes, or not divisible.

    Args:
      mesh: The mesh.
      spec: Sharding of the kernel during use.
      inputs: What `x` holds.
      x: Inputs of the layer.
      cotangent: Cotangents of its outputs.
      precision: Precision of the product.
    """
    used = (*spec, None, None)[:2]
    split = choose_kernel_split((x.shape[-1], cotangent.shape[-1]), spec, mesh)
    ranks = mesh.shape["context"]
    is_divisible = x.ndim > 2 and x.shape[0] % count_row_shards(mesh) == 0
    is_divisible = is_divisible and (inputs == "context" or x.shape[1] % ranks == 0)
    if split is None or split[1] != STATE_AXES or not is_divisible:
        return compute_kernel_gradient(x, cotangent, precision)
    axis = split[0]

    def take_part(values: Float[Array, "*batch n"]) -> Float[Array, "*batch part"]:
        """Take those features of which this device of `context`, and those with its index, hold the gradient."""
        parts = values.reshape(*values.shape[:-1], mesh.shape["fsdp"], ranks, -1)
        own = jax.lax.dynamic_index_in_dim(parts, jax.lax.axis_index("context"), axis=-2, keepdims=False)
        return own.reshape(*values.shape[:-1], -1)

    def sum_on_devices(x, cotangent):
        if inputs == "context":  # All devices of `context` have the same inputs: each computes a part of the gradient.
            x, cotangent = (take_part(x), cotangent) if axis == 0 else (x, take_part(cotangent))
        summed = compute_kernel_gradient(x, cotangent, precision)
        summed = jax.lax.psum_scatter(summed, "fsdp", scatter_dimension=axis, tiled=True)
        if inputs == "tokens":
            summed = jax.lax.psum_scatter(summed, "context", scatter_dimension=axis, tiled=True)
        return jax.lax.psum(summed, "data") if mesh.shape["data"] > 1 else summed

    tokens = ("context" if inputs == "tokens" else None, *(None,) * (x.ndim - 3))
    return jax.shard_map(
        sum_on_devices,
        mesh=mesh,
        in_specs=tuple(P(ROW_AXES, *tokens, name) for name in used),
        out_specs=P(*(STATE_AXES if axis == number else name for number, name in enumerate(used))),
        check_vma=False,
    )(x, cotangent)
