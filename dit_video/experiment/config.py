"""Config of a run, checked across its parts before anything is computed."""

import dataclasses
import functools
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError, check_at_least
from dit_video.data.latents.plan import Augmentations
from dit_video.data.sizes import SizeLimits
from dit_video.data.usable_clips import ClipRequirements
from dit_video.diffusion import LearnedVariance
from dit_video.evaluation.config import CaptionEvaluation, Evaluation
from dit_video.experiment.runtime import StagedExperiment, check_names
from dit_video.experiment.training_config import (
    AutoencoderTraining,
    CurriculumStage,
    DenoiserTraining,
    PretrainedAutoencoder,
    Student,
    TemporalWeights,
)
from dit_video.models.autoencoders import latent_grid
from dit_video.models.backbones.protocol import BackboneConfig, check_frame_conditioning
from dit_video.models.encoders import ByteEncoderConfig, FrozenTextConfig
from dit_video.models.features.lpips import MIN_SIDE as LPIPS_SMALLEST
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import check_classes
from dit_video.tokens import Canvas, CanvasShape, Grid, PackedRows, PackedShape, compute_token_grid
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.training.optim.optimizer import OptimizerConfig, make_learning_rate_schedule

_AMENDABLE_FIELDS = (
    "autoencoder.model.form",
    "autoencoder.model.remat",
    "autoencoder.steps",
    "curriculum[].data.max_excluded_share",
    "curriculum[].data.workers",
    "curriculum[].mesh",
    "curriculum[].steps",
    "denoiser.accumulation_steps",
    "denoiser.backbone.attention",
    "denoiser.backbone.remat",
    "denoiser.steps",
    "denoiser.conditioner",
    "evaluation",
    "monitoring",
    "sampling",
)
"""Fields that may change after the run has begun, besides the base class's; see `amendable_fields`."""


@dataclass(frozen=True, kw_only=True)
class Experiment(StagedExperiment):
    """Config of a run from clips to samples: its stages train an autoencoder, then a denoiser on its latents.

    `stages` of other packages come after the autoencoder's training and before the denoiser's stages.

    Raises:
      UserError: If values are out of range or inconsistent.
    """

    autoencoder: AutoencoderTraining | PretrainedAutoencoder
    denoiser: DenoiserTraining
    curriculum: tuple[CurriculumStage, ...] = ()
    """Stages that the denoiser is trained in first, such as on images, then on small clips. They lead to the last one,
    which `data` and `denoiser` describe; samples have its sizes."""
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=CaptionEvaluation)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """Monitoring of the trainings."""

    def __post_init__(self):
        super().__post_init__()
        self._check_numbers()
        self._check_training()
        self._check_accumulation()
        self._check_data()
        self._check_models()
        self._check_conditioning()
        self._check_sizes()
        self._check_curriculum()

    def _check_numbers(self) -> None:
        positive = {
            "denoiser.steps": self.denoiser.steps,
            "denoiser.batch": self.denoiser.batch,
            "backbone.layers": self.denoiser.backbone.layers,
            "backbone.patch": min(self.denoiser.backbone.patch),
            "layout.segments": self.denoiser.row_shape.segments,
            "denoiser.accumulation_steps": self.denoiser.accumulation_steps,
        }
        if isinstance(self.autoencoder, AutoencoderTraining):
            positive["autoencoder.steps"] = self.autoencoder.steps
        check_at_least(1, **positive)
        trainings = [part for part in (self.autoencoder, self.denoiser) if not isinstance(part, PretrainedAutoencoder)]
        for training in trainings:
            make_learning_rate_schedule(training.optimizer, steps=training.steps)
            if not 0 <= training.ema_decay < 1:
                raise UserError(f"ema_decay={training.ema_decay} is invalid: it must lie in [0, 1).")
        if not 0 <= self.denoiser.caption_dropout <= 1:
            raise UserError(f"caption_dropout={self.denoiser.caption_dropout} is invalid: it must lie in [0, 1].")

    def _check_data(self) -> None:
        needs_cache = self.data.clips_per_video > 1 or self.data.resolutions or self.data.flips
        if needs_cache and not self.data.cache_latents:
            options = "data.clips_per_video, data.resolutions and data.flips"
            raise UserError(f"{options} need cached latents. Leave them out, or set data.cache_latents=True.")
        if self.denoiser.buckets is not None and (self.data.cache_latents or self.data.weights):
            fix = "Set data.cache_latents=False, and leave out data.weights."
            raise UserError(f"denoiser.buckets are read from video files, without weights of data sets. {fix}")

    def _check_accumulation(self) -> None:
        denoiser, parts = self.denoiser, self.denoiser.accumulation_steps
        used = self.monitoring.validate_every, parts > 1
        for option, is_used in zip(("monitoring.validate_every", "denoiser.accumulation_steps"), used, strict=True):
            if is_used and (denoiser.buckets is not None or isinstance(denoiser.train, Student)):
                raise UserError(f"{option} needs packed rows and no distillation. Leave it out.")
        if denoiser.batch % parts:
            raise UserError(f"batch={denoiser.batch} is not divisible by accumulation_steps={parts}. Use a multiple.")

    def _check_training(self) -> None:
        if isinstance(self.autoencoder, AutoencoderTraining):
            adversarial = self.autoencoder.loss.adversarial
            if adversarial is not None and adversarial.start_step >= self.autoencoder.steps:
                raise UserError(
                    f"adversarial.start_step={adversarial.start_step} is invalid: the autoencoder is trained for only "
                    f"{self.autoencoder.steps} steps. Start earlier, or leave out adversarial."
                )
        denoiser = self.denoiser
        if isinstance(denoiser.train, Student) and denoiser.frame_conditioning is not None:
            raise UserError("train=Student has no frame conditioning. Leave out frame_conditioning, or use AllWeights.")
        if isinstance(denoiser.train, TemporalWeights) and denoiser.optimizer.trainable:
            raise UserError("train=TemporalWeights selects what is trained. Leave optimizer.trainable empty.")

    def _check_models(self) -> None:
        model, denoiser = self.autoencoder.model, self.denoiser
        if model.channels > 3 * model.stride.volume:
            raise UserError(
                f"autoencoder channels={model.channels} is invalid: a patch of {tuple(model.stride)} pixels has only "
                f"{3 * model.stride.volume} values. Use fewer channels or a larger stride."
            )
        check_classes(denoiser.text, denoiser.backbone)
        for name, required, owner in (
            ("channels", model.channels, "autoencoder has channels"),
            ("context_width", denoiser.text.width, "text encoder has width"),
        ):
            if (value := getattr(denoiser.backbone, name)) != required:
                rule = f"the {owner}={required}. Use backbone.{name}={required}."
                raise UserError(f"backbone.{name}={value} is invalid: {rule}")
        room, limit = denoiser.row_shape.text, denoiser.backbone.max_text_tokens
        for count, rule in ((room, "a row has space for"), (limit, "the denoiser accepts captions of up to")):
            if count is not None and denoiser.text.max_tokens > count:
                raise UserError(
                    f"text.max_tokens={denoiser.text.max_tokens} is invalid: {rule} {count} text tokens. Use "
                    f"text.max_tokens={count} or less."
                )
        if isinstance(denoiser.text, ByteEncoderConfig) and (rest := room % denoiser.text.patch):
            raise UserError(
                f"layout.text={room} is invalid: it is not divisible by the text encoder's patch of "
                f"{denoiser.text.patch} bytes. Use layout.text={room - rest}."
            )

    def _check_conditioning(self) -> None:
        """Raise if conditioning, times or variance do not fit the denoiser."""
        backbone = self.denoiser.backbone
        if self.denoiser.time_per == "frame" and backbone.time != "token":
            raise UserError(
                "time_per='frame' needs a denoiser with time='token'. Set backbone.time, or time_per='clip'."
            )
        learned = isinstance(self.denoiser.objective.prediction, LearnedVariance)
        if learned != backbone.predicts_variance:
            raise UserError(
                "variance='predicted' of the denoiser and a LearnedVariance prediction of the objective need each "
                "other. Change one of the two."
            )
        if backbone.conditioning and (isinstance(self.denoiser.train, Student) or not self.data.cache_latents):
            names = ", ".join(each.field.name for each in backbone.conditioning)
            raise UserError(
                f"conditioning ({names}) needs cached latents and no distillation; set data cache_latents=True"
            )
        frames, image_encoder = self.denoiser.frame_conditioning, self.denoiser.image_encoder
        if frames is not None and frames.has_mask_mix and self.denoiser.buckets is not None:
            raise UserError("frame_conditioning.masks need packed rows. Use layout=PackedShape(...).")
        check_frame_conditioning(
            backbone, self.autoencoder.model, frames, image_encoder, cached=self.data.cache_latents
        )

    def _check_sizes(self) -> None:
        denoiser = self.denoiser
        if denoiser.backbone.patch.t != 1:
            rule = "it does not divide an image, which has one latent frame. Use backbone.patch.t=1."
            raise UserError(f"backbone.patch.t={denoiser.backbone.patch.t} is invalid: {rule}")
        self._check_fits("max_frames", Grid(self.data.max_frames, *self._size_multiple[1:]))
        if isinstance(self.autoencoder, AutoencoderTraining):
            self._check_windows(self.autoencoder, self.window_limits)
        self._check_layout(denoiser.backbone, denoiser.row_shape)

    def _check_layout(self, backbone: BackboneConfig, shape: PackedShape | CanvasShape) -> None:
        """Raise if the backbone does not accept the layout, or if a row cannot hold the largest clip."""
        if PackedRows not in backbone.layouts and isinstance(shape, PackedShape):
            raise UserError(
                f"layout={shape} is invalid: {type(backbone).__name__} takes canvases. Use CanvasShape(...)."
            )
        if Canvas not in backbone.layouts and isinstance(shape, CanvasShape):
            raise UserError(f"layout={shape} is invalid: {type(backbone).__name__} takes rows. Use PackedShape(...).")
        if isinstance(shape, CanvasShape):
            multiple, padding = tuple(backbone.size_multiple), tuple(backbone.canvas_padding)
            if any(side % unit for side, unit in zip(shape.cell, multiple, strict=True)):
                rule = f"it must be a multiple of the backbone's lowest resolution. Use {multiple}."
                raise UserError(f"layout.cell={tuple(shape.cell)} is invalid: {rule}")
            if any(side < reach for side, reach in zip(shape.padding, padding, strict=True)):
                rule = f"clips must lie as far apart as convolutions reach. Use {padding}."
                raise UserError(f"layout.padding={tuple(shape.padding)} is invalid: {rule}")
            return
        if (max_tokens := self.count_max_clip_tokens()) > shape.tokens:
            raise UserError(
                f"layout.tokens={shape.tokens} is invalid: a clip of {self.data.max_pixels} pixels and "
                f"{self.data.max_frames} frames has up to {max_tokens} tokens. Use layout.tokens={max_tokens}, or a "
                "lower data.max_pixels."
            )

    def _check_fits(self, name: str, size: Grid) -> None:
        try:
            latent_grid(size, self.autoencoder.model.stride)
        except UserError as error:
            raise UserError(f"{name} does not fit the autoencoder: {error}") from error

    def _check_windows(self, training: AutoencoderTraining, limits: SizeLimits) -> None:
        if not training.windows:
            raise UserError("autoencoder.windows is empty: training needs at least one window shape.")
        for window in training.windows:
            self._check_fits("window", window.size)
        adversarial = training.loss.adversarial
        smallest = min(min(window.size[1:]) for window in training.windows)
        if adversarial is not None and smallest < 2**adversarial.layers:
            raise UserError(
                f"adversarial.layers={adversarial.layers} is invalid: a discriminator of this depth needs windows of "
                f"{2**adversarial.layers} pixels or more, but one has {smallest}. Use fewer layers or larger windows."
            )
        if training.loss.lpips and smallest < LPIPS_SMALLEST:
            raise UserError(f"LPIPS needs windows of {LPIPS_SMALLEST} pixels or more, not {smallest}. Use larger ones.")
        for window in training.windows:
            t, h, w = window.size
            if t > limits.max_frames or h * w > limits.max_pixels:
                raise UserError(
                    f"a window of {t}x{h}x{w} is larger than any clip of {limits.max_frames} frames of "
                    f"{limits.max_pixels} pixels. Use a smaller window, or raise max_frames or max_pixels."
                )

    def _check_curriculum(self) -> None:
        check_names([*(stage.name for stage in self.stages), *(stage.name for stage in self.curriculum)])
        for stage in self.curriculum:
            if stage.data.held_out:
                raise UserError(f"stage {stage.name}: held_out applies to all stages. Set it in data.")
            if self.data.weights and stage.data.weights and len(self.data.weights) != len(stage.data.weights):
                numbers = f"{len(stage.data.weights)} data sets, the experiment {len(self.data.weights)}"
                raise UserError(f"stage {stage.name}: data.weights weighs {numbers}. Give each data set one weight.")
            if stage.optimizer is not None:
                self._check_optimizer_state(stage.name, stage.optimizer)
        for number, stage in enumerate(self.curriculum):
            try:
                self.get_stage(number)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from error
        if self.curriculum and isinstance(self.denoiser.train, Student):
            raise UserError("train=Student takes a single stage. Leave out curriculum, or use AllWeights.")

    def _check_optimizer_state(self, stage_name: str, optimizer: OptimizerConfig) -> None:
        """Raise if the state of a stage's optimizer cannot be carried over to the last stage."""
        last = self.denoiser.optimizer
        for field_name in ("kind", "muon_patterns", "trainable", "frozen"):
            value, last_value = getattr(optimizer, field_name), getattr(last, field_name)
            if value != last_value:
                raise UserError(
                    f"stage {stage_name}: optimizer.{field_name}={value!r} is invalid: the last one has "
                    f"{last_value!r}, and its state could not be carried over. Use the same for all stages."
                )

    @property
    def amendable_fields(self) -> tuple[str, ...]:
        fields = (*super().amendable_fields, *_AMENDABLE_FIELDS)
        if self.denoiser.buckets is None:
            return fields
        # Batches of buckets have as many clips as fit into the memory of the mesh's devices.
        return tuple(field for field in fields if field not in ("mesh", "curriculum[].mesh"))

    def replace_backbone(self, **changes: Any) -> "Experiment":
        """Return the experiment with other fields of the denoiser's architecture, such as its attention."""
        denoiser = dataclasses.replace(self.denoiser, backbone=self.denoiser.backbone.replace(**changes))
        return dataclasses.replace(self, denoiser=denoiser)

    def get_stage(self, index: int) -> "Experiment":
        """Return a stage of the denoiser as an experiment of its own; the last one comes after the curriculum."""
        if index == len(self.curriculum):
            return dataclasses.replace(self, curriculum=())
        stage = self.curriculum[index]
        weights = stage.data.weights or self.data.weights
        data = dataclasses.replace(stage.data, held_out=self.data.held_out, weights=weights)
        names = ("steps", "layout", "batch", "optimizer", "objective", "frame_conditioning", "caption_dropout")
        overrides: dict[str, Any] = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
        autoencoder = self.autoencoder
        if isinstance(autoencoder, AutoencoderTraining):  # it is trained before the first stage, so its sizes are kept
            limits = self.window_limits
            autoencoder = dataclasses.replace(autoencoder, max_pixels=limits.max_pixels, max_frames=limits.max_frames)
        denoiser, mesh = dataclasses.replace(self.denoiser, **overrides), stage.mesh or self.mesh
        return dataclasses.replace(
            self, autoencoder=autoencoder, data=data, denoiser=denoiser, mesh=mesh, curriculum=()
        )

    @property
    def _size_multiple(self) -> Grid:
        stride, multiple = self.autoencoder.model.stride, self.denoiser.backbone.size_multiple
        return Grid(stride.t, stride.h * multiple.h, stride.w * multiple.w)

    def count_max_clip_tokens(self) -> int:
        """Return the number of tokens of the largest clip within the limits."""
        patch, stride = self.denoiser.backbone.patch, self.autoencoder.model.stride
        latents = latent_grid(Grid(self.data.max_frames, *self._size_multiple[1:]), stride)
        return latents.t * (self.data.max_pixels // (stride.h * patch.h * stride.w * patch.w))

    @property
    def limits(self) -> SizeLimits:
        """Return the limits on the sizes that clips are resized to."""
        data, multiple = self.data, self._size_multiple
        return SizeLimits(max_pixels=data.max_pixels, max_frames=data.max_frames, multiple=multiple, fps=data.fps)

    @property
    def window_limits(self) -> SizeLimits:
        """Return the limits on the sizes that clips are resized to before windows for the autoencoder are cut."""
        training, limits = self.autoencoder, self.limits
        if isinstance(training, PretrainedAutoencoder):
            return limits
        max_pixels, max_frames = training.max_pixels or limits.max_pixels, training.max_frames or limits.max_frames
        return dataclasses.replace(limits, max_pixels=max_pixels, max_frames=max_frames)

    @property
    def requirements(self) -> ClipRequirements:
        """Return the requirements of the denoiser's training on its clips.

        Packed rows have room for every clip within the limits, and buckets crop clips. Embeddings of a frozen encoder
        are cut to the room for text.
        """
        text, shape = self.denoiser.text, self.denoiser.layout
        room = self.denoiser.row_shape.text
        augmentations = Augmentations(resolutions=self.data.resolutions if self.data.cache_latents else ())
        return ClipRequirements(
            limits=augmentations.list_limits(self.limits),
            has_room=functools.cache(self._has_room) if isinstance(shape, CanvasShape) else None,
            tokenize=None if isinstance(text, FrozenTextConfig) else text.make_tokenizer(),
            max_text=room if self.denoiser.buckets is None else min(room, text.max_tokens),
        )

    def _has_room(self, size: Grid) -> bool:
        """Return whether a row or canvas has room for a clip of this training size."""
        latents = latent_grid(size, self.autoencoder.model.stride)
        return self.denoiser.row_shape.fits([compute_token_grid(latents, self.denoiser.backbone.patch)], [0])


def load_experiment(path: str | Path) -> StagedExperiment:
    """Return the `EXPERIMENT` of a config file, which may import its neighbours by the name of their folder.

    Raises:
      MissingError: If the file does not exist.
      UserError: If it is not a `.py` file, or defines no `EXPERIMENT`.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"config {path} does not exist; use a file such as experiments/configs/clips.py")
    if path.suffix != ".py":
        raise UserError(f"config {path} is not a Python file; use a file such as experiments/configs/clips.py")
    if (folder := str(path.resolve().parents[1])) not in sys.path:
        sys.path.append(folder)
    experiment = runpy.run_path(str(path)).get("EXPERIMENT")
    if not isinstance(experiment, StagedExperiment):
        raise UserError(f"{path} defines no EXPERIMENT; assign it an Experiment(...)")
    return experiment
