"""The config of a run, checked across its parts before anything is computed."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from dit_video.autoencoders import latent_grid
from dit_video.backbones.dit import DitConfig
from dit_video.backbones.given_frames import check_given_frames
from dit_video.backbones.wan import WanDitConfig
from dit_video.core.errors import UserError
from dit_video.data.sizes import SizeLimits
from dit_video.diffusion import LearnedVariance
from dit_video.distributed import MeshConfig
from dit_video.evaluation.config import CaptionEvaluation, Evaluation
from dit_video.experiment.training_config import AutoencoderTraining, Data, DenoiserTraining, GivenAutoencoder, Stage
from dit_video.features.lpips import SMALLEST as LPIPS_SMALLEST
from dit_video.generation import Sampling
from dit_video.pipelines.config import check_classes
from dit_video.text import ByteEncoderConfig
from dit_video.tokens import Grid
from dit_video.training.checkpoint_policy import Keep
from dit_video.training.hooks.writers import Monitoring
from dit_video.training.optim.optimizer import OptimizerConfig, learning_rates


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run, from clips to samples.

    Raises:
      UserError: parts that disagree.
    """

    name: str
    data: Data
    autoencoder: AutoencoderTraining | GivenAutoencoder
    denoiser: DenoiserTraining
    earlier: tuple[Stage, ...] = ()
    """stages of the denoiser's training before the one that `data` and `denoiser` describe, such as of images, then of
    small clips; that one is the last, and its sizes are what is sampled"""
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=CaptionEvaluation)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    stop_within: float = 300.0
    """Seconds from SIGTERM or Ctrl-C to the end of the process, at most. Preempted machines have less: 30 are usual."""
    most_skipped: int = 10
    """Steps whose loss or gradient is not finite are skipped; after so many in a row the run ends."""
    monitoring: Monitoring = field(default_factory=Monitoring)
    """what is looked at while the denoiser is trained"""
    keep: Keep = field(default_factory=Keep)
    """which checkpoints stay"""

    def __post_init__(self):
        self._check_numbers()
        self._check_models()
        self._check_sizes()
        self._check_stages()

    def _check_numbers(self) -> None:
        positive = {
            "denoiser steps": self.denoiser.steps,
            "denoiser batch": self.denoiser.batch,
            "denoiser layers": self.denoiser.dit.layers,
            "patch": min(self.denoiser.dit.patch),
            "rows segments": self.denoiser.rows.segments,
            "stretches": self.data.stretches,
            "resolutions": min(self.data.resolutions, default=1),
            "log_every": self.log_every,
            "save_every": self.save_every,
            "most_skipped": self.most_skipped,
            "stop_within": self.stop_within,
            "accumulate": self.denoiser.accumulate,
        }
        if isinstance(self.autoencoder, AutoencoderTraining):
            positive["autoencoder steps"] = self.autoencoder.steps
        for name, value in positive.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        trainings = [part for part in (self.autoencoder, self.denoiser) if not isinstance(part, GivenAutoencoder)]
        for training in trainings:
            learning_rates(training.optimizer, steps=training.steps)
            if not 0 <= training.ema_decay < 1:
                raise UserError(f"ema_decay {training.ema_decay} must lie in [0, 1)")
        self._check_what_is_trained()
        self._check_parts()
        if not 0 <= self.denoiser.caption_dropout <= 1:
            raise UserError(f"caption_dropout {self.denoiser.caption_dropout} must lie in [0, 1]")
        if not all(0 < weight < math.inf for weight in self.data.weights):
            raise UserError(f"weights={self.data.weights} must be positive; leave out a data set that is not wanted")
        cached = self.data.stretches > 1 or self.data.resolutions or self.data.flips
        if cached and not self.data.cache_latents:
            raise UserError(
                "stretches, resolutions and flips are of cached latents; leave them out, or cache_latents=True"
            )
        if self.denoiser.buckets is not None and (self.data.cache_latents or self.data.weights):
            raise UserError("buckets are read from video files, unweighted: set data cache_latents=False, no weights")
        if self.data.workers < 0:
            raise UserError(f"workers={self.data.workers} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"a seed is a whole number from 0 to {2**32 - 1}, not {self.seed}")

    def _check_parts(self) -> None:
        denoiser = self.denoiser
        if self.monitoring.validate_every and (denoiser.distillation is not None or denoiser.buckets is not None):
            raise UserError(
                "the loss of held-out clips is that of packed rows, of no student: leave out validate_every"
            )
        if denoiser.accumulate > 1 and (denoiser.buckets is not None or denoiser.distillation is not None):
            raise UserError("only packed rows, not of a student, are divided into parts: leave out accumulate")
        if denoiser.batch % denoiser.accumulate:
            raise UserError(
                f"a batch of {denoiser.batch} rows is not divisible into accumulate={denoiser.accumulate} parts; use a "
                "multiple"
            )

    def _check_what_is_trained(self) -> None:
        if isinstance(self.autoencoder, AutoencoderTraining):
            adversarial = self.autoencoder.loss.adversarial
            if adversarial is not None and adversarial.start >= self.autoencoder.steps:
                raise UserError(
                    f"adversarial training starts at step {adversarial.start}, the autoencoder is trained for "
                    f"{self.autoencoder.steps}; start earlier, or leave it out"
                )
        denoiser = self.denoiser
        if denoiser.lora is not None and denoiser.start is None:
            raise UserError("LoRA adapts weights that are there: name their folder as the denoiser's start")
        if denoiser.lora is not None and denoiser.trained != "full":
            raise UserError(f"adapters are trained, not the weights: leave out lora, or trained={denoiser.trained!r}")
        if denoiser.distillation is not None:
            self._check_distillation()
        if denoiser.trained == "temporal" and denoiser.optimizer.trainable:
            raise UserError("trained='temporal' says what is trained; leave the optimizer's trainable empty")

    def _check_distillation(self) -> None:
        denoiser = self.denoiser
        if denoiser.start is None:
            raise UserError("a student is distilled from a teacher: name its folder as the denoiser's start")
        if denoiser.lora is not None or denoiser.trained != "full":
            raise UserError("of a student all weights are trained; leave out lora and trained, or distillation")
        if denoiser.expert is not None:
            raise UserError("a student is one model of all times; leave out expert, or distillation")
        if denoiser.known is not None:
            raise UserError("a student is told of no known frames; leave out known, and take a teacher without them")

    def _check_models(self) -> None:
        model, denoiser = self.autoencoder.model, self.denoiser
        if model.channels > 3 * model.stride.volume:
            raise UserError(
                f"{model.channels} channels are more than the {3 * model.stride.volume} values of a patch of "
                f"{tuple(model.stride)} pixels; use fewer channels or a larger stride"
            )
        if denoiser.dit.channels != model.channels:
            raise UserError(
                f"the denoiser takes {denoiser.dit.channels} channels, the autoencoder makes {model.channels}; "
                f"set dit channels={model.channels}"
            )
        check_classes(denoiser.text, denoiser.dit)
        if denoiser.dit.context_width != denoiser.text.width:
            raise UserError(
                f"the denoiser takes context of width {denoiser.dit.context_width}, the text encoder makes "
                f"{denoiser.text.width}; set dit context_width={denoiser.text.width}"
            )
        if denoiser.text.max_tokens > denoiser.rows.text:
            raise UserError(
                f"a caption may have {denoiser.text.max_tokens} tokens, a row has room for {denoiser.rows.text}; "
                f"set text max_tokens={denoiser.rows.text} or less"
            )
        if isinstance(denoiser.text, ByteEncoderConfig) and (rest := denoiser.rows.text % denoiser.text.patch):
            raise UserError(
                f"a row's text of {denoiser.rows.text} tokens is not divisible by the text encoder's patch of "
                f"{denoiser.text.patch} bytes; set rows text={denoiser.rows.text - rest}"
            )
        if isinstance(denoiser.dit, WanDitConfig) and denoiser.text.max_tokens > denoiser.dit.text_length:
            raise UserError(
                f"a caption may have {denoiser.text.max_tokens} tokens, the denoiser pads them to "
                f"{denoiser.dit.text_length}; set text max_tokens={denoiser.dit.text_length} or less"
            )
        self._check_given()

    def _check_given(self) -> None:
        """That the denoiser is given what it takes."""
        dit = self.denoiser.dit
        if self.denoiser.times_of == "frame" and dit.time != "token":
            raise UserError("frames have a time of their own in a denoiser with time='token'; or set times_of='clip'")
        learned = isinstance(self.denoiser.objective.prediction, LearnedVariance)
        if learned != (isinstance(dit, DitConfig) and dit.variance == "predicted"):
            raise UserError(
                "a denoiser with variance='predicted' goes with an objective that predicts a LearnedVariance, and the "
                "other way round; change one of the two"
            )
        check_given_frames(
            dit,
            self.autoencoder.model,
            self.denoiser.known,
            self.denoiser.image_encoder,
            cached=self.data.cache_latents,
        )

    def _check_sizes(self) -> None:
        denoiser = self.denoiser
        if denoiser.dit.patch.t != 1:
            raise UserError(
                f"a patch of {denoiser.dit.patch.t} latent frames divides no clip, as its first latent frame stands "
                "alone; use 1 along time"
            )
        self._check_fits("max_frames", Grid(self.data.max_frames, *self._multiple[1:]))
        if isinstance(self.autoencoder, AutoencoderTraining):
            self._check_windows(self.autoencoder, self.window_limits)
        largest = self._largest_clip()
        if largest > denoiser.rows.tokens:
            raise UserError(
                f"a clip of {self.data.max_pixels} pixels and {self.data.max_frames} frames is up to {largest} tokens, "
                f"a row has room for {denoiser.rows.tokens}; set rows tokens={largest} or lower max_pixels"
            )

    def _check_fits(self, name: str, size: Grid) -> None:
        try:
            latent_grid(size, self.autoencoder.model.stride)
        except UserError as error:
            raise UserError(f"{name} does not fit the autoencoder: {error}") from error

    def _check_windows(self, training: AutoencoderTraining, limits: SizeLimits) -> None:
        if not training.windows:
            raise UserError("the autoencoder needs at least one window shape to train on")
        for window in training.windows:
            self._check_fits("window", window.size)
        adversarial = training.loss.adversarial
        smallest = min(min(window.size[1:]) for window in training.windows)
        if adversarial is not None and smallest < 2**adversarial.layers:
            raise UserError(
                f"a discriminator of {adversarial.layers} layers needs windows of {2**adversarial.layers} pixels or "
                f"more, one has {smallest}; use fewer layers or larger windows"
            )
        if training.loss.lpips and smallest < LPIPS_SMALLEST:
            raise UserError(f"LPIPS needs windows of {LPIPS_SMALLEST} pixels or more, one has {smallest}")
        for window in training.windows:
            t, h, w = window.size
            if t > limits.max_frames or h * w > limits.max_pixels:
                raise UserError(
                    f"a window of {t}x{h}x{w} is larger than any clip of {limits.max_frames} frames of "
                    f"{limits.max_pixels} pixels; use a smaller window, or raise max_frames or max_pixels"
                )

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.earlier]
        for stage in self.earlier:
            if not re.fullmatch(r"[\w.-]+", stage.name) or names.count(stage.name) > 1:
                raise UserError(f"a stage's name is that of a folder, and no other's; {stage.name!r} is not")
            if stage.data.held_out or stage.data.weights:
                raise UserError(
                    f"stage {stage.name}: what is held out, and how data sets are weighted, holds for all stages; say "
                    "it in the experiment's own data"
                )
            if stage.optimizer is not None:
                self._check_carried(stage.name, stage.optimizer)
        for number, stage in enumerate(self.earlier):
            try:
                self.stage(number)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from error
        if self.earlier and self.denoiser.distillation is not None:
            raise UserError("a student is distilled in one stage; leave out earlier, or distillation")

    def _check_carried(self, name: str, optimizer: OptimizerConfig) -> None:
        """That an optimizer's state is one of the last stage's."""
        last = self.denoiser.optimizer
        for field_name in ("kind", "matrices", "trainable", "frozen"):
            here, there = getattr(optimizer, field_name), getattr(last, field_name)
            if here != there:
                raise UserError(
                    f"stage {name} has an optimizer with {field_name}={here!r}, the last stage {there!r}: its state "
                    "could not be carried over; use one for all stages"
                )

    def stage(self, number: int) -> "Experiment":
        """One stage as an experiment of its own; that after all `earlier` ones is the last."""
        if number == len(self.earlier):
            return dataclasses.replace(self, earlier=())
        stage = self.earlier[number]
        data = dataclasses.replace(stage.data, held_out=self.data.held_out, weights=self.data.weights)
        names = ("steps", "rows", "batch", "optimizer", "objective", "known", "caption_dropout")
        own: dict[str, Any] = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
        autoencoder = self.autoencoder
        if isinstance(autoencoder, AutoencoderTraining):  # which is trained before the first stage
            limits = self.window_limits
            autoencoder = dataclasses.replace(autoencoder, max_pixels=limits.max_pixels, max_frames=limits.max_frames)
        return dataclasses.replace(
            self,
            autoencoder=autoencoder,
            data=data,
            denoiser=dataclasses.replace(self.denoiser, **own),
            mesh=stage.mesh or self.mesh,
            earlier=(),
        )

    @property
    def _multiple(self) -> Grid:
        stride, patch = self.autoencoder.model.stride, self.denoiser.dit.patch
        return Grid(stride.t, stride.h * patch.h, stride.w * patch.w)

    def _largest_clip(self) -> int:
        """Tokens of the largest clip that the limits let through."""
        multiple = self._multiple
        latents = latent_grid(Grid(self.data.max_frames, *multiple[1:]), self.autoencoder.model.stride)
        return latents.t * (self.data.max_pixels // (multiple.h * multiple.w))

    @property
    def limits(self) -> SizeLimits:
        """Which sizes clips are brought to."""
        return SizeLimits(
            max_pixels=self.data.max_pixels, max_frames=self.data.max_frames, multiple=self._multiple, fps=self.data.fps
        )

    @property
    def window_limits(self) -> SizeLimits:
        """Which sizes clips are brought to where windows of them train the autoencoder."""
        training, limits = self.autoencoder, self.limits
        if isinstance(training, GivenAutoencoder):
            return limits
        return dataclasses.replace(
            limits,
            max_pixels=training.max_pixels or limits.max_pixels,
            max_frames=training.max_frames or limits.max_frames,
        )
