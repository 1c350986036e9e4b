"""Configs of the training of an autoencoder and of a denoiser, which are stages of an experiment."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from dit_video.core.errors import UserError
from dit_video.data.buckets import BucketConfig
from dit_video.data.windows import ClipCrops, FittedWindows, WindowConfig
from dit_video.diffusion import LogitNormal, Objective, Process, TimeDistribution, UniformWeighting, Weighting
from dit_video.distributed import Parallelism
from dit_video.experiment.data_config import DataConfig
from dit_video.models.autoencoders import AutoencoderObjective
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.model_config import ModelConfig
from dit_video.nn import LoraConfig
from dit_video.tokens import CanvasShape, PackedShape
from dit_video.training.losses.auxiliary import AuxiliaryLoss
from dit_video.training.losses.distillation import Distillation
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.optim.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """Config of the training of a model's autoencoder."""

    name: str = "autoencoder"
    """Name of the stage, and of its folder."""
    windows: FittedWindows | tuple[WindowConfig, ...] = field(default_factory=FittedWindows)
    """Shapes of the training batches, which steps use in turn; by default they follow from the clips."""
    optimizer: OptimizerConfig
    steps: int
    loss: AutoencoderObjective = field(default_factory=AutoencoderObjective)
    ema_decay: float = 0.99
    max_pixels: int | None = None
    """Maximum number of pixels of the frames that windows are cut from; None for the data's, at which the
    autoencoder is also evaluated."""
    max_frames: int | None = None
    """Maximum number of frames of the clips that windows are cut from; None for the data's."""
    init_from: str | None = None
    """Folder of initial weights in diffusers' layout, of this model or of the image autoencoder that it inflates; None
    for random weights. If `normalizer` is not trained, the latents keep their mean and standard deviation."""

    def choose_windows(self, crops: ClipCrops) -> tuple[WindowConfig, ...]:
        """Return the windows for these clips."""
        return self.windows.choose(crops) if isinstance(self.windows, FittedWindows) else self.windows


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Config of the trained one of a model's two experts (Wan 2.2 A14B); the other one is not changed.

    Raises:
      UserError: If the boundary leaves one of the experts no times.
    """

    expert: Literal["high", "low"]
    """Expert that is trained, at its own times only: `high` denoises at times from the boundary on, `low` below it."""
    boundary: float
    """Diffusion time that separates the experts."""
    other_folder: str
    """Folder of the other expert's transformer, in diffusers' layout."""

    def __post_init__(self):
        if not 0 < self.boundary < 1:
            raise UserError(f"boundary={self.boundary} is invalid: it must be a time between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class AllWeights:
    """Training of all weights."""

    init_from: str | None = None
    """Folder of the initial weights: of a pipeline, a run, or open weights; None for random weights."""
    expert: ExpertConfig | None = None
    """Expert whose weights `init_from` has, for a model with two; None for a model with one denoiser."""


@dataclass(frozen=True, kw_only=True)
class TemporalWeights:
    """Training of the temporal layers only, those with `temporal` in their paths.

    Kandinsky Video adds motion to an image model in this way (arXiv 2311.13073). For any other selection use the
    optimizer's `trainable` and `frozen`.
    """

    init_from: str | None = None
    """Folder of the initial weights, as for `AllWeights`."""
    expert: ExpertConfig | None = None
    """Expert whose weights are trained, as for `AllWeights`."""


@dataclass(frozen=True, kw_only=True)
class LoraAdapters:
    """Training of adapters, which are merged into the weights at the end."""

    init_from: str
    """Folder of the adapted weights, as for `AllWeights`."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Config of the adapters; paths begin with `backbone/` and `text/`."""
    expert: ExpertConfig | None = None
    """Expert whose weights are adapted, as for `AllWeights`."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """Training of a few-step student; the model's process and prediction are its teacher's."""

    init_from: str
    """Folder of the teacher, from whose weights the student starts, as for `AllWeights`."""
    distillation: Distillation
    """Method of the distillation."""
    lora: LoraConfig | None = None
    """Config of the adapters that make a student, and its critic, of the teacher, whose weights are in memory once;
    None to train all weights of copies."""


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """Config of the training of a model's denoiser, with its text encoder unless that is frozen."""

    name: str = "denoiser"
    """Name of the stage. The folder of the training is `denoiser`, for all its stages."""
    batch: int
    """Number of rows or canvases in a step; dense batches have as many clips as fit into the memory."""
    accumulation_steps: int = 1
    """Number of microbatches that the rows of a step are divided into, whose gradients are computed sequentially and
    summed. Memory is divided by it, and gradients are the same up to rounding."""
    optimizer: OptimizerConfig
    steps: int
    times: TimeDistribution = field(default_factory=LogitNormal)
    """Distribution of the diffusion times. Logit-normal times are those of flow matching; DDPM has `Uniform()`."""
    weighting: Weighting = field(default_factory=UniformWeighting)
    """Weight of the squared error at each time."""
    auxiliary: tuple[AuxiliaryLoss, ...] = ()
    """Losses that are added to the denoiser's own, such as an alignment of features."""
    time_per: Literal["clip", "frame"] = "clip"
    """Unit that has its own diffusion time. "frame" needs a denoiser with a time per token (diffusion forcing, arXiv
    2407.01392), which then handles frames at any mixture of times, with known frames at time 0."""
    caption_dropout: float = 0.1
    """Probability that a clip's caption is dropped."""
    ema_decay: float = 0.999
    """Decay of the average that is sampled from by default."""
    averages: EmaConfig = field(default_factory=EmaConfig)
    """Further averages, each as large as the model."""
    train: AllWeights | TemporalWeights | LoraAdapters | Student = field(default_factory=AllWeights)
    """Trained parameters, and the weights that they start from."""
    buckets: BucketConfig | None = None
    """Dense batches of one size each, read from the video files, instead of rows of the model's layout."""
    continues: str | None = None
    """Name of the stage whose training this one goes on with, with its weights, optimizer state and averages: such as
    one on images, or on small clips. Sizes and lengths may change, because tokens have real-valued positions."""
    data: DataConfig | None = None
    """Clips and sizes of this stage; None for the experiment's."""
    layout: PackedShape | CanvasShape | None = None
    """Shape of this stage's rows or canvases; None for the model's."""
    process: Process | None = None
    """Process of this stage, such as one with another shift of times; None for the model's."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning of this stage on known pixels; None for the model's."""
    parallel: Parallelism | None = None
    """Devices of this stage along each axis of the mesh; None for the experiment's."""

    def adapt_model(self, model: ModelConfig) -> ModelConfig:
        """Return the model as this stage trains it."""
        own = {name: getattr(self, name) for name in ("layout", "process", "frame_conditioning")}
        return dataclasses.replace(model, **{name: value for name, value in own.items() if value is not None})

    def make_objective(self, model: ModelConfig) -> Objective:
        """Return the objective of the training of a model."""
        return Objective(
            process=self.process or model.process,
            prediction=model.prediction,
            times=self.times,
            weighting=self.weighting,
        )

    @property
    def expert(self) -> ExpertConfig | None:
        """Return which of two experts is trained; None for a model with one denoiser."""
        return None if isinstance(self.train, Student) else self.train.expert

    @property
    def lora(self) -> LoraConfig | None:
        """Return the config of the adapters; None where weights are trained."""
        return self.train.lora if isinstance(self.train, LoraAdapters | Student) else None
