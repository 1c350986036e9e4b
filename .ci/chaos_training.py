"""One process of the training that `chaos_harness.py` disturbs; it is started as in `experiments/train.py`.

python .ci/chaos_training.py prepare gs://bucket/runs/prepared --steps 200 --silence 10 --clips CLIPS
python .ci/chaos_training.py train gs://bucket/runs/chaos --steps 200 --silence 10
"""

import argparse
import contextlib
import dataclasses
import signal
import time
from pathlib import Path

from dit_video.core.errors import EXIT_TRY_AGAIN, script
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.experiment import Experiment
from dit_video.experiment.launch import open_run
from dit_video.experiment.run import Run
from dit_video.scenes import shapes
from dit_video.training.checkpoint import CheckpointPolicy
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from support import tiny

BATCH = 12
"""Rows of a step, which one to four processes can share."""
SAVE_EVERY = 5
KEPT_CHECKPOINTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("prepare", "train"))
    parser.add_argument("address")
    parser.add_argument("--steps", type=int, required=True, help="Steps of the training.")
    parser.add_argument("--silence", type=float, required=True, help="Seconds for which a process may be silent.")
    parser.add_argument("--clips", type=Path, help="Folder for the clips.")
    arguments = parser.parse_args()
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))  # to hang, with JAX's threads going on
    with open_training(arguments.address, arguments.steps, silence=arguments.silence) as run:
        if arguments.action == "prepare":
            shapes.write_folder(arguments.clips, count=tiny.COUNT, seed=0, sizes=tiny.SIZES)
            run.prepare(arguments.clips)
            run.run_stages("autoencoder")
            run.experiment.get_stage("denoiser").encode_latents(run)
        else:
            run.prepare(f"{arguments.address}/data")
            run.run_stages()


def open_training(address: str, steps: int, *, silence: float) -> contextlib.AbstractContextManager[Run]:
    """Return a context that opens the run at an address."""
    timeouts = TimeoutConfig(startup=40.0, max_silence=silence, max_step=60.0)
    return open_run(address, make_experiment(steps), timeouts=timeouts, stopped_code=EXIT_TRY_AGAIN)


def make_experiment(steps: int) -> Experiment:
    """Return the tiny experiment with more rows and steps, and with AdamW."""
    experiment = tiny.EXPERIMENT
    optimizer = AdamW(learning_rate=1e-3, schedule=Constant(warmup=10))
    experiment = experiment.replace_stage("denoiser", steps=steps, batch=BATCH, optimizer=optimizer)
    keep = CheckpointPolicy(newest=KEPT_CHECKPOINTS)
    return dataclasses.replace(experiment, log_every=1, save_every=SAVE_EVERY, keep=keep)


if __name__ == "__main__":
    script(main)()
