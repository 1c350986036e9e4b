"""Configuration of a pipeline, its file in a folder, and the parts of a pipeline that are made from it."""

import operator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from dit_video.core import config_json
from dit_video.core.errors import UserError, check_at_least
from dit_video.core.files import read_document, write_json
from dit_video.core.offload import Offload, streams_layers
from dit_video.core.resize import compute_fitted_size
from dit_video.data.latents.codec import LatentCodec
from dit_video.models.encoders import BatchTokenizer, Tokenizer
from dit_video.models.model_config import ModelConfig
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.nn.partitioner import Partitioner
from dit_video.sampling import Denoiser, Sampling
from dit_video.sampling.denoiser import list_experts
from dit_video.sampling.request import Conditioner, ModelParts, Request
from dit_video.tokens import Grid

FORMAT, RUN_FORMAT = 1, 1
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
    """A pipeline whose samples condition this one's: a prior, or a model of low resolution.

    It has the prompt and seed of a request, and those of its conditioning and strengths that it knows.
    """

    name: str
    """Name of the conditioning that its sample is the value of."""
    output: Literal["clip", "latents"] = "clip"
    """Form of the value: a `Clip`, or latents `t h w c`."""
    size: Grid | Downscale | None = None
    """Size of its clips: fixed, or relative to this pipeline's; None for its own default size."""
    sampling: Sampling | None = None
    """Sampling of its clips; None for its own default."""

    def get_size(self, size: Grid, default: Grid) -> Grid:
        """Return the size of its clips for clips of `size`, where `default` is its own default size."""
        return self.size.shrink(size) if isinstance(self.size, Downscale) else self.size or default

    def check(self, model: ModelConfig) -> None:
        """Check that a model has the conditioning.

        Raises:
          UserError: If it has none of the name.
        """
        names = [each.field.name for each in model.backbone.conditioning]
        if self.name not in names:
            fix = f"Use {', '.join(names)}." if names else "Use a model with conditioning by fields."
            raise UserError(f"name={self.name!r} of a step is invalid: this model has no such conditioning. {fix}")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Configuration of a pipeline: everything but its weights.

    Raises:
      UserError: If the boundary is not a time, or the model has no frame rate.
    """

    model: ModelConfig
    """The model, as its training had it; its frame rate is that of sampled clips."""
    batch: int
    """Number of rows or canvases that are sampled at once."""
    sampling: Sampling
    size: Grid
    """Default size of generated clips: frames, height, width."""
    negative: str = ""
    """Default negative prompt."""
    caption_dropout: float | None = None
    """Share of captions that were dropped in training, so that guidance has an unconditional branch; None if
    unknown."""
    boundary: float | None = None
    """Boundary time of two experts (Wan 2.2 A14B): `backbone` denoises from it on, a second model of the same config
    below it."""
    conditioner: Conditioner | None = None
    """The model's own conditioner; None for `Completion`: text to video, or image to video where there is an image."""
    previous: tuple[PreviousStep, ...] = ()
    """Steps that are sampled before: pipelines of their own, in `steps/NAME` of the folder."""
    evaluation: Any = None
    """Evaluation that its training asked for, an `evaluation.config.Evaluation`; None for one of captions."""
    example_prompts: tuple[str, ...] = ()
    """Prompts to try the model with: some captions of its training."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Command, seed and versions that produced the weights."""

    def __post_init__(self):
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            raise UserError(f"boundary={self.boundary} is invalid: it must be a time from 0 to 1")
        if self.model.fps is None:
            raise UserError("model.fps=None is invalid: sampled clips have a frame rate. Use model fps=24.0.")

    def replace_model(self, **changes: Any) -> "PipelineConfig":
        """Return the config with other values of the model's fields."""
        return replace(self, model=replace(self.model, **changes))

    @property
    def fps(self) -> float:
        """Return the frame rate of sampled clips."""
        assert self.model.fps is not None  # which __post_init__ checks
        return self.model.fps

    @property
    def token_dt(self) -> float:
        """Return the spacing of tokens along time in the denoiser's positions: 1 in tokens, or seconds."""
        return self.model.compute_token_dt(self.fps)

    @property
    def denoiser_shapes(self) -> dict[str, Any]:
        """Return the shapes of the denoiser's parameters."""
        return {name: get_param_shapes(self.model.backbone.make) for name in list_experts(self.boundary)} | {
            "text": get_param_shapes(self.model.text_encoder.make)
        }

    def get_previous_step(self, name: str) -> PreviousStep:
        """Return the previous step whose sample is the value of a conditioning.

        Raises:
          UserError: If there is none.
        """
        for step in self.previous:
            if step.name == name:
                return step
        fix = f"Use {', '.join(step.name for step in self.previous)}." if self.previous else "Leave it out."
        raise UserError(f"previous={name!r} is invalid: the pipeline has no such previous step. {fix}")

    def resolve_size(self, request: Request) -> Grid:
        """Return the frames, height and width of a request's clip.

        A request without a size has the aspect ratio of its first picture with about the default number of pixels, and
        of a clip that is kept or followed as many frames as the stride allows; without pictures the default size.
        """
        if request.size is not None:
            return to_grid(request.size)
        if (picture := request.get_picture_size()) is None:
            return self.size
        stride, height, width = self.model.size_multiple
        height, width = compute_fitted_size(*picture[1:], area=self.size.h * self.size.w, multiple=(height, width))
        is_whole = request.video is not None or request.control is not None
        frames = 1 + (picture.t - 1) // stride * stride if is_whole else self.size.t
        return Grid(frames, height, width)


def is_pipeline_folder(folder: str | Path) -> bool:
    """Return whether a folder holds the files of a pipeline. A run has the config, too, but other weights."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / RUN_CONFIG).is_file()


def read_run_document(folder: str | Path) -> dict[str, Any]:
    """Read the command and the experiment of a run, as JSON.

    Raises:
      MissingError: If the folder holds no run.
      UserError: If the run is of another version.
    """
    return read_document(Path(folder) / RUN_CONFIG, format=RUN_FORMAT, kind="run", fix="start it anew")


def write_pipeline_config(folder: str | Path, config: PipelineConfig) -> None:
    """Write the config of a pipeline or of a run, whose weights `load` finds by it.

    Raises:
      UserError: If other processes cannot import a class of the config.
    """
    write_json(Path(folder) / CONFIG, {"format": FORMAT, "config": config_json.to_portable_json(config)})


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
    partitioner: Partitioner,
    mesh: Mesh | None = None,
    offload: Offload | None = None,
) -> Denoiser:
    """Return a pipeline's denoiser.

    Args:
      config: The pipeline's config.
      params: Parameters of its denoisers and of their text encoder, or their shapes.
      tokenizer: Tokenizer or encoder of prompts.
      partitioner: Attention and sharding of weights that the denoiser is made with.
      mesh: Devices that sample together; None for one device.
      offload: Weights in host memory; None for weights that stay on the devices.
    """
    model = config.model
    return Denoiser(
        backbone=get_graph_def(model.backbone.make, partitioner),
        text=get_graph_def(model.text_encoder.make),
        params=params,
        streams_layers=streams_layers(offload, "denoiser"),
        tokenizer=tokenizer,
        process=model.process,
        prediction=model.prediction,
        patch=model.backbone.patch,
        boundary=config.boundary,
        token_dt=config.token_dt,
        token_lead=model.token_lead,
        mesh=mesh,
    )


def make_model_parts(
    config: PipelineConfig, codec: LatentCodec, *, offload: Offload | None = None, folder: Path = Path()
) -> ModelParts:
    """Return the parts of a pipeline that requests use; arguments are as for `Pipeline`."""
    return ModelParts(
        backbone=config.model.backbone,
        codec=codec,
        frame_conditioning=config.model.frame_conditioning,
        image_encoder_folder=config.model.image_encoder,
        conditioner=config.conditioner,
        token_dt=config.token_dt,
        token_lead=config.model.token_lead,
        offload=offload,
        folder=folder,
    )


def to_grid(size: Any) -> Grid:
    """Convert a user's size to a grid."""
    try:
        if any(isinstance(length, bool) for length in size):  # an index to Python
            raise TypeError("a truth value is no length")
        return Grid(*map(operator.index, size))
    except TypeError as error:
        rule = "a size is three whole numbers, frames, height and width, such as (17, 32, 48)"
        raise UserError(f"size={size!r} is invalid: {rule}") from error
