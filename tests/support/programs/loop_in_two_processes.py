"""Train in two processes, of which one gets a signal; the argument is the folder."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.distributed import Parallelism, make_mesh
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import StepCall
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.loop import LoopConfig, run
from support.devices import join_processes
from support.loop_training import init_state, make_batches, plain_step


def on_step(done: int, _) -> None:
    """Send the signal to the second process, at step 5."""
    time.sleep(0.05)
    if done == 5 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Join the processes, train, and print the step of the last checkpoint."""
    join_processes()
    folder = Path(sys.argv[1])
    sharding = NamedSharding(make_mesh(Parallelism()), PartitionSpec())

    def replicate(tree):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

    checkpoints = Checkpoints(folder / "c")
    try:
        run(
            plain_step,
            replicate(jax.device_get(init_state())),
            lambda done: map(replicate, make_batches(done)),
            config=LoopConfig(steps=4000, log_every=4000, save_every=4000),
            checkpoints=checkpoints,
            hooks=[MetricsLog(folder / "m.jsonl"), StepCall(on_step)],
        )
    except KeyboardInterrupt as error:
        print("stopped at", checkpoints.latest(), error)


if __name__ == "__main__":
    main()
