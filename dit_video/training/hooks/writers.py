"""Where a run's figures go besides its JSON lines, and what is looked at on the way."""

import math
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dit_video.core.errors import MissingError, UserError

_SECONDS = 10
"""until an entry is in TensorBoard's file"""


@dataclass(frozen=True, kw_only=True)
class Monitoring:
    """What is looked at while a denoiser is trained, besides `metrics.jsonl`; intervals are in steps, 0 is never.

    Raises:
      UserError: a number that is negative, or prompts that are never sampled.
    """

    tensorboard: bool = False
    """write event files to `tensorboard/` (`pip install 'dit-video[tensorboard]'`)"""
    wandb: str | None = None
    """the project of Weights & Biases that a run is logged to (`pip install 'dit-video[wandb]'`)"""
    validate_every: int = 0
    """The loss of held-out clips, with the averaged weights: `validation_loss`. Noise and times are the same each time,
    and no caption is dropped."""
    validation_batches: int = 4
    """of rows, as large as those of training"""
    sample_every: int = 0
    """a grid of clips of the averaged weights, in `samples/`"""
    prompts: tuple[str, ...] = ()
    """of the grid; without any the captions of the first clips"""

    def __post_init__(self) -> None:
        for name in ("validate_every", "sample_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is a number of steps, or 0 for never, not {getattr(self, name)}")
        if self.validation_batches < 1:
            raise UserError(f"validation_batches is at least 1, not {self.validation_batches}")
        if self.prompts and not self.sample_every:
            raise UserError("prompts are sampled while training: set sample_every too, or leave them out")


@runtime_checkable
class Log(Protocol):
    """What takes the entries of a run, in increasing order of steps."""

    def resume(self, step: int) -> None:
        """Forget the entries after `step`: they are written again."""
        ...

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Take one."""
        ...


class Logs:
    """Several in one."""

    def __init__(self, logs: Iterable[Log]) -> None:
        self._logs = tuple(logs)

    def resume(self, step: int) -> None:
        for log in self._logs:
            log.resume(step)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        for log in self._logs:
            log.write(step, values)

    def close(self) -> None:
        """Those that keep something open."""
        for log in self._logs:
            if hasattr(log, "close"):
                log.close()


class TensorBoard:
    """Event files for TensorBoard.

    Raises:
      MissingError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        try:
            import tensorboardX  # optional
        except ImportError as error:
            raise MissingError(
                "TensorBoard's files are written by tensorboardX, which is not installed; pip install "
                "'dit-video[tensorboard]', or leave out monitoring.tensorboard"
            ) from error
        self._make = tensorboardX.SummaryWriter
        self._folder = Path(folder)
        self._writer: Any = None

    def resume(self, step: int) -> None:
        """Later entries that were written before are told to be void."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # Of its own files it tells two of one second apart by nothing else.
        suffix = f".{uuid.uuid4().hex[:8]}"
        void = step + 1 if step else None
        self._writer = self._make(str(self._folder), purge_step=void, filename_suffix=suffix, flush_secs=_SECONDS)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """One scalar each; what is not finite is left out."""
        if self._writer is None:
            self.resume(0)
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Have all on disk, which otherwise follows some seconds later."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """A run of Weights & Biases, which a run that is continued goes on with.

    Raises:
      MissingError: wandb is not installed.
    """

    def __init__(self, project: str, folder: str | os.PathLike) -> None:
        try:
            import wandb  # optional
        except ImportError as error:
            raise MissingError(
                "wandb is not installed; pip install 'dit-video[wandb]', or leave out monitoring.wandb"
            ) from error
        self._wandb, self._project, self._folder = wandb, project, Path(folder)
        self._run: Any = None

    def resume(self, step: int) -> None:
        """Entries up to a step that it has already are passed over by the service."""
        del step
        self._folder.mkdir(parents=True, exist_ok=True)
        known = self._folder / "wandb_run.txt"
        if not known.is_file():
            known.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._run = self._wandb.init(
            project=self._project,
            dir=str(self._folder),
            id=known.read_text(encoding="utf-8"),
            name=self._folder.resolve().parent.name,
            resume="allow",
        )

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """One entry; what is not finite is left out."""
        if self._run is None:
            self.resume(0)
        self._run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Have the service know all."""
        if self._run is not None:
            self._run.finish()
            self._run = None
