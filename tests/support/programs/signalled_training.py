"""Train in processes whose data are read by workers; the arguments are the folder and the number of steps."""

import contextlib
import sys
import time
from pathlib import Path

import grain
import jax
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.core.errors import script
from dit_video.data.prefetch import Prefetch
from dit_video.distributed import Parallelism, make_mesh
from dit_video.distributed.processes import initialize_distributed
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import StepCall
from dit_video.training.loop import LoopConfig, run
from support.loop_training import get_state_shapes, init_state, make_batches, plain_step


def make_batch(step: int):
    """Return the batch of a step, in a worker."""
    return next(make_batches(step))


def on_step(done: int, _) -> None:
    """Take at least 20 ms for a step, and say when the workers have started."""
    time.sleep(0.02)
    if done % 10 == 0:
        print("step", done, flush=True)


@script
def main() -> None:
    """Start or continue the training."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    with initialize_distributed():
        sharding = NamedSharding(make_mesh(Parallelism()), PartitionSpec())

        def replicate(tree):
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

        def batches(done):
            data = grain.MapDataset.range(done, 10**6).map(make_batch)
            with contextlib.closing(iter(Prefetch(workers=2).read_ahead(data))) as iterator:
                yield from map(replicate, iterator)

        checkpoints = Checkpoints(folder / "checkpoints")
        state = replicate(jax.device_get(init_state()))
        if checkpoints.latest() is not None:
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), get_state_shapes()
            )
            state, _ = checkpoints.restore(shapes)
        config = LoopConfig(steps=steps, log_every=10**6, save_every=10**6)
        run(plain_step, state, batches, config=config, checkpoints=checkpoints, hooks=[StepCall(on_step)])
        print("finished", flush=True)


if __name__ == "__main__":
    main()
