"""What a run's data, autoencoder and denoiser are, and how these are trained."""

from dataclasses import dataclass, field
from typing import Literal

from dit_video.autoencoders import (
    AutoencoderObjective,
    CausalVaeConfig,
    ImageVaeConfig,
    InflatedConfig,
    PatchVaeConfig,
    VqConfig,
)
from dit_video.backbones.dit import DitConfig
from dit_video.backbones.wan import WanDitConfig
from dit_video.conditioning import KnownFrames
from dit_video.core.errors import UserError
from dit_video.data.bucketing.batches import BucketConfig
from dit_video.data.windows import WindowConfig
from dit_video.diffusion import FlowMatching, Objective
from dit_video.distributed import MeshConfig
from dit_video.nn import LoraConfig
from dit_video.text import TextConfig
from dit_video.tokens import RowShape
from dit_video.training.losses.codebook import CodebookLearning
from dit_video.training.losses.distillation import Distillation
from dit_video.training.optim.ema import Averages
from dit_video.training.optim.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which clips are used, at which sizes."""

    max_pixels: int
    """of a frame; a larger clip is resized, keeping its aspect ratio"""
    max_frames: int
    """1 + k * temporal stride"""
    fps: float | None = None
    """Clips of a higher rate are resampled to this one; None keeps every clip's own."""
    held_out: tuple[str, ...] = ()
    """names of clips that are not trained on, but reconstructed and reported; without any the split `validation`"""
    weights: tuple[float, ...] = ()
    """how much of each data set an epoch has, by clips, relative to each other; without any all clips weigh the same"""
    stretches: int = 1
    """how many stretches of `max_frames`, spread over its length, are taken of a longer clip"""
    resolutions: tuple[int, ...] = ()
    """further, smaller limits on the pixels of a frame, at which every clip is trained on too"""
    flips: bool = False
    """every clip is trained on mirrored too; captions that say left or right then lie"""
    cache_latents: bool = True
    """Whether clips are encoded once, before the denoiser is trained. If not they are decoded and encoded at every use,
    which takes no disk and draws another stretch of time in every epoch; `stretches`, `resolutions` and `flips` are
    of the cache."""
    workers: int = 0
    """processes that read the denoiser's data; 0 for a thread"""


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """An autoencoder and how it is trained."""

    model: PatchVaeConfig | CausalVaeConfig | ImageVaeConfig | InflatedConfig | VqConfig
    windows: tuple[WindowConfig, ...]
    """shapes of the training batches; steps take them in turn"""
    optimizer: OptimizerConfig
    steps: int
    loss: AutoencoderObjective = field(default_factory=AutoencoderObjective)
    codebook: CodebookLearning = field(default_factory=CodebookLearning)
    """how the codes are learned, where the latents are codes"""
    ema_decay: float = 0.99
    max_pixels: int | None = None
    """of the frames that windows are cut from; None for the data's, at which it is also measured"""
    max_frames: int | None = None
    """of the stretches that windows are cut from; None for the data's"""
    start: str | None = None
    """A folder of weights in diffusers' layout that training starts from: of this model, or of the image autoencoder
    that it inflates. Where `normalizer` is not trained, the latents keep their mean and deviation."""


@dataclass(frozen=True, kw_only=True)
class GivenAutoencoder:
    """An autoencoder that is used as it is: nothing of it is trained.

    Raises:
      UserError: no folder.
    """

    model: PatchVaeConfig | CausalVaeConfig | ImageVaeConfig | InflatedConfig | VqConfig
    folder: str
    """of its weights, in diffusers' layout, or of a pipeline that it is a part of"""

    def __post_init__(self):
        if not self.folder:
            raise UserError("an autoencoder that is given lies in a folder; name it, such as MODEL/vae")


@dataclass(frozen=True, kw_only=True)
class OneOfTwo:
    """Which of a model's two experts is trained (Wan 2.2 A14B), at its times alone; the other stays as it is.

    Raises:
      UserError: a boundary that leaves one of them no times.
    """

    expert: Literal["high", "low"]
    """`high` denoises at times from the boundary on, `low` below it"""
    boundary: float
    other: str
    """folder of the other's transformer, in diffusers' layout"""

    def __post_init__(self):
        if not 0 < self.boundary < 1:
            raise UserError(f"the boundary between two experts is a time between 0 and 1, not {self.boundary}")


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """A denoiser, its text encoder, and how they are trained together, unless the encoder is a frozen one."""

    dit: DitConfig | WanDitConfig
    text: TextConfig
    rows: RowShape
    batch: int
    """rows of a step"""
    accumulate: int = 1
    """Into how many parts the rows of a step are divided, computed one after the other: as much less memory, and but
    for rounding the same gradients."""
    buckets: BucketConfig | None = None
    """Instead of packed rows: batches of one size each, from the video files; `rows` is then what samples are packed
    into."""
    optimizer: OptimizerConfig
    steps: int
    objective: Objective = field(default_factory=FlowMatching)
    times_of: Literal["clip", "frame"] = "clip"
    """Whether all frames of a clip have one diffusion time, or each its own (diffusion forcing, arXiv 2407.01392), for
    a denoiser with a time per token: it then knows frames at any mixture of times, what is given being at 0."""
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    """of the average that is sampled from unless another is asked for"""
    averages: Averages = field(default_factory=Averages)
    """further ones, each as large as the model"""
    known: KnownFrames | None = None
    """What the denoiser is given of the clips that it is to make, for one that continues a first frame: with
    `given_channels`, an image's tokens, or a time per token."""
    image_encoder: str | None = None
    """folder of the CLIP whose tokens of a known first frame the denoiser attends to (`image_width`), or of a pipeline
    that it is a part of"""
    start: str | None = None
    """folder of a pipeline or of a run, or of Wan in diffusers' layout, that has the weights which training starts
    from"""
    trained: Literal["full", "temporal", "scratch"] = "full"
    """What is trained, unless adapters are. `full`: all, from the weights of `start` if there are any. `temporal`: the
    layers in time alone, those with `temporal` in their paths, all others being kept as they are (as Kandinsky Video
    adds motion to an image model, arXiv 2311.13073). `scratch`: all, from random weights; `start` is not read. Any
    other choice is made by path, with the optimizer's `trainable` and `frozen`."""
    expert: OneOfTwo | None = None
    """of a model with two: that whose weights `start` holds"""
    lora: LoraConfig | None = None
    """Instead of the weights, adapters to those of `start` are trained; paths begin with `dit/` and `text/`."""
    distillation: Distillation | None = None
    """The model of `start` is the teacher of one that begins as it, and that samples in few steps; `objective` is what
    the teacher was trained with."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the denoiser's training before the last one: what it has of its own.

    Weights, optimizer state and averages are carried over from stage to stage; tokens have real-valued coordinates, so
    that sizes and lengths may change.
    """

    name: str
    """of its folder, `stages/NAME` of the run"""
    steps: int
    data: Data
    """clips and sizes; what is held out, and the weights of data sets, are the experiment's"""
    rows: RowShape | None = None
    """of this stage; None for the experiment's, as of everything below"""
    batch: int | None = None
    """rows of a step"""
    optimizer: OptimizerConfig | None = None
    """warmup and schedule are of this stage's steps"""
    objective: Objective | None = None
    """such as one of another shift of times"""
    known: KnownFrames | None = None
    caption_dropout: float | None = None
    mesh: MeshConfig | None = None
