"""Interface of stages: an experiment lists them, and each is run with the run's folder, devices and clips."""

import abc
import contextlib
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from dit_video.core import config_json, rng
from dit_video.core.errors import MissingError, UserError, check_at_least
from dit_video.core.storage import StoragePath
from dit_video.data.clips import ClipSource
from dit_video.data.usable_clips import ClipRequirements, UsableClips, select_usable
from dit_video.distributed import MeshPartitioner, Parallelism, make_mesh
from dit_video.experiment import datasets
from dit_video.experiment.checkpoints import get_checkpoint_folder
from dit_video.experiment.remote_folder import RemoteFolder, SendLogs, main_process_first
from dit_video.experiment.training_config import DataConfig
from dit_video.training.checkpoint import CheckpointPolicy, Checkpoints
from dit_video.training.goodput import GOODPUT_FOLDER
from dit_video.training.hooks.profiler import TraceConfig
from dit_video.training.loop import LoopConfig
from dit_video.training.step import TrainStep
from dit_video.training.time_recorder import TimeRecorder
from dit_video.training.trainer import BatchIterator, Trainer

_RUN_FOLDERS = (
    "autoencoder",
    "checkpoints",
    "clips",
    "data",
    "denoiser",
    "goodput",
    "latents",
    "pipeline",
    "samples",
    "stages",
)
"""Names in the folder of a run that no other stage may have."""
_AMENDABLE_FIELDS = (
    "data.max_excluded_share",
    "data.workers",
    "keep",
    "log_every",
    "max_consecutive_skips",
    "parallel",
    "preemption_grace",
    "save_every",
)


@dataclass(frozen=True, kw_only=True)
class StagedExperiment:
    """Config of a run: its stages, one after the other, and what they share.

    Raises:
      UserError: If values are out of range or inconsistent.
    """

    name: str
    data: DataConfig
    stages: tuple["Stage", ...] = ()
    """Stages of other packages, such as the training of a model that a later stage reads."""
    parallel: Parallelism = field(default_factory=Parallelism)
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    preemption_grace: float = 300.0
    """Maximum number of seconds from SIGTERM or Ctrl-C to the end of the process; preempted machines often have 30."""
    max_consecutive_skips: int = 10
    """Number of consecutive steps, skipped because of a non-finite loss or gradient, after which the run ends."""
    keep: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    """Policy for preserving checkpoints."""

    def __post_init__(self):
        positive = {
            "data.clips_per_video": self.data.clips_per_video,
            "data.resolutions": min(self.data.resolutions, default=1),
            "log_every": self.log_every,
            "save_every": self.save_every,
            "max_consecutive_skips": self.max_consecutive_skips,
            "preemption_grace": self.preemption_grace,
        }
        check_at_least(1, **positive)
        weights = self.data.weights
        if not all(0 <= weight < math.inf for weight in weights) or (weights and not self.data.used_datasets):
            rule = "they must not be negative, and one must be positive."
            raise UserError(f"weights={weights} is invalid: {rule} Use 0 for a data set that is not used.")
        check_at_least(0, workers=self.data.workers)
        if not 0 <= (share := self.data.max_excluded_share) <= 1:
            raise UserError(f"max_excluded_share={share} is invalid: it must lie in [0, 1]. Use 0 to exclude none.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is invalid: it must be a whole number from 0 to {2**32 - 1}.")
        check_names([stage.name for stage in self.stages])

    @property
    def requirements(self) -> ClipRequirements:
        """Return the requirements that every clip of the training meets."""
        return ClipRequirements()

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        """Return the fields that may change after the run has begun, because they do not change what is trained.

        A name covers all fields inside of it, and [] stands for any index.
        """
        stages = (f"stages[{i}].{name}" for i, stage in enumerate(self.stages) for name in stage.amendable_fields)
        return (*_AMENDABLE_FIELDS, *stages)


class Training(NamedTuple):
    """A training whose steps can be carried out or repeated."""

    trainer: Trainer
    open_batches: Callable[[int], BatchIterator]
    """Function from a step of the stage to an iterator over the batches from there on."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A run on this machine, made once and handed to every stage."""

    folder: Path
    """Folder of the run."""
    experiment: StagedExperiment
    command: str = ""
    """Command that continues the run."""
    remote: RemoteFolder | None = field(default=None, compare=False)
    """Folder at an address that `folder` is a copy of; None for a folder that all processes share."""
    process: int = field(default_factory=jax.process_index)
    """Index of this process."""
    process_count: int = field(default_factory=jax.process_count)
    profile: tuple[int, int] | None = None
    """First and last step that are traced."""
    devices: tuple[Any, ...] | None = None
    """Devices of the run, all by default; those that libtpu describes let its programs be compiled elsewhere."""
    recorder: TimeRecorder = field(default_factory=TimeRecorder, compare=False)
    """Recorder of where the time of the run goes, one for all its stages."""

    def __post_init__(self) -> None:
        if self.process == 0 and self.recorder.folder is None:
            self.recorder.folder = self.folder / GOODPUT_FOLDER

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        return self.experiment.seed

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Return the devices, which a run that is only read does not need."""
        return make_mesh(self.experiment.parallel, self.devices)

    @property
    def partitioner(self) -> MeshPartitioner:
        """Return what the run's models are made with to be trained on its devices."""
        return MeshPartitioner(self.mesh, self.experiment.parallel.context_attention)

    @property
    def sampling_parallelism(self) -> Parallelism | None:
        """Return how devices sample the run's models together; None for a run on one device."""
        return None if self.mesh.size == 1 else self.experiment.parallel

    @functools.cached_property
    def clips(self) -> ClipSource:
        """Return all ingested clips."""
        return datasets.open_datasets(self.folder / "data", captions=self.experiment.data.captions)

    @functools.cached_property
    def usable_training_clips(self) -> UsableClips:
        """Return the clips of the split `train` that the config selects and does not hold out, if they can be used.

        Raises:
          UserError: If more clips cannot be used than the config allows.
        """
        data = self.experiment.data
        all_clips = self.clips.exclude(data.held_out).select_split("train")
        clips = all_clips.select_where(data.where)
        if len(all_clips) and not len(clips):
            raise UserError(
                f"data.where={data.where!r} is invalid: it selects none of the {len(all_clips)} training clips. Use "
                "wider limits, and see the histograms of the columns with tools/annotate.py DATA --list."
            )
        if data.weights:
            clips = clips.select_datasets(data.used_datasets)
        selected = select_usable(clips, self.experiment.requirements)
        selected.check(data.max_excluded_share)
        return selected

    @functools.cached_property
    def usable_held_out_clips(self) -> UsableClips:
        """Return the held-out clips that the config names, without those that cannot be used.

        Without names they are the split `validation`.
        """
        held_out = self.experiment.data.held_out
        clips = self.clips.select(held_out) if held_out else self.clips.select_split("validation")
        return select_usable(clips, self.experiment.requirements)

    @property
    def training_clips(self) -> ClipSource:
        """Return the clips of `usable_training_clips`."""
        return self.usable_training_clips.clips

    @property
    def held_out_clips(self) -> ClipSource:
        """Return the clips of `usable_held_out_clips`."""
        return self.usable_held_out_clips.clips

    def main_process_first(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that the first process runs before the others, which then have the files it has written."""
        return main_process_first(self.remote)

    def for_stage(self, experiment: StagedExperiment) -> "Runtime":
        """Return the runtime of a stage with an experiment of its own; this one if the experiments are equal."""
        return self if experiment == self.experiment else replace(self, experiment=experiment)

    def get_checkpoint_folder(self, name: str) -> str | Path:
        """Return the folder or address of a model's checkpoints, which need not exist yet."""
        folder = get_checkpoint_folder(self.folder, name)
        return folder if isinstance(folder, Path) else str(folder)

    def open_checkpoints(self, name: str) -> Checkpoints:
        """Return the checkpoints of a model, to be read."""
        return Checkpoints(self.get_checkpoint_folder(name))

    def make_trainer(
        self,
        name: str,
        *,
        steps: int,
        init: Callable[[Array], dict[str, Any]],
        train_step: TrainStep,
        start_step: int = 0,
    ) -> Trainer:
        """Return the trainer of a model in its folder, with the run's seed, mesh, logs and checkpoints.

        Args:
          name: Name of the model, and of its folder.
          steps: Number of steps, counted from `start_step`.
          init: Function from a random key to parameters.
          train_step: Step of the parameters.
          start_step: Number of steps of the stages before this one.
        """
        folder, experiment = self.folder / name, self.experiment
        return Trainer(
            folder=folder,
            checkpoints=self.get_checkpoint_folder(name),
            title=f"training the {name}",
            init=init,
            random_key=rng.key(self.seed, name),
            train_step=train_step,
            config=LoopConfig(
                steps=start_step + steps,
                log_every=experiment.log_every,
                save_every=experiment.save_every,
                max_consecutive_skips=experiment.max_consecutive_skips,
                preemption_grace=experiment.preemption_grace,
            ),
            trace=None if self.profile is None else TraceConfig(folder / "profile", *self.profile),
            mesh=self.mesh,
            start_step=start_step,
            keep=experiment.keep,
            hooks=() if self.remote is None else (SendLogs(self.remote),),
            recorder=self.recorder,
            resolved_config=config_json.to_json(experiment),
        )


class Stage(abc.ABC):
    """A part of a run: it reads its inputs, and leaves its outputs in the folder of the run.

    A stage of another package is a registered, frozen and keyword-only dataclass; it stands in the config's `stages`.
    """

    name: str
    """Name of the stage, which no other stage of the run has."""
    amendable_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that may change after the run has begun; see `StagedExperiment.amendable_fields`."""

    def list_inputs(self, runtime: "Runtime") -> tuple[StoragePath, ...]:
        """Return the files and folders of earlier stages that this one reads."""
        return ()

    @abc.abstractmethod
    def list_outputs(self, runtime: "Runtime") -> tuple[StoragePath, ...]:
        """Return the files and folders that the stage leaves, each written whole or not at all."""

    def check(self, runtime: "Runtime") -> None:  # noqa: B027  # most stages have nothing to check
        """Check all that can be checked before the first stage begins.

        Raises:
          UserError: If the stage cannot be run.
        """

    def is_done(self, runtime: "Runtime") -> bool:
        """Return whether the stage need not be run, because its outputs exist."""
        return all(path.exists() for path in self.list_outputs(runtime))

    def is_due(self, runtime: "Runtime") -> bool:
        """Return whether the stage is not done yet, after the first process has finished the stages before it.

        Raises:
          MissingError: If the stage is not done, and its inputs do not exist.
        """
        with runtime.main_process_first():
            pass
        # Not in turn: all processes list the checkpoints of a training together.
        if self.is_done(runtime):
            return False
        for path in self.list_inputs(runtime):
            if not path.exists():
                raise MissingError(f"stage {self.name} reads {path}, which does not exist. Run the stage before it.")
        return True

    def open_training(self, runtime: "Runtime", *, is_new: bool) -> Training | None:
        """Return the training that `run` carries out, without its logs, so that its steps can be repeated.

        Args:
          runtime: The run.
          is_new: Whether it begins with the initial state, not with a checkpoint.

        Returns:
          None for a stage that trains nothing, or whose steps cannot be repeated.
        """
        return None

    @abc.abstractmethod
    def run(self, runtime: "Runtime") -> None:
        """Make the outputs, or continue to make them after an interruption."""


def check_names(names: list[str]) -> None:
    """Raise if stages do not have folder names of their own."""
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name) or name in _RUN_FOLDERS or names.count(name) > 1:
            rule = "it must be a folder name of letters, digits and _.- that nothing else of the run has."
            raise UserError(f"stage name={name!r} is invalid: {rule} Use another name.")
