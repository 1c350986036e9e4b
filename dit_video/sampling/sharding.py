"""Sampling on the devices of a mesh: the sharding of the program's arguments, and rows that all devices share.

Rows are sharded over `data` and `fsdp`: clips, and the branches of guidance where these are evaluated together; tokens
over `context`, and weights as in training. Plans compile the program with the same shardings.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.core.trees import map_with_path
from dit_video.diffusion import Guidance, SampleTimes, SamplingState
from dit_video.distributed import count_row_shards, make_shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding import ROW_AXES
from dit_video.sampling.packing import RowMultiples, SamplingBatch
from dit_video.tokens import PackedBatch


class ProgramArguments(NamedTuple):
    """The arguments of the compiled sampler: arrays, or their shapes or shardings."""

    params: Any
    """Parameters of the denoiser and of its text encoder."""
    state: SamplingState | None
    """State before the first step; None if it is not known yet."""
    batch: SamplingBatch
    guidance: Any
    """Parameters of guidance; None without it."""
    sample_times: SampleTimes
    first: Any
    """Number of the first step."""


def make_argument_shardings(arguments: ProgramArguments, mesh: AnyMesh) -> ProgramArguments:
    """Return the sharding of every argument: parameters as in training, rows and tokens, and all else replicated."""
    rows, tokens = arguments.batch.branches[0].tokens.shape[:2]
    replicated = NamedSharding(mesh, PartitionSpec())
    row_axis, token_axis = _choose_axes(rows, tokens, mesh)

    def shard_samples(leaf: Any) -> NamedSharding:
        """Return the sharding of a part of the state, which has a token's values on its last axis, or no tokens."""
        if leaf.ndim < 3 or tuple(leaf.shape[-3:-1]) != (rows, tokens):
            return replicated
        return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - 3), row_axis, token_axis))

    positions: Any = NamedSharding(mesh, PartitionSpec(None, row_axis, token_axis))
    keys: Any = NamedSharding(mesh, PartitionSpec(row_axis))
    batch = SamplingBatch(
        branches=tuple(make_row_shardings(branch, mesh) for branch in arguments.batch.branches),
        branch_positions=None if arguments.batch.branch_positions is None else positions,
        keys=keys,
    )
    rest = jax.tree.map(lambda _: replicated, (arguments.guidance, arguments.sample_times, arguments.first))
    return ProgramArguments(
        make_shardings(arguments.params, mesh), jax.tree.map(shard_samples, arguments.state), batch, *rest
    )


def make_row_shardings(batch: PackedBatch, mesh: AnyMesh) -> PackedBatch:
    """Return the sharding of a batch's rows and tokens; axes that the devices do not divide are replicated."""
    rows, tokens = batch.tokens.shape[:2]
    row_axis, token_axis = _choose_axes(rows, tokens, mesh)

    def layout(path: str, leaf: Any) -> NamedSharding:
        is_tokens = path in ("tokens", "layout/segments", "layout/positions")
        return NamedSharding(mesh, PartitionSpec(row_axis, *((token_axis,) if is_tokens else ())))

    return map_with_path(layout, batch)


def _choose_axes(rows: int, tokens: int, mesh: AnyMesh) -> tuple[tuple[str, ...] | None, str | None]:
    """Return the mesh axes that shard rows and tokens; None where they do not divide these."""
    row_axes = ROW_AXES if rows % count_row_shards(mesh) == 0 else None
    return row_axes, "context" if tokens % mesh.shape["context"] == 0 else None


def compute_row_multiples(mesh: AnyMesh | None, guidance: Guidance, *, is_batched: bool) -> RowMultiples:
    """Return what the number of rows has to be a multiple of, so that the devices share all that a model evaluates.

    Branches that are evaluated together are further rows, unless the first one is evaluated alone: at some times, or
    without some layers.
    """
    if mesh is None:
        return RowMultiples()
    shards = count_row_shards(mesh)
    is_alone = guidance.interval is not None or guidance.skip_layers is not None or 1.0 in guidance.scales
    is_alone = is_alone or not is_batched
    return RowMultiples(shards if is_alone else shards // math.gcd(shards, guidance.branch_count), shards)


def put_on_devices(tree: Any, shardings: Any) -> Any:
    """Put arrays on the devices of a mesh, of which every process has its own; arrays that are there stay as they are.

    Each process passes the same values.
    """
    return jax.tree.map(_put_array, tree, shardings)


def put_params(params: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Put parameters on the devices once: sharded as in training, or without a mesh on the default device.

    Arrays that are on devices already stay there; on a mesh only those that are on all of its devices.
    """
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, params)
    return jax.tree.map(functools.partial(_put_param, mesh=mesh), params, make_shardings(params, mesh))


def _put_param(leaf: Any, sharding: NamedSharding, *, mesh: Mesh) -> jax.Array:
    is_in_place = isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat)
    return leaf if is_in_place else _put_array(leaf, sharding)


def _put_array(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jax.process_count() == 1 or not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
    # `device_put` of an array of several processes would first compare their values.
    values = np.asarray(leaf)
    values = values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
