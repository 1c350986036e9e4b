"""Compile a product of sharded matrices for the topology that is the argument."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dit_video.planning import Topology

if __name__ == "__main__":
    mesh = Mesh(np.asarray(Topology.parse(sys.argv[1]).get_devices()), ("fsdp",))
    matrix = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))
    jax.jit(jnp.matmul).trace(matrix, matrix).lower(lowering_platforms=("tpu",)).compile()
    print("done")
