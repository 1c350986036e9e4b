"""Train on two of eight devices, replay on one, two, four and eight; the arguments are clips and a run's folder."""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import jax

from dit_video.distributed import MeshConfig
from dit_video.experiment.replay import replay, with_mesh
from dit_video.experiment.run import Run
from dit_video.experiment.stages.denoiser import TrainDenoiser
from dit_video.training.checkpoint import CheckpointPolicy
from support import tiny


def main(clips: str, folder: Path) -> None:
    """Train, and replay all steps after the first checkpoint on each mesh."""
    experiment = tiny.EXPERIMENT.replace_stage("denoiser", batch=8, steps=12)
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=2), keep=CheckpointPolicy(newest=10))
    run = Run.create(folder, experiment)
    run = open_on(run, MeshConfig(data=2))
    run.prepare(clips)
    with mock.patch.object(TrainDenoiser, "_export"):  # its pipeline would take all devices
        run.run_stages()
    for mesh in (MeshConfig(data=1), MeshConfig(data=2), MeshConfig(data=1, fsdp=4), MeshConfig(data=2, fsdp=4)):
        result = replay(open_on(Run.open(folder), mesh), first=4)
        is_same = mesh == MeshConfig(data=2)
        assert result.result == ("same bits" if is_same else "within 1e-6"), (mesh, result)
        assert result.compared_states == (8, 12), result
        assert is_same or any(result.max_errors.values()), result


def open_on(run: Run, mesh: MeshConfig) -> Run:
    """Return a run on the first devices that a mesh needs."""
    return dataclasses.replace(with_mesh(run, mesh), devices=tuple(jax.devices()[: mesh.data * mesh.fsdp]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    print("done")
