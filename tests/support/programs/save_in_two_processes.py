"""Save in two processes, of which the second cannot write the second checkpoint; the argument is the folder."""

import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization

from dit_video.core.errors import script
from dit_video.distributed import Parallelism, make_mesh
from dit_video.distributed.processes import initialize_distributed
from dit_video.training.checkpoint import Checkpoints


async def fail(*_, **__):
    """Fail as an object store does."""
    raise ValueError("UNAVAILABLE: Error writing [http_response_code='503']")


@script
def main() -> None:
    """Save twice, and train on."""
    with initialize_distributed():
        mesh = make_mesh(Parallelism(fsdp=2))
        values = np.random.default_rng(0).normal(size=(8, 50_000)).astype(np.float32)
        sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
        state = {"x": jax.make_array_from_callback(values.shape, sharding, values.__getitem__)}
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, state, {})
        checkpoints.wait()
        if jax.process_index() == 1:
            serialization.async_serialize_from_host = fail
        checkpoints.save(2, state, {})
        print("saving", flush=True)
        for _ in range(6000):
            checkpoints.check()
            time.sleep(0.01)
        print("not noticed", flush=True)


main()
