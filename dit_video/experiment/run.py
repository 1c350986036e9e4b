"""A run: an experiment, and the folder in which its stages leave what they make.

experiment.json           the experiment, and its amendments
pipeline.json             the config of its pipeline, known once the clips are
data/                     the ingested clips, or a link to them (see `link_datasets`); one folder for each data set
autoencoder/              checkpoints, metrics.jsonl, weights.safetensors, preview.safetensors (the preview decoder);
                          reconstructions/, as the config says
text_encoder.json         the identity of a frozen text encoder
image_encoder.json        the identity of an image encoder
texts/                    embeddings of the captions, where latents are not cached
latents/                  cached latents, or a link to them
excluded_clips.json       the clips that cannot be used, with the reasons, if there are any
stages/NAME/              latents, rows.json and excluded_clips.json of a stage that another one continues
NAME/                     outputs of a stage of another package
denoiser/                 checkpoints, metrics.jsonl, hash_chain.jsonl, rows.json (content of an epoch), skipped.jsonl
                          (non-finite steps); snapshots/, samples/, evaluations/, tensorboard/, as the config says
adapter.safetensors       the trained adapter, if any, under our names
pytorch_lora_weights.safetensors   the adapter of a Wan, under diffusers' names
transformer/              all weights of a trained Wan, as diffusers reads them; transformer_2/ for its second expert
goodput/                  where the time went: a file for each start, see `training.goodput`
.programs/                compiled programs of several processes, or of a folder on shared storage
.lock, .lease-NUMBER      the lock of the folder, see `training.folder_lock`
checkpoints/              a link to the checkpoints of all models, where they lie elsewhere
pipeline/                 the result, which `dit_video.load` reads
"""

import abc
import contextlib
import dataclasses
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from dit_video.core import config_json, rng
from dit_video.core.errors import MissingError, UserError, check_at_least, get_command
from dit_video.core.files import write_json
from dit_video.core.offload import Offload
from dit_video.core.storage import StoragePathLike
from dit_video.core.version import __version__
from dit_video.data.clips import ClipSource
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.plan import hash_inputs
from dit_video.data.sizes import SizeLimits, fit_size
from dit_video.data.usable_clips import ClipRequirements, UsableClips, select_usable
from dit_video.data.windows import ClipCrops
from dit_video.distributed import MeshPartitioner, Parallelism, make_mesh
from dit_video.evaluation.clip_set import make_fitted_set
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.evaluate import check_evaluation, evaluate
from dit_video.evaluation.measure import EvaluationResult
from dit_video.evaluation.protocol import EvaluationData, EvaluationProtocol
from dit_video.experiment import datasets
from dit_video.experiment.amendments import Amendment, describe_stages, make_amendment
from dit_video.experiment.autoencoder import MAX_LINEAR_VALUES, TrainingWindows, limit_windows, read_autoencoder
from dit_video.experiment.checkpoints import get_checkpoint_folder, list_checkpoints
from dit_video.experiment.data_config import DataConfig
from dit_video.experiment.denoiser import add_other_expert, load_checkpoint
from dit_video.experiment.encoders import TEXT_ENCODER_FILE
from dit_video.experiment.remote_folder import RemoteFolder, SendLogs, main_process_first
from dit_video.experiment.training_config import AutoencoderTraining, DenoiserTraining
from dit_video.families import get_lora_modules
from dit_video.models.autoencoders import LinearAutoencoder, latent_grid
from dit_video.models.conditioning import ClipConditioning
from dit_video.models.encoders import Tokenizer
from dit_video.models.model_config import ModelConfig
from dit_video.nn import get_param_shapes
from dit_video.sampling import Sampling
from dit_video.sampling.devices import make_placement
from dit_video.sampling.loading import add_preview_decoder, load_pipeline
from dit_video.sampling.memory import fit_offload
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import CONFIG as PIPELINE_CONFIG
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG
from dit_video.sampling.pipeline_config import (
    RUN_FORMAT,
    PipelineConfig,
    read_pipeline_config,
    read_run_document,
    write_pipeline_config,
)
from dit_video.sampling.request import Conditioner
from dit_video.tokens import Grid, PackedShape
from dit_video.training import goodput
from dit_video.training.checkpoint import CheckpointPolicy, Checkpoints
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.training.hooks.profiler import TraceConfig
from dit_video.training.loop import LoopConfig
from dit_video.training.step import TrainStep
from dit_video.training.time_recorder import TimeRecorder
from dit_video.training.trainer import BatchIterator, Trainer
from dit_video.weights.frozen_encoders import FrozenTextEncoder, open_tokenizer

EXCLUDED_FILE = "excluded_clips.json"
"""Name of the list of the clips that a training excludes, and of the held-out ones that cannot be used."""
_RUN_FOLDERS = ("checkpoints", "clips", "data", "goodput", "latents", "pipeline", "samples", "stages")
"""Names in the folder of a run that no stage may have."""
KEEP_DATA = (
    "A run keeps its data: restore the clips, or start another run, which may begin with this one's weights "
    "(init_from)."
)
"""Advice for a run whose data set has changed."""
_AMENDABLE_FIELDS = (
    "conditioner",
    "data.max_excluded_share",
    "data.workers",
    "evaluation",
    "keep",
    "log_every",
    "max_consecutive_skips",
    "model.autoencoder.form",
    "model.autoencoder.remat",
    "model.backbone.attention",
    "model.backbone.remat",
    "monitoring",
    "parallel",
    "preemption_grace",
    "sampling",
    "save_every",
)
"""Fields that may change after the run has begun, besides those of its stages; see `Experiment.amendable_fields`."""

_EXAMPLES, _MAX_EXAMPLE = 4, 160
"""Number of captions that are prompts to try the model with, and the most characters of one."""

_Location = StoragePathLike | None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Config of a run: its data, its model, and its stages one after the other; checked as a whole.

    Raises:
      UserError: If values are out of range or inconsistent.
    """

    name: str
    data: DataConfig
    model: ModelConfig | None = None
    """The model that is trained; None for an experiment without a pipeline."""
    stages: tuple["Stage", ...] = ()
    """Stages in order, such as `TrainAutoencoder(...)`, then `TrainDenoiser(...)`."""
    autoencoder_from: str | None = None
    """Folder of the autoencoder's weights in diffusers' layout, of a pipeline, or of a run that has one; None for one
    that a stage trains, or that has no weights."""
    sampling: Sampling = field(default_factory=Sampling)
    conditioner: Conditioner | None = None
    """Use of images, clips and masks in sampling after the training; None for `Completion`."""
    evaluation: EvaluationProtocol = field(default_factory=CaptionEvaluation)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """Monitoring of the trainings."""
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
        check_at_least(
            1,
            log_every=self.log_every,
            save_every=self.save_every,
            max_consecutive_skips=self.max_consecutive_skips,
            preemption_grace=self.preemption_grace,
        )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is invalid: it must be a whole number from 0 to {2**32 - 1}.")
        self._check_names()
        if self.model is not None:
            self._check_autoencoder(self.model)
            check_sizes(self.model, self.data)
        for stage in self.stages:
            try:
                stage.check_config(self)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from error

    def _check_names(self) -> None:
        names = [stage.name for stage in self.stages]
        taken = {*_RUN_FOLDERS, *(each.name for each in dataclasses.fields(self))}
        owners = {"autoencoder": AutoencoderTraining, "denoiser": DenoiserTraining}
        for stage in self.stages:
            name = stage.name
            is_free = name not in taken and names.count(name) == 1 and isinstance(stage, owners.get(name, Stage))
            if not re.fullmatch(r"[\w.-]+", name) or not is_free:
                rule = "it must be a folder name of letters, digits and _.- that nothing else of the run has."
                raise UserError(f"stage name={name!r} is invalid: {rule} Use another name.")

    def _check_autoencoder(self, model: ModelConfig) -> None:
        start = self.autoencoder_from
        if self.autoencoder is not None and start is not None:
            rule = "a stage trains the autoencoder. Leave it out, or set the stage's init_from."
            raise UserError(f"autoencoder_from={start!r} is invalid: {rule}")
        if self.autoencoder is None and not start and get_param_shapes(model.autoencoder.make):
            rule = "no stage trains the autoencoder. Use the folder of its weights, such as MODEL/vae."
            raise UserError(f"autoencoder_from={start!r} is invalid: {rule}")

    def get_model(self) -> ModelConfig:
        """Return the model.

        Raises:
          UserError: If the experiment has none.
        """
        if self.model is None:
            raise UserError("model=None is invalid: a stage needs the experiment's model. Use model=ModelConfig(...).")
        return self.model

    @property
    def autoencoder(self) -> AutoencoderTraining | None:
        """Return the stage that trains the autoencoder; None for a pretrained one."""
        return next((stage for stage in self.stages if isinstance(stage, AutoencoderTraining)), None)

    @property
    def denoiser_stages(self) -> tuple[DenoiserTraining, ...]:
        """Return the stages of the denoiser's training, each of which continues the one before."""
        return tuple(stage for stage in self.stages if isinstance(stage, DenoiserTraining))

    @property
    def denoiser(self) -> DenoiserTraining:
        """Return the last stage of the denoiser's training.

        Raises:
          UserError: If the experiment has none.
        """
        if not self.denoiser_stages:
            raise UserError("the experiment trains no denoiser. Add a TrainDenoiser(...) to its stages.")
        return self.denoiser_stages[-1]

    @property
    def limits(self) -> SizeLimits:
        """Return the limits on the sizes that clips are resized to."""
        return self.data.make_limits(self.get_model())

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        """Return the fields that may change after the run has begun, because they do not change what is trained.

        A name covers all fields inside of it; those of a stage begin with its name.
        """
        of_stages = (f"{stage.name}.{name}" for stage in self.stages for name in stage.amendable_fields)
        fields = (*_AMENDABLE_FIELDS, *of_stages)
        if not any(stage.buckets for stage in self.denoiser_stages):
            return fields
        # Batches of buckets have as many clips as fit into the memory of the devices.
        return tuple(name for name in fields if name.rpartition(".")[2] != "parallel")

    def get_stage(self, name: str) -> "Stage":
        """Return the stage of a name.

        Raises:
          UserError: If there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise UserError(f"stage={name!r} is invalid: the experiment has no such stage. Use one of {names}.")

    def replace_stage(self, name: str, /, **changes: Any) -> "Experiment":
        """Return the experiment with other values of a stage's fields."""
        changed: Any = self.get_stage(name)
        changed = replace(changed, **changes)
        return replace(self, stages=tuple(changed if stage.name == name else stage for stage in self.stages))

    def replace_model(self, **changes: Any) -> "Experiment":
        """Return the experiment with other values of the model's fields."""
        return replace(self, model=replace(self.get_model(), **changes))

    def replace_backbone(self, **changes: Any) -> "Experiment":
        """Return the experiment with other fields of the backbone, such as its attention."""
        return replace(self, model=self.get_model().replace_backbone(**changes))


def _choose_examples(captions: Sequence[str]) -> tuple[str, ...]:
    """Return a few captions, spread over all, that are short enough to be read at a glance."""
    distinct = [text for text in dict.fromkeys(captions) if 0 < len(text) <= _MAX_EXAMPLE]
    return tuple(distinct[:: max(1, len(distinct) // _EXAMPLES)][:_EXAMPLES])


def check_sizes(model: ModelConfig, data: DataConfig) -> None:
    """Check that clips within the data's limits fit the model.

    Raises:
      UserError: If they do not.
    """
    if model.backbone.patch.t != 1:
        rule = "it does not divide an image, which has one latent frame. Use backbone.patch.t=1."
        raise UserError(f"backbone.patch.t={model.backbone.patch.t} is invalid: {rule}")
    try:
        latent_grid(Grid(data.max_frames, *model.size_multiple[1:]), model.autoencoder.stride)
    except UserError as error:
        raise UserError(f"max_frames does not fit the autoencoder: {error}") from error
    data.make_limits(model)
    shape = model.layout
    max_tokens = data.count_max_clip_tokens(stride=model.autoencoder.stride, patch=model.backbone.patch)
    if isinstance(shape, PackedShape) and max_tokens > shape.tokens:
        raise UserError(
            f"layout.tokens={shape.tokens} is invalid: a clip of {data.max_pixels} pixels and {data.max_frames} frames "
            f"has up to {max_tokens} tokens. Use layout.tokens={max_tokens}, or a lower data.max_pixels."
        )


class Training(NamedTuple):
    """A training whose steps can be carried out or repeated."""

    trainer: Trainer
    open_batches: Callable[[int], BatchIterator]
    """Function from a step of the stage to an iterator over the batches from there on."""


class Stage(abc.ABC):
    """A part of a run, which reads what earlier ones have left in its folder, and leaves its own there.

    A stage is a frozen and keyword-only dataclass. One of another package is registered, and may use all attributes of
    the run: its clips, devices, seed and checkpoints.
    """

    name: str
    """Name of the stage, and of its folder in the run's, which no other stage has."""
    output: ClassVar[str]
    """File or folder in the stage's folder that it writes last; a stage without one has an `is_done` of its own."""

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        """Return its fields that may change after the run has begun; see `Experiment.amendable_fields`."""
        return ()

    def check_config(self, experiment: Experiment) -> None:  # noqa: B027  # most stages have nothing to check
        """Check that the stage fits the experiment, which is being made.

        Raises:
          UserError: If it does not.
        """

    def check(self, run: "Run") -> None:  # noqa: B027  # most stages have nothing to check
        """Check all that can be checked before the first stage begins.

        Raises:
          UserError: If the stage cannot be run.
        """

    def get_output(self, run: "Run") -> Path:
        """Return the path of `output`, which need not exist yet.

        Raises:
          UserError: If the class names no output.
        """
        if not hasattr(self, "output"):
            kind = type(self).__name__
            raise UserError(f"the stage {self.name} is never done: {kind} lacks output. Name the file it writes last.")
        return run.folder / self.name / self.output

    def is_done(self, run: "Run") -> bool:
        """Return whether the stage need not be run."""
        return self.get_output(run).exists()

    @abc.abstractmethod
    def run(self, run: "Run") -> None:
        """Make the outputs, each whole or not at all, or continue to make them after an interruption."""

    def open_training(self, run: "Run", *, is_new: bool) -> Training | None:
        """Return the training that `run` carries out, without its logs, so that its steps can be repeated.

        Args:
          run: The run.
          is_new: Whether it begins with the initial state, not with a checkpoint.

        Returns:
          None for a stage that trains nothing, or whose steps cannot be repeated.
        """
        return None


class _Adapted(NamedTuple):
    """Model, data and devices that a stage overrides; None for those of the experiment."""

    model: ModelConfig | None = None
    data: DataConfig | None = None
    parallel: Parallelism | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A folder and its experiment: what is trained, with what, and what came of it.

    `create` writes the config, and `open` reads it. Only `train` computes; everything else reads what is there. Stages
    that are done are not repeated, and trainings continue from their checkpoints, so that an interrupted run is
    continued by the same command.
    """

    folder: Path
    experiment: Experiment
    command: str = ""
    """Command that started the run, or the last one that amended it."""
    amendments: tuple[Amendment, ...] = ()
    """Changes to the config since the run was started, in order."""
    remote: RemoteFolder | None = field(default=None, compare=False, repr=False)
    """Folder at an address that `folder` is a copy of; None for a run on this machine, or on a shared disk."""
    profile: tuple[int, int] | None = None
    """First and last step that are traced."""
    devices: tuple[Any, ...] | None = None
    """Devices of the run, all by default; those that libtpu describes let its programs be compiled elsewhere."""
    recorder: TimeRecorder = field(default_factory=TimeRecorder, compare=False, repr=False)
    """Recorder of where the time of the run goes, one for all its stages."""
    opened_conditioning: dict[str, ClipConditioning] = field(default_factory=dict, compare=False, repr=False)
    """Conditioning that is open, by name, for all its stages; see `open_conditioning`."""
    adapted: _Adapted = field(default_factory=_Adapted)
    """What the stage that is run has of its own; see `adapt`."""
    path: str = ""
    """Path from the outermost run's folder to a nested one, with a slash at its end; see `open_nested`."""

    @classmethod
    def create(cls, folder: str | Path, experiment: Experiment, *, remote: RemoteFolder | None = None) -> "Run":
        """Create a run, or open the one in this folder.

        The config of a run that has begun to train may differ in fields that do not change what is trained; see
        `amendments`. Such a change is written by `check`.

        Args:
          folder: Folder of the run.
          experiment: Its config.
          remote: Folder at an address that `folder` is a copy of.

        Raises:
          UserError: If the folder holds a run of another config or version, or something else; or other processes
            cannot import a class of the config.
        """
        folder = Path(folder)
        run = cls(folder=folder, experiment=experiment, command=get_command(), remote=remote)
        if (folder / CONFIG).is_file():
            existing = replace(cls.open(folder), remote=remote)
            old, new = (describe_stages(config_json.to_json(each.experiment)) for each in (existing, run))
            if not (changes := config_json.list_changes(old, new)):
                return existing
            if not any((folder / model).exists() for model in existing.trained_models):
                return run._write_config()  # nothing was trained yet, so that the config may still change
            amendment = make_amendment(
                folder,
                existing.experiment.denoiser_stages,
                experiment.denoiser_stages,
                changes,
                models=existing.trained_models,
                amendable=experiment.amendable_fields,
                command=run.command,
            )
            return replace(run, amendments=(*existing.amendments, amendment))
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; use a folder")
        if folder.is_dir() and any(entry.name != "clips" and entry.name[0] != "." for entry in folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no run; use another folder")
        return run._write_config()

    def _write_config(self) -> "Run":
        """Write the config, and return the run. A pipeline's config that follows from another one goes."""
        document = {
            "format": RUN_FORMAT,
            "version": __version__,
            "command": self.command,
            "experiment": config_json.to_portable_json(self.experiment),
        }
        if self.amendments:
            document["amendments"] = [amendment.to_json() for amendment in self.amendments]
        (self.folder / PIPELINE_CONFIG).unlink(missing_ok=True)
        write_json(self.folder / CONFIG, document)
        return self

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Open the run in a folder.

        Raises:
          MissingError: If the folder does not exist, or holds no run.
          UserError: If the run is of another version.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise MissingError(f"no such run: {folder} has no {CONFIG}")
        document = read_run_document(folder)
        experiment = config_json.from_json(document.get("experiment"))
        if not isinstance(experiment, Experiment):
            raise UserError(f"{folder / CONFIG} holds no experiment; start the run anew in another folder")
        amendments = tuple(map(Amendment.from_json, document.get("amendments", [])))
        return cls(folder=folder, experiment=experiment, command=str(document.get("command")), amendments=amendments)

    def train(
        self,
        *clips: StoragePathLike,
        latents: _Location = None,
        checkpoints: _Location = None,
        last: str | None = None,
    ) -> None:
        """Run all stages that are not done yet, from clips to the finished pipeline.

        Args:
          clips: Folders of clips, or data sets of `tools/ingest.py`: one, or several that are mixed.
          latents: Folder or address (`gs://…`) of the cached latents; None for the run's own folder, or the one set
            before.
          checkpoints: Folder or address of the checkpoints of all models; None as above.
          last: Name of the last stage to run; None for all.

        Raises:
          UserError: If clips cannot be used or do not fit the config, if other places for latents or checkpoints were
            set before, or if no stage has the name `last`.
          KeyboardInterrupt: After a signal, once the state is saved.
        """
        self.prepare(*clips, latents=latents, checkpoints=checkpoints)
        self.run_stages(last)

    def prepare(self, *clips: StoragePathLike, latents: _Location = None, checkpoints: _Location = None) -> None:
        """Link the clips, and check everything that can be checked before the first stage begins; see `train`.

        For a run at an address, its data set, latents and checkpoints are stored there, too, unless other places are
        given.
        """
        if latents is not None:
            self.link_latents(latents)
        if self.remote is not None and checkpoints is None and not (self.folder / "checkpoints").exists():
            checkpoints = self.remote.address / "checkpoints"
        if checkpoints is not None:
            self.link_checkpoints(checkpoints)
        self.take(*clips)
        self.check()

    def check(self, *, is_evaluated: bool = True) -> None:
        """Check everything that can be checked before the first stage begins.

        Then write the config of an amended run, and the pipeline's.

        Args:
          is_evaluated: Whether the pipeline is evaluated in the end, and not only as a part of a joined one.

        Raises:
          UserError: If clips cannot be used or do not fit the config, if a stage cannot be run, or if `evaluate` would
            refuse the sampling or the evaluation.
        """
        self.clips.select(self.experiment.data.held_out)  # raises for an unknown name
        for stage in self.stages:
            stage.check(self)
        if self.has_begun("denoiser"):
            self.check_kept_clips()
        if self.process:
            return
        is_amended = len(self.amendments) > len(Run.open(self.folder).amendments)
        config = None
        if self.experiment.denoiser_stages:
            # Until the denoiser trains, its clips may still change.
            is_new = is_amended or not self.has_begun("denoiser")
            config = self._make_pipeline_config() if is_new else self.pipeline_config()
            if is_evaluated:
                self.check_evaluation(config)
        if is_amended:
            print(f"amended: {self.amendments[-1]}", file=sys.stderr)
            self._write_config()
        if config is not None:
            if not (self.folder / PIPELINE_CONFIG).is_file() or read_pipeline_config(self.folder) != config:
                write_pipeline_config(self.folder, config)
            self._update_finished_pipeline()

    def check_evaluation(self, config: PipelineConfig) -> None:
        """Check that a pipeline of a config, which is not trained yet, can be sampled and evaluated in the end.

        Raises:
          UserError: If `evaluate` would refuse the sampling, the evaluation or the clips.
        """
        protocol = replace(self.experiment.evaluation, seed=self.experiment.seed)
        check_evaluation(config, protocol, self.evaluation_data())

    def has_begun(self, name: str) -> bool:
        """Return whether the training of a model has left a checkpoint, or the denoiser's the finished pipeline."""
        is_finished = name == "denoiser" and (self.folder / "pipeline").is_dir()
        return is_finished or bool(list_checkpoints(self.folder, name))

    def check_kept_clips(self) -> None:
        """Check that the clips are those that the run has begun to train on.

        Raises:
          UserError: If there are others, or their captions or other values that the model reads differ.
        """
        path = self.folder / PIPELINE_CONFIG
        known = read_pipeline_config(path.parent).provenance.get("clips") if path.is_file() else None
        if known is not None and known != (now := self._describe_clips()):
            raise UserError(
                f"{datasets.resolve(self.folder / 'data')} holds other clips, captions or values than the run has "
                f"trained on (number and hash of the clips are now {now}, and were {known}). {KEEP_DATA}"
            )

    def _describe_clips(self) -> str:
        """Return the number of the training clips, and a hash of all that the model reads of them."""
        clips, conditioning = self.training_clips, self.experiment.get_model().backbone.conditioning
        columns = sorted({name for each in conditioning for name in each.columns})
        values = zip(clips.column("name"), hash_inputs(clips, columns), clips.column("captions"), strict=True)
        digest = hashlib.sha256()
        for each in values:
            digest.update(repr(each).encode("utf-8", "surrogatepass"))
        return f"{len(clips)} {digest.hexdigest()[:16]}"

    def take(self, *clips: StoragePathLike) -> None:
        """Ingest folders of clips, and link to data sets that are ingested already; see `link_datasets`."""
        home = None if self.remote is None else self.remote.address / "data"
        with self.main_process_first():
            datasets.link_datasets(self.folder / "data", clips, weights=self.experiment.data.weights, home=home)

    def run_stages(self, last: str | None = None) -> None:
        """Run the stages of a prepared run that are not done yet, up to the one of the name `last`, or all."""
        if last is not None:
            self.experiment.get_stage(last)
        self.open_recorder()
        for stage in self.stages:
            with self.main_process_first():  # which finishes the stages before
                pass
            # Not in turn: all processes list the checkpoints of a training together.
            if not stage.is_done(self):
                with self.recorder.phase(f"{goodput.STAGE}{stage.name}"):
                    stage.run(self)
            if stage.name == last:
                return

    def open_nested(self, name: str, experiment: Experiment) -> "Run":
        """Return the run of another model in a folder of this one's, with its clips, devices and recorder.

        Raises:
          UserError: If the folder holds a run of another config, or something else.
        """
        folder, data = self.folder / name, datasets.resolve(self.folder / "data")
        with self.main_process_first():
            created = Run.create(folder, experiment)
            if isinstance(data, Path) and not (folder / "data").is_symlink():
                (folder / "data").symlink_to(Path("..", "data"), target_is_directory=True)  # wherever the run is moved
            datasets.link_folder(folder / "data", data)
            linked = self.folder / "checkpoints"
            if linked.is_symlink() or linked.is_dir():
                elsewhere = datasets.resolve(linked)
                own = None if self.remote is None else self.remote.address / self.path / "checkpoints"
                created.link_checkpoints(
                    elsewhere / name if elsewhere != own else elsewhere.parent / name / "checkpoints"
                )
        shared = {each: getattr(self, each) for each in ("command", "remote", "devices", "recorder", "profile")}
        return replace(created, **shared, path=f"{self.path}{name}/")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in order."""
        return self.experiment.stages

    @property
    def trained_models(self) -> tuple[str, ...]:
        """Return the names of the models that the run may train, each in a folder of its own."""
        others = (stage.name for stage in self.stages if not isinstance(stage, DenoiserTraining))
        return tuple(dict.fromkeys(("autoencoder", "denoiser", *others)))

    def adapt(
        self,
        *,
        model: ModelConfig | None = None,
        data: DataConfig | None = None,
        parallel: Parallelism | None = None,
    ) -> "Run":
        """Return the run as a stage sees it that has its own variant of the model, its own data or devices.

        `held_out` and, if it has none, `weights` of the data are the experiment's.
        """
        if data is not None:
            own = self.experiment.data
            data = replace(data, held_out=own.held_out, weights=data.weights or own.weights)
        adapted = _Adapted(model, data, parallel)
        return self if adapted == self.adapted else replace(self, adapted=adapted)

    @property
    def model(self) -> ModelConfig:
        """Return the model.

        Raises:
          UserError: If the experiment has none.
        """
        return self.adapted.model or self.experiment.get_model()

    @property
    def data(self) -> DataConfig:
        """Return the config of the data."""
        return self.adapted.data or self.experiment.data

    @property
    def parallel(self) -> Parallelism:
        """Return how the devices share the work."""
        return self.adapted.parallel or self.experiment.parallel

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Return the devices, which a run that is only read does not need."""
        return make_mesh(self.parallel, self.devices)

    @property
    def partitioner(self) -> MeshPartitioner:
        """Return what the run's models are made with to be trained on its devices."""
        return MeshPartitioner(self.mesh, self.parallel.context_attention)

    @property
    def sampling_parallelism(self) -> Parallelism | None:
        """Return how devices sample the run's models together; None for a run on one device."""
        return None if self.mesh.size == 1 else self.parallel

    @property
    def seed(self) -> int:
        """Return the seed of the run."""
        return self.experiment.seed

    @property
    def process(self) -> int:
        """Return the index of this process."""
        return jax.process_index()

    @property
    def limits(self) -> SizeLimits:
        """Return the limits on the sizes that clips are resized to."""
        return self.data.make_limits(self.model)

    @functools.cached_property
    def clips(self) -> ClipSource:
        """Return all ingested clips."""
        data = self.data
        return datasets.open_datasets(self.folder / "data", captions=data.captions, background=data.background)

    @property
    def requirements(self) -> ClipRequirements:
        """Return the requirements that every clip of the training meets."""
        return ClipRequirements() if self.experiment.model is None else self.data.make_requirements(self.model)

    @functools.cached_property
    def usable_training_clips(self) -> UsableClips:
        """Return the clips of the split `train` that the config selects and does not hold out, if they can be used.

        Raises:
          UserError: If more clips cannot be used than the config allows.
        """
        data = self.data
        all_clips = self.clips.exclude(data.held_out).select_split("train")
        clips = all_clips.select_where(data.where)
        if not len(all_clips):
            rule = f"none of the {len(self.clips)} clips is left to train on: all are held out, or of other splits"
            raise UserError(f"data.held_out is invalid: {rule}. Hold out fewer clips, or give train to some")
        if not len(clips):
            raise UserError(
                f"data.where={data.where!r} is invalid: it selects none of the {len(all_clips)} training clips. Use "
                "wider limits, and see the histograms of the columns with tools/annotate.py DATA --list."
            )
        if data.weights:
            clips = clips.select_datasets(data.used_datasets)
        selected = select_usable(clips, self.requirements)
        selected.check(data.max_excluded_share)
        return selected

    @functools.cached_property
    def usable_held_out_clips(self) -> UsableClips:
        """Return the held-out clips that the config names, without those that cannot be used.

        Without names they are the split `validation`.
        """
        held_out = self.data.held_out
        clips = self.clips.select(held_out) if held_out else self.clips.select_split("validation")
        return select_usable(clips, self.requirements)

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

    def open_recorder(self) -> TimeRecorder:
        """Return the recorder of where the time goes, which writes files in the first process."""
        if self.process == 0 and self.recorder.folder is None:
            self.recorder.folder = self.folder / goodput.GOODPUT_FOLDER
        return self.recorder

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
            name=f"{self.path}{name}",
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
            resolved_config=describe_stages(config_json.to_json(experiment)),
        )

    def link_latents(self, destination: StoragePathLike) -> None:
        """Link to a folder or an address for the cached latents, which need not exist yet.

        Raises:
          UserError: If the run has latents already, here or elsewhere, or if its config caches none.
        """
        if self.experiment.model is None or not self.experiment.data.cache_latents:
            raise UserError(f"latents={destination} is invalid: the config caches no latents; leave it out")
        datasets.link_folder(self.folder / "latents", destination, "latents")

    def link_checkpoints(self, destination: StoragePathLike) -> None:
        """Link to a folder or an address for the checkpoints, which need not exist yet.

        Raises:
          UserError: If the run has checkpoints already, here or elsewhere.
        """
        for own in sorted(self.folder.glob("*/checkpoints")):
            if datasets.resolve(own) != own.resolve() or own.is_symlink():  # that of a nested run
                continue
            name = own.parent.name
            raise UserError(f"{self.folder} has checkpoints of its {name}; leave out checkpoints={destination}")
        datasets.link_folder(self.folder / "checkpoints", destination, "checkpoints")

    def pipeline_config(self) -> PipelineConfig:
        """Return the config of this run's pipeline, which `prepare` has written, or which follows from the clips."""
        if (self.folder / PIPELINE_CONFIG).is_file():
            return self._amend(read_pipeline_config(self.folder))
        return self._make_pipeline_config()

    def _make_pipeline_config(self) -> PipelineConfig:
        """Return the config of the pipeline that follows from the clips.

        Its model is the experiment's, with the frame rate of the clips if it has none, and with the identity of a
        frozen text encoder. The largest training size is the default size of samples.
        """
        experiment, model = self.experiment, self.experiment.get_model()
        infos, encoder = self.training_clips.infos, self.open_text_encoder()
        if isinstance(encoder, FrozenTextEncoder):
            model = replace(model, text_encoder=encoder.pinned_config)
        if model.fps is None:
            rates = [info.fps for info in infos if info.frames > 1] or [info.fps for info in infos]
            model = replace(model, fps=float(np.median(rates)))
        sizes = [fit_size(info, experiment.limits) for info in infos]
        training = experiment.denoiser
        return PipelineConfig(
            model=model,
            caption_dropout=training.caption_dropout,
            boundary=None if training.expert is None else training.expert.boundary,
            batch=training.batch,
            size=max(sizes, key=lambda size: (size.volume, size)),
            sampling=experiment.sampling,
            conditioner=experiment.conditioner,
            evaluation=experiment.evaluation,
            example_prompts=_choose_examples([info.caption for info in infos]),
            provenance={
                "command": self.command,
                "experiment": experiment.name,
                "seed": str(self.seed),
                "dit_video": __version__,
                "jax": jax.__version__,
                "data": " ".join(self.clips.versions),
                "clips": self._describe_clips(),
            },
        )

    def _update_finished_pipeline(self) -> None:
        """Update the finished pipeline's config, if there is one, with amended fields that need no other weights."""
        folder = self.folder / "pipeline"
        if not (folder / PIPELINE_CONFIG).is_file():
            return
        config = read_pipeline_config(folder)
        if (amended := self._amend(config)) != config:
            write_pipeline_config(folder, amended)

    def _amend(self, config: PipelineConfig) -> PipelineConfig:
        """Return a config of the pipeline with the experiment's values of what may have changed since it was written.

        The backbone may have another attention.
        """
        experiment = self.experiment
        return replace(
            config.replace_model(backbone=experiment.get_model().backbone),
            sampling=experiment.sampling,
            conditioner=experiment.conditioner,
            evaluation=experiment.evaluation,
        )

    def make_pipeline(
        self,
        denoiser: dict[str, Any],
        *,
        parallel: Parallelism | None = None,
        offload: Offload | Literal["auto"] | None = "auto",
    ) -> Pipeline:
        """Return the pipeline with these weights of the denoiser, on several devices or on the default one.

        `offload` is described at `dit_video.load`.

        Raises:
          MissingError: If the autoencoder is not trained yet.
        """
        config, autoencoder = self.pipeline_config(), self.read_autoencoder()
        is_large = parallel is None and config.boundary is not None
        offload = fit_offload(offload, config, parallel=parallel, is_large=is_large)
        place = make_placement(parallel, offload)
        pipeline = Pipeline(
            config,
            autoencoder=autoencoder,
            denoiser=add_other_expert(self.experiment.denoiser, config.model, denoiser, place),
            get_lora_modules=get_lora_modules,
            parallel=parallel,
            offload=offload,
            folder=self.folder,
        )
        return add_preview_decoder(pipeline, Path(self.experiment.autoencoder_from or self.folder / "autoencoder"))

    def load_pipeline(self) -> Pipeline:
        """Return the finished pipeline, on the run's devices; all its processes call this.

        Raises:
          MissingError: If the run is not finished.
        """
        with self.main_process_first():  # which writes it
            pass
        return load_pipeline(
            self.folder / "pipeline",
            get_lora_modules=get_lora_modules,
            parallel=self.sampling_parallelism,
            run_folder=self.folder,
        )

    def newest_pipeline(
        self,
        *,
        step: int | None = None,
        ema: float | int | None = None,
        sigma_rel: float | None = None,
        parallel: Parallelism | None = None,
        offload: Offload | Literal["auto"] | None = "auto",
    ) -> Pipeline:
        """Return the pipeline of a checkpoint. The run may be unfinished, and its clips need not be present.

        Args:
          step: Step of the checkpoint, see `list_checkpoints`; None for the newest that can be read.
          ema: Decay of the average, 0 for the weights themselves; the config's `ema_decay` if None.
          sigma_rel: Relative width of an average that is reconstructed from snapshots.
          parallel: Devices that sample together, to which the weights are read; None for the default one.
          offload: Weights in host memory; see `dit_video.load`.

        Raises:
          MissingError: If the run has no checkpoint of this step, no snapshots, or no trained autoencoder.
          UserError: If the denoiser has no checkpoint yet, the average was not kept, or `ema` and `sigma_rel` are both
            given.
        """
        mesh = make_mesh(Parallelism(), jax.local_devices()[:1]) if parallel is None else make_mesh(parallel)
        if (checkpoints := self.open_checkpoints("denoiser")).latest() is None:
            raise UserError(f"{self.folder} has no checkpoint of its denoiser yet; continue it with: {self.command}")
        params = load_checkpoint(
            checkpoints,
            self.experiment.denoiser,
            self.experiment.get_model(),
            self.folder / "denoiser",
            mesh,
            step=step,
            ema=ema,
            sigma_rel=sigma_rel,
        )
        return self.make_pipeline(params, parallel=parallel, offload=offload)

    def open_text_encoder(self, *, cache: Path | None = None) -> Tokenizer | FrozenTextEncoder:
        """Return the text encoder. The identity of a frozen one is recorded, to be known without its weights."""
        return open_tokenizer(self.model.text_encoder, identity_file=self.folder / TEXT_ENCODER_FILE, cache=cache)

    def open_conditioning(self, autoencoder_params: dict[str, Any] | None = None) -> tuple[ClipConditioning, ...]:
        """Return the model's conditioning by fields of the clips, each opened once in the run's folder.

        Args:
          autoencoder_params: Parameters of the trained autoencoder, which some conditioning needs to compute values.
        """
        conditioning = {each.field.name: each for each in self.model.backbone.conditioning}
        for name in conditioning.keys() - self.opened_conditioning:
            self.opened_conditioning[name] = conditioning[name].open(self.folder)
        opened = tuple(self.opened_conditioning[name] for name in conditioning)
        if autoencoder_params is None:
            return opened
        codec = LatentCodec(self.model.autoencoder, autoencoder_params)
        return tuple(each.use_codec(codec) for each in opened)

    def read_autoencoder(self) -> dict[str, Any]:
        """Read the parameters of the autoencoder.

        Raises:
          MissingError: If the autoencoder is not trained yet, or if its folder does not exist or lacks files.
          UserError: If the weights cannot be read, or are of another autoencoder.
        """
        return read_autoencoder(
            self.model.autoencoder,
            self.folder,
            pretrained=self.experiment.autoencoder_from,
            is_trained=self.experiment.autoencoder is not None,
            command=self.command,
        )

    def codec(self) -> LatentCodec:
        """Return the trained autoencoder.

        Raises:
          MissingError: If the autoencoder is not trained yet.
        """
        return LatentCodec(self.model.autoencoder, self.read_autoencoder())

    def evaluate(
        self,
        protocol: EvaluationProtocol | None = None,
        *,
        pipeline: Pipeline | None = None,
        folder: str | Path | None = None,
        data: EvaluationData | None = None,
        sampling: Sampling | None = None,
    ) -> EvaluationResult:
        """Evaluate the finished run on its devices: samples, reconstructions and metrics; all its processes call this.

        Args:
          protocol: What is sampled and measured; by default what the experiment says, with the experiment's seed.
          pipeline: Pipeline of the run; by default it is loaded.
          folder: Folder of the results, whose older samples are replaced; the run's own by default.
          data: Clips; by default those of `evaluation_data`.
          sampling: Steps, solver and guidance; the pipeline's own by default.

        Raises:
          MissingError: If the run is not finished.
          UserError: If `dit_video.evaluation.evaluate.evaluate` raises it.
        """
        if protocol is None:
            protocol = replace(self.experiment.evaluation, seed=self.experiment.seed)
        return evaluate(
            self.load_pipeline() if pipeline is None else pipeline,
            protocol,
            self.folder if folder is None else folder,
            data=self.evaluation_data() if data is None else data,
            sampling=sampling,
            replace_samples=True,
            share=None if self.remote is None else self.main_process_first,
        )

    def evaluation_data(self) -> EvaluationData:
        """Return the clips on which the trained models are evaluated."""
        held_out, training = (
            make_fitted_set(clips, self.limits, location=location)
            for clips, location in ((self.held_out_clips, "held-out clips"), (self.training_clips, "training clips"))
        )
        return EvaluationData(held_out, training, self.linear_baseline)

    def linear_baseline(self) -> LinearAutoencoder | None:
        """Return the best linear autoencoder with as many latent values, as a baseline.

        Returns:
          None where a patch has too many values for it, or where the autoencoder is pretrained.
        """
        training, model = self.experiment.autoencoder, self.model.autoencoder
        if training is None or 3 * model.stride.volume > MAX_LINEAR_VALUES:
            return None
        crops = ClipCrops(self.training_clips, limit_windows(training, self.limits))
        windows = TrainingWindows(self.folder / "autoencoder", training, crops, self.seed)
        return windows.fit_linear(stride=model.stride, channels=model.channels)
