"""Gradients of weights that `fsdp` and `context` shard, as sums over the devices of both.

XLA for TPUs would make an all-reduce of a reduce-scatter over all devices of a slice, which moves twice the bytes. One
over `fsdp` and one of the result over `context` remain what they are, and move no more together: `n - 1` parts of
`n c` each, and `c - 1` of `n c`.
"""

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding_rules import ROW_AXES, STATE_AXES, choose_state_split, count_row_shards
from dit_video.nn.attention.key_ranges import pad_to_blocks
from dit_video.nn.linear import compute_kernel_gradient


def compute_sharded_gradient(
    mesh: AnyMesh, spec: P, x: Float[Array, "*batch i"], cotangent: Float[Array, "*batch o"]
) -> Float[Array, "i o"]:
    """Return a kernel's gradient, summed in float32, with the kernel's default sharding at rest.

    The compiler sums gradients over one axis of `STATE_AXES`, and those of inputs whose rows and tokens are not two
    separate axes.

    Args:
      mesh: the mesh.
      spec: sharding of the kernel during use.
      x: inputs, of rows and tokens.
      cotangent: cotangents of the outputs.
    """
    used = (*spec, None, None)[:2]
    taken = [axis for axis, name in enumerate(used) if name is not None]
    split = choose_state_split((x.shape[-1], cotangent.shape[-1]), mesh, taken=taken)
    if split is None or split[1] != STATE_AXES or x.ndim < 3 or x.shape[0] % count_row_shards(mesh):
        return compute_kernel_gradient(x, cotangent)
    axis = split[0]

    def sum_on_devices(x, cotangent):
        summed = compute_kernel_gradient(x, cotangent)
        for name in STATE_AXES:
            summed = jax.lax.psum_scatter(summed, name, scatter_dimension=axis, tiled=True)
        return jax.lax.psum(summed, "data") if mesh.shape["data"] > 1 else summed

    # Added zeros do not change the sum; conditioning of a few clips is not divisible by the devices of `context`.
    x, cotangent = (pad_to_blocks(array, mesh.shape["context"]) for array in (x, cotangent))
    inner = (None,) * (x.ndim - 3)
    in_specs = tuple(P(ROW_AXES, "context", *inner, name) for name in used)
    out_specs = P(*(STATE_AXES if axis == number else name for number, name in enumerate(used)))
    return jax.shard_map(sum_on_devices, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        x, cotangent
    )
