"""Sharding constraints on the arrays of an update: no value changes, only where it is computed.

Without them XLA's partitioner chooses: it may compute an optimizer's products on all devices alike, or keep sums of
gradients whole on each.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding_rules import make_shardings


def constrain_like_params(tree: Any, mesh: AnyMesh | None) -> Any:
    """Constrain the arrays of a tree to the sharding of the parameters with the same paths.

    Args:
      tree: arrays with the paths and shapes of parameters, such as gradients.
      mesh: mesh of the parameters; None for a single device.
    """
    if mesh is None or mesh.size == 1:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, make_shardings(tree, mesh))


def constrain_matrices(stack: Float[Array, "L m n"], mesh: AnyMesh | None) -> Float[Array, "L m n"]:
    """Constrain a stack of matrices so that each device of the mesh holds whole matrices.

    With fewer matrices than devices, as many devices as there are matrices hold one each.
    """
    if mesh is None or mesh.size == 1:
        return stack
    axes = tuple(name for name, size in mesh.shape.items() if size > 1)
    return jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, PartitionSpec(axes)))
