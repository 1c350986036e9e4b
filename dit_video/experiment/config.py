"""Config of a run, checked across its parts before anything is computed."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from dit_video.autoencoders import latent_grid
from dit_video.backbones.checks import check_frame_conditioning
from dit_video.core.errors import UserError
from dit_video.data.sizes import SizeLimits
from dit_video.diffusion import LearnedVariance
from dit_video.distributed import MeshConfig
from dit_video.evaluation.config import CaptionEvaluation, Evaluation
from dit_video.experiment.training_config import (
    AutoencoderTraining,
    DataConfig,
    DenoiserTraining,
    PretrainedAutoencoder,
    Stage,
)
from dit_video.features.lpips import MIN_SIDE as LPIPS_SMALLEST
from dit_video.generation import Sampling
from dit_video.pipelines.config import check_classes
from dit_video.text import ByteEncoderConfig
from dit_video.tokens import Grid
from dit_video.training.checkpoint_policy import CheckpointPolicy
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.training.optim.optimizer import OptimizerConfig, make_learning_rate_schedule


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Config of a run, from clips to samples.

    Raises:
      UserError: Values that are out of range or inconsistent.
    """

    name: str
    data: DataConfig
    autoencoder: AutoencoderTraining | PretrainedAutoencoder
    denoiser: DenoiserTraining
    earlier: tuple[Stage, ...] = ()
    """Stages of the denoiser's training before the last one, which `data` and `denoiser` describe: such as on images,
    then on small clips. Samples have the sizes of the last stage."""
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=CaptionEvaluation)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    preemption_grace: float = 300.0
    """Maximum number of seconds from SIGTERM or Ctrl-C to the end of the process; preempted machines often have 30."""
    max_consecutive_skips: int = 10
    """Number of consecutive steps, skipped because of a non-finite loss or gradient, after which the run ends."""
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    """Monitoring of the denoiser's training."""
    keep: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    """Policy for preserving checkpoints."""

    def __post_init__(self):
        self._check_numbers()
        self._check_models()
        self._check_sizes()
        self._check_stages()

    def _check_numbers(self) -> None:
        positive = {
            "denoiser.steps": self.denoiser.steps,
            "denoiser.batch": self.denoiser.batch,
            "dit.layers": self.denoiser.dit.layers,
            "dit.patch": min(self.denoiser.dit.patch),
            "rows.segments": self.denoiser.rows.segments,
            "data.clips_per_video": self.data.clips_per_video,
            "data.resolutions": min(self.data.resolutions, default=1),
            "log_every": self.log_every,
            "save_every": self.save_every,
            "max_consecutive_skips": self.max_consecutive_skips,
            "preemption_grace": self.preemption_grace,
            "denoiser.accumulation_steps": self.denoiser.accumulation_steps,
        }
        if isinstance(self.autoencoder, AutoencoderTraining):
            positive["autoencoder.steps"] = self.autoencoder.steps
        for name, value in positive.items():
            if value < 1:
                raise UserError(f"{name}={value} is invalid: it must be at least 1. Use {name}=1 or more.")
        trainings = [part for part in (self.autoencoder, self.denoiser) if not isinstance(part, PretrainedAutoencoder)]
        for training in trainings:
            make_learning_rate_schedule(training.optimizer, steps=training.steps)
            if not 0 <= training.ema_decay < 1:
                raise UserError(f"ema_decay={training.ema_decay} is invalid: it must lie in [0, 1).")
        self._check_training()
        self._check_parts()
        if not 0 <= self.denoiser.caption_dropout <= 1:
            raise UserError(f"caption_dropout={self.denoiser.caption_dropout} is invalid: it must lie in [0, 1].")
        if not all(0 < weight < math.inf for weight in self.data.weights):
            raise UserError(f"weights={self.data.weights} is invalid: they must be positive. Leave out unwanted sets.")
        cached = self.data.clips_per_video > 1 or self.data.resolutions or self.data.flips
        if cached and not self.data.cache_latents:
            options = "data.clips_per_video, data.resolutions and data.flips"
            raise UserError(f"{options} need cached latents. Leave them out, or set data.cache_latents=True.")
        if self.denoiser.buckets is not None and (self.data.cache_latents or self.data.weights):
            fix = "Set data.cache_latents=False, and leave out data.weights."
            raise UserError(f"denoiser.buckets are read from video files, without weights of data sets. {fix}")
        if self.data.workers < 0:
            raise UserError(f"workers={self.data.workers} is invalid: it must not be negative.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is invalid: it must be a whole number from 0 to {2**32 - 1}.")

    def _check_parts(self) -> None:
        denoiser, parts = self.denoiser, self.denoiser.accumulation_steps
        used = self.monitoring.validate_every, parts > 1
        for option, is_used in zip(("monitoring.validate_every", "denoiser.accumulation_steps"), used, strict=True):
            if is_used and (denoiser.buckets is not None or denoiser.distillation is not None):
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
        if denoiser.lora is not None and denoiser.init_from is None:
            raise UserError("denoiser.lora needs pretrained weights. Set denoiser.init_from to their folder.")
        if denoiser.lora is not None and denoiser.train_mode != "full":
            raise UserError(f"denoiser.lora trains adapters. Leave out lora, or train_mode={denoiser.train_mode!r}.")
        if denoiser.distillation is not None:
            self._check_distillation()
        if denoiser.train_mode == "temporal" and denoiser.optimizer.trainable:
            raise UserError("denoiser.train_mode='temporal' selects what is trained. Leave optimizer.trainable empty.")

    def _check_distillation(self) -> None:
        denoiser = self.denoiser
        if denoiser.init_from is None:
            raise UserError("denoiser.distillation needs a teacher. Set denoiser.init_from to its folder.")
        has_other_mode = denoiser.lora is not None or denoiser.train_mode != "full"
        for is_invalid, rule in (
            (has_other_mode, "trains all weights. Leave out lora and train_mode"),
            (denoiser.expert is not None, "trains one model for all times. Leave out expert"),
            (denoiser.frame_conditioning is not None, "has no frame conditioning. Leave out frame_conditioning"),
        ):
            if is_invalid:
                raise UserError(f"denoiser.distillation {rule}, or leave out distillation.")

    def _check_models(self) -> None:
        model, denoiser = self.autoencoder.model, self.denoiser
        if model.channels > 3 * model.stride.volume:
            raise UserError(
                f"autoencoder channels={model.channels} is invalid: a patch of {tuple(model.stride)} pixels has only "
                f"{3 * model.stride.volume} values. Use fewer channels or a larger stride."
            )
        if denoiser.dit.channels != model.channels:
            rule = f"the autoencoder has {model.channels} channels. Use dit.channels={model.channels}."
            raise UserError(f"dit.channels={denoiser.dit.channels} is invalid: {rule}")
        check_classes(denoiser.text, denoiser.dit)
        if denoiser.dit.context_width != denoiser.text.width:
            rule = f"the text encoder has width {denoiser.text.width}. Use dit.context_width={denoiser.text.width}."
            raise UserError(f"dit.context_width={denoiser.dit.context_width} is invalid: {rule}")
        if denoiser.text.max_tokens > denoiser.rows.text:
            raise UserError(
                f"text.max_tokens={denoiser.text.max_tokens} is invalid: a row has space for {denoiser.rows.text} text "
                f"tokens. Use text.max_tokens={denoiser.rows.text} or less."
            )
        if isinstance(denoiser.text, ByteEncoderConfig) and (rest := denoiser.rows.text % denoiser.text.patch):
            raise UserError(
                f"rows.text={denoiser.rows.text} is invalid: it is not divisible by the text encoder's patch of "
                f"{denoiser.text.patch} bytes. Use rows.text={denoiser.rows.text - rest}."
            )
        limit = denoiser.dit.max_text_tokens
        if limit is not None and denoiser.text.max_tokens > limit:
            raise UserError(
                f"text.max_tokens={denoiser.text.max_tokens} is invalid: the denoiser accepts captions of up to "
                f"{limit} tokens. Use text.max_tokens={limit} or less."
            )
        self._check_conditioning()

    def _check_conditioning(self) -> None:
        """Raise if conditioning, times or variance do not fit the denoiser."""
        dit = self.denoiser.dit
        if self.denoiser.time_per == "frame" and dit.time != "token":
            raise UserError("time_per='frame' needs a denoiser with time='token'. Set dit.time, or time_per='clip'.")
        learned = isinstance(self.denoiser.objective.prediction, LearnedVariance)
        if learned != dit.predicts_variance:
            raise UserError(
                "variance='predicted' of the denoiser and a LearnedVariance prediction of the objective need each "
                "other. Change one of the two."
            )
        frames, image_encoder = self.denoiser.frame_conditioning, self.denoiser.image_encoder
        check_frame_conditioning(dit, self.autoencoder.model, frames, image_encoder, cached=self.data.cache_latents)

    def _check_sizes(self) -> None:
        denoiser = self.denoiser
        if denoiser.dit.patch.t != 1:
            rule = "it divides no clip, because the first latent frame is encoded on its own. Use dit.patch.t=1."
            raise UserError(f"dit.patch.t={denoiser.dit.patch.t} is invalid: {rule}")
        self._check_fits("max_frames", Grid(self.data.max_frames, *self._size_multiple[1:]))
        if isinstance(self.autoencoder, AutoencoderTraining):
            self._check_windows(self.autoencoder, self.window_limits)
        max_tokens = self._count_max_clip_tokens()
        if max_tokens > denoiser.rows.tokens:
            raise UserError(
                f"rows.tokens={denoiser.rows.tokens} is invalid: a clip of {self.data.max_pixels} pixels and "
                f"{self.data.max_frames} frames has up to {max_tokens} tokens. Use rows.tokens={max_tokens}, or a "
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

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.earlier]
        for stage in self.earlier:
            if not re.fullmatch(r"[\w.-]+", stage.name) or names.count(stage.name) > 1:
                rule = "it must be a folder name of letters, digits and _.- that no other stage has."
                raise UserError(f"stage name={stage.name!r} is invalid: {rule}")
            if stage.data.held_out or stage.data.weights:
                raise UserError(f"stage {stage.name}: held_out and weights apply to all stages. Set them in data.")
            if stage.optimizer is not None:
                self._check_optimizer_state(stage.name, stage.optimizer)
        for number, stage in enumerate(self.earlier):
            try:
                self.get_stage(number)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from error
        if self.earlier and self.denoiser.distillation is not None:
            raise UserError("denoiser.distillation takes a single stage. Leave out earlier, or leave out distillation.")

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

    def get_stage(self, index: int) -> "Experiment":
        """Return one stage as an experiment of its own; the last stage comes after all `earlier` ones."""
        if index == len(self.earlier):
            return dataclasses.replace(self, earlier=())
        stage = self.earlier[index]
        data = dataclasses.replace(stage.data, held_out=self.data.held_out, weights=self.data.weights)
        names = ("steps", "rows", "batch", "optimizer", "objective", "frame_conditioning", "caption_dropout")
        overrides: dict[str, Any] = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
        autoencoder = self.autoencoder
        if isinstance(autoencoder, AutoencoderTraining):  # it is trained before the first stage, so its sizes are kept
            limits = self.window_limits
            autoencoder = dataclasses.replace(autoencoder, max_pixels=limits.max_pixels, max_frames=limits.max_frames)
        denoiser, mesh = dataclasses.replace(self.denoiser, **overrides), stage.mesh or self.mesh
        return dataclasses.replace(self, autoencoder=autoencoder, data=data, denoiser=denoiser, mesh=mesh, earlier=())

    @property
    def _size_multiple(self) -> Grid:
        stride, patch = self.autoencoder.model.stride, self.denoiser.dit.patch
        return Grid(stride.t, stride.h * patch.h, stride.w * patch.w)

    def _count_max_clip_tokens(self) -> int:
        """Return the number of tokens of the largest clip within the limits."""
        multiple = self._size_multiple
        latents = latent_grid(Grid(self.data.max_frames, *multiple[1:]), self.autoencoder.model.stride)
        return latents.t * (self.data.max_pixels // (multiple.h * multiple.w))

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
