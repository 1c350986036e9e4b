"""Train on two of eight devices, replay on one, two, four and eight; the arguments are clips and a run's folder."""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import jax

from dit_video.distributed import Parallelism
from dit_video.experiment.replay import replay, with_parallelism
from dit_video.experiment.run import Run
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.training.checkpoint import CheckpointPolicy
from support import tiny


def main(clips: str, folder: Path) -> None:
    """Train, and replay all steps after the first checkpoint on each mesh."""
    experiment = tiny.EXPERIMENT.replace_stage("denoiser", batch=8, steps=12)
    experiment = dataclasses.replace(experiment, parallel=Parallelism(data=2), keep=CheckpointPolicy(newest=10))
    run = Run.create(folder, experiment)
    run = open_on(run, Parallelism(data=2))
    run.prepare(clips)
    with mock.patch.object(TrainDenoiser, "_export"):  # its pipeline would take all devices
        run.run_stages()
    for data, fsdp in ((1, 1), (2, 1), (1, 4), (2, 4)):
        parallel = Parallelism(data=data, fsdp=fsdp)
        result = replay(open_on(Run.open(folder), parallel), first=4)
        is_same = parallel == Parallelism(data=2)
        assert result.result == ("same bits" if is_same else "within 1e-6"), (parallel, result)
        assert result.compared_states == (8, 12), result
        assert is_same or any(result.max_errors.values()), result


def open_on(run: Run, parallel: Parallelism) -> Run:
    """Return a run on the first devices that a mesh needs."""
    return dataclasses.replace(
        with_parallelism(run, parallel), devices=tuple(jax.devices()[: parallel.data * parallel.fsdp])
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    print("done")
