"""Stages of the denoiser's curriculum, which share one training."""

from dataclasses import dataclass
from pathlib import Path

from dit_video.experiment import Experiment
from dit_video.experiment.runtime import Runtime, Stage


@dataclass(frozen=True, kw_only=True)
class DenoiserStage(Stage):
    """A stage of the denoiser: the last one, or one of the curriculum that leads to it.

    All have the checkpoints and logs of one training, in the folder `denoiser`, and are done once it is beyond them.
    """

    experiment: Experiment
    """The experiment, with the data and the training of this stage."""
    name: str
    curriculum: str = ""
    """Name of the stage in the curriculum; empty for the last one."""
    start_step: int = 0
    """Number of steps of the stages before this one."""

    @property
    def end_step(self) -> int:
        """Return the number of steps of the training up to the end of this stage."""
        return self.start_step + self.experiment.denoiser.steps

    def get_folder(self, runtime: Runtime) -> Path:
        """Return the folder of this stage's own files."""
        return runtime.folder / "stages" / self.curriculum if self.curriculum else runtime.folder

    def is_trained(self, runtime: Runtime) -> bool:
        """Return whether nothing of this stage is needed any more: it is trained, and the last one is exported."""
        newest = runtime.open_checkpoints("denoiser").latest()
        if self.curriculum:
            return (newest or 0) >= self.end_step
        # The pipeline of a finished run, which may be trained further, and whose checkpoints may be gone.
        return (runtime.folder / "pipeline").is_dir() and (newest is None or newest >= self.end_step)
