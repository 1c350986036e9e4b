"""Gradients of weights that `fsdp` and `context` shard, as sums over the devices of both.

XLA for TPUs makes an all-reduce of a reduce-scatter over all devices of a slice, which moves twice the bytes. One over
`fsdp` and another one of its result over `context` move no more than a single one.
"""

from typing import Literal

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding_rules import ROW_AXES, STATE_AXES, choose_kernel_split, count_row_shards
from dit_video.nn.linear import compute_kernel_gradient
from dit_video.nn.parallel import Precision

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
      mesh: the mesh.
      spec: sharding of the kernel during use.
      inputs: what `x` holds.
      x: inputs of the layer.
      cotangent: cotangents of its outputs.
      precision: precision of the product.
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
