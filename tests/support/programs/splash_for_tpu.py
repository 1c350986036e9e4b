"""Compile splash attention for a topology, and print facts about the program of each pattern.

The arguments are the topology and the width of a head. A line has the pattern, the numbers of kernels and of sorts, and
the bytes of temporaries.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dit_video.nn.attention import AttentionInputs, CausalFrames, Full, make_attention
from dit_video.planning import Topology

LENGTH, HEADS = 8192, 2
"""Tokens of a row, which fill the largest blocks, and heads."""


def compile_gradients(mesh: Mesh, pattern, width: int):
    """Compile the gradients of attention, with one row on each device."""
    attention = make_attention("splash", pattern=pattern)

    def make_shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((mesh.size, *sizes), dtype, sharding=NamedSharding(mesh, P("data")))

    def attend(q, k, v, segments, indices):
        return attention(q, k, v, AttentionInputs.self_attention(segments, indices))

    attend_rows = jax.shard_map(attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)

    def compute_loss(*arrays):
        return attend_rows(*arrays).astype(jnp.float32).sum()

    arrays = [make_shape(LENGTH, HEADS, width)] * 3
    segments, indices = make_shape(LENGTH, dtype=jnp.int32), make_shape(LENGTH, 3, dtype=jnp.int32)
    traced = jax.jit(jax.grad(compute_loss, (0, 1, 2))).trace(*arrays, segments, indices)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def main() -> None:
    """Compile the program of every pattern."""
    topology, width = Topology.parse(sys.argv[1]), int(sys.argv[2])
    mesh = Mesh(np.asarray(topology.get_devices()), ("data",))
    for pattern in (Full(), CausalFrames(chunk=2)):
        compiled = compile_gradients(mesh, pattern, width)
        text, temporary = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
        print(pattern, text.count("tpu_custom_call"), text.count(" sort("), temporary)


if __name__ == "__main__":
    main()
