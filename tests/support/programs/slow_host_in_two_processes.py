"""Train in two processes; arguments are the folder and what is slow in the second: nothing, data or device."""

import sys
import time
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.distributed import Parallelism, make_mesh
from dit_video.training.hooks.hook import Hook
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.hooks.slow_hosts import DeviceProbe, SlowHostConfig, SlowHostMonitor
from dit_video.training.loop import LoopConfig, run
from dit_video.training.time_recorder import TimeRecorder
from support.devices import join_processes
from support.loop_training import init_state, make_batches, plain_step

STEPS, LOG_EVERY = 200, 10
STEP_SECONDS = 0.005
"""Time that data of either process take, which is the time of a step."""


SLOWNESS = 30
"""Factor of a throttled device's time: other programs of this machine may slow the other process's device as well."""


class ThrottledProbe(DeviceProbe):
    """A probe of devices that take much longer than they do."""

    def measure(self) -> list[float]:
        return [SLOWNESS * each for each in super().measure()]


def main() -> None:
    """Join the processes, train, and leave the log and the records in the folder."""
    join_processes()
    folder, slow = Path(sys.argv[1]), sys.argv[2] if jax.process_index() == 1 else "nothing"
    mesh = make_mesh(Parallelism())
    replicated, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (mesh.axis_names,)))

    def place(tree, sharding):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

    def read_batches(done):
        for batch in make_batches(done):
            time.sleep(4 * STEP_SECONDS if slow == "data" else STEP_SECONDS)
            yield place(batch, divided)

    recorder = TimeRecorder(folder / "goodput" if jax.process_index() == 0 else None)
    probe = ThrottledProbe() if slow == "device" else DeviceProbe()
    # The budget of a long training would allow for few readings.
    monitor = SlowHostMonitor(recorder, config=SlowHostConfig(budget=1.0), probe=probe)
    hooks: list[Hook] = [monitor, MetricsLog(folder / "metrics.jsonl")]
    with recorder.attempt():
        recorder.resume("denoiser", 0)
        state = place(jax.device_get(init_state()), replicated)
        config = LoopConfig(steps=STEPS, log_every=LOG_EVERY)
        run(plain_step, state, read_batches, config=config, hooks=hooks, recorder=recorder)


if __name__ == "__main__":
    main()
