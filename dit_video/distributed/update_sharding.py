"""Division of an update's work over the devices of a mesh: no value changes, only where it is computed.

Left alone, XLA's partitioner computes some of an optimizer's products on several devices alike, and gathers or reduces
whole stacks of weights for others.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding_rules import make_shardings

Matrices = Float[Array, "L m n"]


def constrain_like_params(tree: Any, mesh: AnyMesh | None) -> Any:
    """Constrain the arrays of a tree to the sharding of the parameters with the same paths.

    Args:
      tree: arrays with the paths and shapes of parameters, such as gradients.
      mesh: mesh of the parameters; None for a single device.
    """
    if mesh is None or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, make_shardings(tree, mesh))


def apply_to_matrices(function: Callable[[Matrices], Matrices], stack: Matrices, sharding: NamedSharding) -> Matrices:
    """Apply a function to a stack of matrices, whole matrices on each device.

    Devices that share the matrices exchange their shards before and after, and devices with copies compute a part of
    the stack each. With fewer matrices than devices, some devices compute nothing but padding.

    Args:
      function: function of each matrix by itself, which returns its shape; it also gets matrices of zeros.
      stack: matrices.
      sharding: sharding of the stack and of the result.
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
