"""Restore the checkpoint in `FOLDER/one` on eight devices, and save it to `FOLDER/eight`; the argument is FOLDER."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from dit_video.distributed import Parallelism, ShardingRules, make_mesh, make_shardings
from dit_video.training.checkpoint import Checkpoints

folder = Path(sys.argv[1])
shapes = {"kernel": jax.ShapeDtypeStruct((16, 64), jnp.float32), "count": jax.ShapeDtypeStruct((), jnp.int32)}
layout = make_shardings(shapes, make_mesh(Parallelism(fsdp=8)), ShardingRules(min_size=1))
like = jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, layout
)
state, _ = Checkpoints(folder / "one").restore(like)
assert state["kernel"].sharding == layout["kernel"]
assert len(state["kernel"].addressable_shards) == 8
checkpoints = Checkpoints(folder / "eight")
checkpoints.save(1, state, {})
checkpoints.wait()
print("done")
