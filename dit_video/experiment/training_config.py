"""Configs of a run's data, and of the training of its autoencoder and denoiser."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dit_video.core.errors import UserError
from dit_video.data.buckets import BucketConfig
from dit_video.data.windows import WindowConfig
from dit_video.diffusion import FlowMatching, Objective
from dit_video.distributed import MeshConfig
from dit_video.models.autoencoders import AutoencoderConfig, AutoencoderObjective
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import TextConfig
from dit_video.nn import LoraConfig, get_param_shapes
from dit_video.sampling.request import Conditioner
from dit_video.tokens import CanvasShape, PackedShape
from dit_video.training.losses.distillation import Distillation
from dit_video.training.losses.vq import CodebookLearning
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.optim.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Selection, sizes and augmentation of clips.

    Raises:
      UserError: If the share of a column of captions is not above 0.
    """

    max_pixels: int
    """Maximum number of pixels of a frame; larger clips are resized, keeping their aspect ratio."""
    max_frames: int
    """Maximum number of frames, 1 + k * temporal stride."""
    fps: float | None = None
    """Frame rate that clips of a higher rate are resampled to; None keeps each clip's own."""
    held_out: tuple[str, ...] = ()
    """Names of clips that are not trained on, but reconstructed and reported; the split `validation` if empty."""
    where: str = ""
    """Condition on columns of the data set that training clips meet, such as `motion > 5 and sharpness > 60`."""
    captions: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Columns of captions and the share of each in training, such as {"long": 0.7, "short": 0.3}; if empty, the
    captions of the source."""
    max_excluded_share: float = 0.01
    """Maximum share of the training clips that are excluded because they cannot be used, such as those smaller than one
    multiple; with more of them it is an error."""
    weights: tuple[float, ...] = ()
    """Relative number of clips of each data set in an epoch; if empty, all clips have the same weight. A data set of
    weight 0 is not used."""
    clips_per_video: int = 1
    """Number of temporal crops of `max_frames`, spread over its length, that are taken from a longer clip."""
    resolutions: tuple[int, ...] = ()
    """Further, smaller limits on the pixels of a frame, at which each clip is trained on too."""
    flips: bool = False
    """True to train on each clip mirrored too; captions that mention left or right are then wrong."""
    cache_latents: bool = True
    """True to encode all clips once, before the denoiser is trained. False decodes and encodes them at every use, which
    needs no disk space and draws another temporal crop in every epoch. `clips_per_video`, `resolutions` and `flips`
    apply to the cache only."""
    workers: int = 0
    """Number of processes that read the denoiser's data; 0 for a thread."""

    def __post_init__(self):
        for name, share in self.captions.items():
            if not 0 < share < math.inf:
                raise UserError(
                    f"data.captions={dict(self.captions)} is invalid: the share of {name} is {share}, but must be a "
                    f"number above 0. Use a share such as 0.5, or leave {name} out."
                )

    @property
    def used_datasets(self) -> tuple[int, ...]:
        """Return the numbers of the data sets that are used; empty if all clips have the same weight."""
        return tuple(number for number, weight in enumerate(self.weights) if weight > 0)

    @property
    def used_weights(self) -> tuple[float, ...]:
        """Return the weights of the data sets that are used; empty if all clips have the same weight."""
        return tuple(self.weights[number] for number in self.used_datasets)


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """Config of an autoencoder and its training."""

    model: AutoencoderConfig
    windows: tuple[WindowConfig, ...]
    """Shapes of the training batches, which steps use in turn."""
    optimizer: OptimizerConfig
    steps: int
    loss: AutoencoderObjective = field(default_factory=AutoencoderObjective)
    codebook: CodebookLearning = field(default_factory=CodebookLearning)
    """Codebook update of a vector-quantized autoencoder."""
    ema_decay: float = 0.99
    max_pixels: int | None = None
    """Maximum number of pixels of the frames that windows are cut from; None for the data's, at which the
    autoencoder is also evaluated."""
    max_frames: int | None = None
    """Maximum number of frames of the clips that windows are cut from; None for the data's."""
    init_from: str | None = None
    """Folder of initial weights in diffusers' layout, of this model or of the image autoencoder that it inflates; None
    for random weights. If `normalizer` is not trained, the latents keep their mean and standard deviation."""


@dataclass(frozen=True, kw_only=True)
class PretrainedAutoencoder:
    """Config of a pretrained autoencoder, which is not trained.

    Raises:
      UserError: If the folder is empty, or missing although the autoencoder has weights.
    """

    model: AutoencoderConfig
    folder: str | None = None
    """Folder of its weights in diffusers' layout, or of a pipeline that contains it; None for one without weights."""

    def __post_init__(self):
        if self.folder == "" or (self.folder is None and get_param_shapes(self.model.make)):
            raise UserError("autoencoder.folder is empty. Use the folder of its weights, such as MODEL/vae.")


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
    """Folder of the initial weights: of a pipeline, a run, or Wan in diffusers' layout; None for random weights."""
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
    """Training of a few-step student; `objective` is its teacher's."""

    init_from: str
    """Folder of the teacher, from whose weights the student starts, as for `AllWeights`."""
    distillation: Distillation
    """Method of the distillation."""
    lora: LoraConfig | None = None
    """Config of the adapters that make a student, and its critic, of the teacher, whose weights are in memory once;
    None to train all weights of copies."""


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """Config of a denoiser, its text encoder, and their training; only a text encoder that is not frozen is trained."""

    backbone: BackboneConfig
    text: TextConfig
    layout: PackedShape | CanvasShape | BucketConfig
    """Layout of the batches: packed rows, canvases, or dense batches of one size each, read from the video files."""
    batch: int
    """Number of rows or canvases in a step; dense batches have as many clips as fit into the memory."""
    accumulation_steps: int = 1
    """Number of microbatches that the rows of a step are divided into, whose gradients are computed sequentially and
    summed. Memory is divided by it, and gradients are the same up to rounding."""
    optimizer: OptimizerConfig
    steps: int
    objective: Objective = field(default_factory=FlowMatching)
    time_per: Literal["clip", "frame"] = "clip"
    """Unit that has its own diffusion time. "frame" needs a denoiser with a time per token (diffusion forcing, arXiv
    2407.01392), which then handles frames at any mixture of times, with known frames at time 0."""
    caption_dropout: float = 0.1
    """Probability that a clip's caption is dropped."""
    ema_decay: float = 0.999
    """Decay of the average that is sampled from by default."""
    averages: EmaConfig = field(default_factory=EmaConfig)
    """Further averages, each as large as the model."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning on known frames, for a denoiser that continues a first frame: by `cond_channels`, image embeddings
    or a time per token. None without it."""
    conditioner: Conditioner | None = None
    """Use of images, clips and masks in sampling after the training; None for `Completion`."""
    image_encoder: str | None = None
    """Folder of the CLIP whose embeddings of a known first frame the denoiser attends to (`image_width`), or of a
    pipeline that contains it; None without it."""
    train: AllWeights | TemporalWeights | LoraAdapters | Student = field(default_factory=AllWeights)
    """Trained parameters, and the weights that they start from."""

    @property
    def expert(self) -> ExpertConfig | None:
        """Return which of two experts is trained; None for a model with one denoiser."""
        return None if isinstance(self.train, Student) else self.train.expert

    @property
    def lora(self) -> LoraConfig | None:
        """Return the config of the adapters; None where weights are trained."""
        return self.train.lora if isinstance(self.train, LoraAdapters | Student) else None

    @property
    def buckets(self) -> BucketConfig | None:
        """Return the config of dense batches; None for another layout."""
        return self.layout if isinstance(self.layout, BucketConfig) else None

    @property
    def row_shape(self) -> PackedShape | CanvasShape:
        """Return the rows or canvases in which clips are sampled, and packed unless they are in dense batches."""
        return self.layout.sampling if isinstance(self.layout, BucketConfig) else self.layout


@dataclass(frozen=True, kw_only=True)
class CurriculumStage:
    """Config of a stage of the denoiser's curriculum. None stands for the experiment's own value.

    Weights, optimizer state and averages are carried over from stage to stage. Sizes and lengths may change, because
    tokens have real-valued positions.
    """

    name: str
    """Name of its folder, `stages/NAME` in the run's."""
    steps: int
    """Number of steps of this stage."""
    data: DataConfig
    """Clips and sizes of this stage. `held_out` is the experiment's, and so are `weights` if they are empty."""
    layout: PackedShape | CanvasShape | None = None
    """Shape of the packed rows or canvases."""
    batch: int | None = None
    """Number of rows in a step."""
    optimizer: OptimizerConfig | None = None
    """Optimizer, whose warmup and schedule span this stage's steps."""
    objective: Objective | None = None
    """Objective, such as one with another shift of times."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning on known frames."""
    caption_dropout: float | None = None
    """Probability that a clip's caption is dropped."""
    mesh: MeshConfig | None = None
    """Mesh of devices."""
