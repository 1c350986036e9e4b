"""Destinations of a run's metrics besides its JSON lines, and the configuration of monitoring."""

import contextlib
import importlib
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError, check_at_least
from dit_video.training.hooks.hook import Hook

_FLUSH_SECONDS = 10
"""Seconds until an entry is flushed to TensorBoard's file."""


@dataclass(frozen=True, kw_only=True)
class MonitoringConfig:
    """Configuration of monitoring during the training of an autoencoder and a denoiser, besides `metrics.jsonl`.

    The autoencoder's training has reconstructions alone; all else is of the denoiser.

    Raises:
      UserError: If a number is negative, or if there are prompts that are never sampled.
    """

    tensorboard: bool = False
    """True to write event files to `tensorboard/` (`pip install 'dit-video[tensorboard]'`)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (`pip install 'dit-video[wandb]'`); None for none."""
    validate_every: int = 0
    """Interval in steps of logging `validation_loss`, the loss of held-out clips with the averaged weights; 0 for
    never. Noise and times are the same each time, and no caption is dropped."""
    validation_batches: int = 4
    """Number of validation batches, which are as large as training batches."""
    sample_every: int = 0
    """Interval in steps of sampling a grid of clips with the averaged weights to `samples/`, and of reconstructing
    held-out clips to the autoencoder's `reconstructions/`, with their PSNR in the log; 0 for never."""
    evaluate_every: int = 0
    """Interval in steps of sampling the prompts of the run's evaluation and computing its metrics of samples, to
    `evaluations/step_STEP/metrics.json`; 0 for never. Training goes on while the first process measures."""
    self_check: bool = False
    """True to check the data, the model and the steps of the denoiser's training for mistakes that let it run and go
    wrong; they are printed, and logged to `self_check.jsonl`."""
    prompts: tuple[str, ...] = ()
    """Prompts of the grid; the captions of the first clips if empty, or no text where no clip has a caption."""

    def __post_init__(self) -> None:
        every = {"validate_every": self.validate_every, "sample_every": self.sample_every}
        check_at_least(0, **every, evaluate_every=self.evaluate_every)
        check_at_least(1, validation_batches=self.validation_batches)
        if self.prompts and not self.sample_every:
            raise UserError("prompts have no effect with sample_every=0. Set sample_every, or leave out the prompts.")


def _import_optional(option: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        fix = f"Run pip install 'dit-video[{option}]', or leave out monitoring.{option}."
        raise MissingError(f"monitoring.{option} needs {package}, which is not installed. {fix}") from error


class TensorBoard(Hook):
    """Event files for TensorBoard.

    Raises:
      MissingError: If the package tensorboardX is not installed.
    """

    first_process_only = True

    def __init__(self, folder: str | os.PathLike) -> None:
        self._make_writer = _import_optional("tensorboard", "tensorboardX").SummaryWriter
        self._folder = Path(folder)
        self._writer: Any = None

    def resume(self, step: int) -> None:
        """Open an event file that tells TensorBoard to purge earlier entries after `step`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Names of event files contain the time in seconds, so that two files of one second would collide.
        options: dict[str, Any] = {"filename_suffix": f".{uuid.uuid4().hex[:8]}", "flush_secs": _FLUSH_SECONDS}
        self._writer = self._make_writer(str(self._folder), purge_step=step + 1 if step else None, **options)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one scalar for each finite value."""
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Flush all entries to disk and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases(Hook):
    """A run of Weights & Biases, which is continued if the training is resumed.

    Raises:
      MissingError: If the package wandb is not installed.
      UserError: If nobody is logged in, or the service refuses the login.
    """

    first_process_only = True

    def __init__(self, project: str, folder: str | os.PathLike) -> None:
        self._wandb, self._project, self._folder = _import_optional("wandb", "wandb"), project, Path(folder)
        self._run: Any = None
        with self._convert_errors():
            self._wandb.login()  # asks on a terminal, and does nothing offline

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except self._wandb.Error as error:
            fix = "Run wandb login, set WANDB_MODE=offline, or leave it out."
            raise UserError(f"monitoring.wandb={self._project!r} cannot be logged to: {error} {fix}") from error

    def resume(self, step: int) -> None:
        """Start or continue the run; the service ignores entries of steps that it already has.

        Raises:
          UserError: If the service refuses the run, or is not reached.
        """
        del step
        self._folder.mkdir(parents=True, exist_ok=True)
        id_file = self._folder / "wandb_run.txt"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        with self._convert_errors():
            self._run = self._wandb.init(
                project=self._project,
                dir=str(self._folder),
                id=id_file.read_text(encoding="utf-8"),
                name=self._folder.resolve().parent.name,
                resume="allow",
            )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write the finite values of one entry."""
        self._run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Finish the upload to the service."""
        if self._run is not None:
            self._run.finish()
            self._run = None
