"""Configuration of a pipeline, its file in a folder, and the parts of a pipeline that are made from it."""

import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from dit_video.core import config_json
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import read_document, write_json
from dit_video.core.offload import Offload, streams_layers
from dit_video.core.resize import compute_fitted_size
from dit_video.data.latents.codec import LatentCodec
from dit_video.diffusion import Prediction, Process, Velocity
from dit_video.models.autoencoders import AutoencoderConfig, latent_grid
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import BatchTokenizer, ClassNamesConfig, TextConfig, Tokenizer
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.nn.parallel import Parallelism
from dit_video.sampling import Denoiser, Sampling
from dit_video.sampling.denoiser import list_experts
from dit_video.sampling.request import Conditioner, ModelParts, Request
from dit_video.tokens import CanvasShape, DenseShape, Grid, LayoutShape, PackedRows, PackedShape, compute_token_grid

FORMAT = 1
CONFIG, RUN_CONFIG = "pipeline.json", "experiment.json"
WHOLE_FOLDERS = ("pipeline", "transformer", "transformer_2")
"""Folders of results that a run writes at once."""
AUTOENCODER, DENOISER, STEPS = "autoencoder.safetensors", "denoiser.safetensors", "steps"
"""Files of weights, and the folder of the pipelines of previous steps."""
PREVIEW = "preview.safetensors"
"""File of the preview decoder, which a pipeline may lack."""


@dataclass(frozen=True, kw_only=True)
class Downscale:
    """Size of clips that are shorter and smaller than others by factors; `t` is that of the frames after the first.

    Raises:
      UserError: If a factor is below 1.
    """

    t: int = 1
    h: int = 1
    w: int = 1

    def __post_init__(self):
        check_at_least(1, t=self.t, h=self.h, w=self.w)

    def shrink(self, size: Grid) -> Grid:
        """Return the smaller size."""
        return Grid(1 + (size.t - 1) // self.t, size.h // self.h, size.w // self.w)


@dataclass(frozen=True, kw_only=True)
class PreviousStep:
    """A pipeline whose samples condition this one's: a prior, or a model of low resolution."""

    name: str
    """Name of the conditioning that its sample is the value of."""
    output: Literal["clip", "latents"] = "clip"
    """Form of the value: a `Clip`, or latents `t h w c`."""
    size: Grid | Downscale | None = None
    """Size of its clips: fixed, or relative to this pipeline's; None for its own default size."""

    def get_size(self, size: Grid, default: Grid) -> Grid:
        """Return the size of its clips for clips of `size`, where `default` is its own default size."""
        return self.size.shrink(size) if isinstance(self.size, Downscale) else self.size or default


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Configuration of a pipeline: everything but its weights.

    Raises:
      UserError: If the boundary is not a time, the prediction is not defined for the process, the denoiser has other
        classes than the captions, or it reads conditioning latents without `frame_conditioning`.
    """

    autoencoder: AutoencoderConfig
    backbone: BackboneConfig
    text: TextConfig
    """Text encoder; a frozen one by its folder and identity, because its weights are not part of the pipeline."""
    process: Process
    layout: PackedShape | CanvasShape | None
    """Shape of the rows or canvases that clips are sampled in; if None, every clip has one of its own, of its size."""
    batch: int
    """Number of rows or canvases that are sampled at once."""
    sampling: Sampling
    fps: float
    """Frame rate of the training clips."""
    size: Grid
    """Default size of generated clips: frames, height, width."""
    negative: str = ""
    """Default negative prompt."""
    prediction: Prediction = field(default_factory=Velocity)
    """Quantity that the denoiser was trained to predict."""
    caption_dropout: float | None = None
    """Share of captions that were dropped in training, so that guidance has an unconditional branch; None if
    unknown."""
    boundary: float | None = None
    """Boundary time of two experts (Wan 2.2 A14B): `backbone` denoises from it on, a second model of the same config
    below it."""
    frame_conditioning: FrameConditioning | None = None
    """Conditioning on a first frame that the denoiser was trained with; None for a model without it."""
    conditioner: Conditioner | None = None
    """Use of images, clips and masks that its family has of its own; None for `Completion`."""
    image_encoder: str | None = None
    """Folder of the frozen CLIP whose image tokens the denoiser attends to, in image-to-video models that use one."""
    previous: tuple[PreviousStep, ...] = ()
    """Steps that are sampled before: pipelines of their own, in `steps/NAME` of the folder."""
    evaluation: Any = None
    """Evaluation that its training asked for, an `evaluation.config.Evaluation`; None for one of captions."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Command, seed and versions that produced the weights."""

    def __post_init__(self):
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            raise UserError(f"boundary={self.boundary} is invalid: it must be a time from 0 to 1")
        self.prediction.check(self.process)
        check_classes(self.text, self.backbone)
        if self.backbone.cond_channels and self.frame_conditioning is None:
            fix = "use FrameConditioning(...) with the prob and rest of the training"
            raise UserError(f"frame_conditioning=None is invalid: the denoiser reads conditioning latents; {fix}")

    @property
    def token_dt(self) -> float:
        """Return the spacing of tokens along time in the denoiser's positions: 1 in tokens, or seconds."""
        if self.backbone.time_coordinate == "tokens":
            return 1.0
        return self.autoencoder.stride.t * self.backbone.patch.t / self.fps

    @property
    def token_lead(self) -> float:
        """Return the fraction of `token_dt` by which all tokens but a clip's first begin earlier."""
        return self.backbone.compute_token_lead(self.autoencoder.stride.t)

    @property
    def row_shape(self) -> LayoutShape:
        """Return the shape of sampled rows; a larger clip has a row of its own."""
        if self.layout is not None:
            return self.layout
        if PackedRows in self.backbone.layouts:
            return PackedShape(tokens=1, text=self.text.max_tokens, segments=1)
        return DenseShape(size=self.backbone.size_multiple, text=self.text.max_tokens)

    @property
    def denoiser_shapes(self) -> dict[str, Any]:
        """Return the shapes of the denoiser's parameters."""
        return {name: get_param_shapes(self.backbone.make) for name in list_experts(self.boundary)} | {
            "text": get_param_shapes(self.text.make)
        }

    def resolve_size(self, request: Request) -> Grid:
        """Return the frames, height and width of a request's clip.

        A request without a size has the aspect ratio of its first picture with about the default number of pixels, and
        of a clip that is kept or followed as many frames as the stride allows; without pictures the default size.
        """
        if request.size is not None:
            return to_grid(request.size)
        if (picture := request.get_picture_size()) is None:
            return self.size
        stride, step = self.autoencoder.stride, self.backbone.size_multiple
        height, width = compute_fitted_size(
            *picture[1:], area=self.size.h * self.size.w, multiple=(stride.h * step.h, stride.w * step.w)
        )
        is_whole = request.video is not None or request.control is not None
        frames = 1 + (picture.t - 1) // stride.t * stride.t if is_whole else self.size.t
        return Grid(frames, height, width)

    def latent_grid(self, size: Grid) -> Grid:
        """Return the latent grid of a clip size.

        Raises:
          UserError: If the model cannot generate the size; the message names the nearest.
        """
        stride, multiple = self.autoencoder.stride, self.backbone.size_multiple
        for name, length, step, stride_, factor in (
            ("height", size.h, stride.h * multiple.h, stride.h, multiple.h),
            ("width", size.w, stride.w * multiple.w, stride.w, multiple.w),
        ):
            if length < 1 or length % step:
                below = max(step, length - length % step)
                raise UserError(
                    f"{name} {length} is not divisible by {step} (the autoencoder's stride {stride_} times the "
                    f"denoiser's {factor}); use {below} or {below + step}"
                )
        grid = latent_grid(size, stride)
        compute_token_grid(grid, self.backbone.patch)
        return grid


def is_pipeline_folder(folder: str | Path) -> bool:
    """Return whether a folder holds the files of a pipeline. A run has the config, too, but other weights."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / RUN_CONFIG).is_file()


def write_pipeline_config(folder: str | Path, config: PipelineConfig) -> None:
    """Write the config of a pipeline or of a run, whose weights `load` finds by it."""
    write_json(Path(folder) / CONFIG, {"format": FORMAT, "config": config_json.to_json(config)})


def read_pipeline_config(folder: str | Path) -> PipelineConfig:
    """Read the config in the folder of a pipeline or of a run.

    Raises:
      MissingError: If the folder holds none.
      UserError: If the config is of another version, or of something else.
    """
    path = Path(folder) / CONFIG
    document = read_document(path, format=FORMAT, kind="pipeline", fix="export it again")
    config = config_json.from_json(document.get("config"))
    if not isinstance(config, PipelineConfig):
        raise UserError(f"{path} holds no pipeline's config; export it again")
    return config


def make_denoiser(
    config: PipelineConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer | BatchTokenizer,
    *,
    parallel: Parallelism,
    mesh: Mesh | None = None,
    offload: Offload | None = None,
) -> Denoiser:
    """Return a pipeline's denoiser.

    Args:
      config: The pipeline's config.
      params: Parameters of its denoisers and of their text encoder, or their shapes.
      tokenizer: Tokenizer or encoder of prompts.
      parallel: Parallelism that the denoiser is made with.
      mesh: Devices that sample together; None for one device.
      offload: Weights in host memory; None for weights that stay on the devices.
    """
    return Denoiser(
        backbone=get_graph_def(config.backbone.make, parallel),
        text=get_graph_def(config.text.make),
        params=params,
        streams_layers=streams_layers(offload, "denoiser"),
        tokenizer=tokenizer,
        process=config.process,
        prediction=config.prediction,
        patch=config.backbone.patch,
        boundary=config.boundary,
        token_dt=config.token_dt,
        token_lead=config.token_lead,
        mesh=mesh,
    )


def make_model_parts(config: PipelineConfig, codec: LatentCodec, *, offload: Offload | None = None) -> ModelParts:
    """Return the parts of a pipeline that conditioners use; arguments are as for `make_denoiser`."""
    return ModelParts(
        backbone=config.backbone,
        codec=codec,
        frame_conditioning=config.frame_conditioning,
        image_encoder_folder=config.image_encoder,
        conditioner=config.conditioner,
        token_dt=config.token_dt,
        token_lead=config.token_lead,
        offload=offload,
    )


def check_classes(text: TextConfig, backbone: BackboneConfig) -> None:
    """Check that captions are classes where the denoiser has labels, and as many.

    Raises:
      UserError: If one of them has classes that the other lacks, or another number.
    """
    caption_classes = text.classes if isinstance(text, ClassNamesConfig) else 0
    if caption_classes != backbone.class_count:
        fix = "give text=ClassNamesConfig(classes=...) and backbone labels=ClassLabels(classes=...) the same number"
        raise UserError(
            f"captions are of {caption_classes} classes, the denoiser's labels of {backbone.class_count}; {fix}"
        )


def to_grid(size: Any) -> Grid:
    """Convert a user's size to a grid."""
    try:
        return Grid(*map(operator.index, size))
    except TypeError as error:
        rule = "a size is three whole numbers, frames, height and width, such as (17, 32, 48)"
        raise UserError(f"size={size!r} is invalid: {rule}") from error
