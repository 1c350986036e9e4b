"""Requests of clips, with their pictures, and the interface of generation tasks, which make their plans."""

import abc
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.core.offload import Offload
from dit_video.core.resize import resize_and_crop
from dit_video.data.latents.codec import LatentCodec
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.sampling.plan import SamplingPlan
from dit_video.sampling.sampling_config import SamplingOverrides
from dit_video.tokens import Grid
from dit_video.video import Clip
from dit_video.weights.frozen_encoders import FrozenImageEncoder

PICTURES = ("image", "last_image", "video", "mask", "control", "reference_images", "conditions")
"""Fields of a request with images, clips and masks."""
OPTIONS = ("strength", "method", "resample")
"""Fields of a request that say how they are kept."""
Image = Clip | UInt8[np.ndarray, "H W 3"]
"""A clip of one frame, or its pixels."""
Method = Literal["auto", "trained", "training_free"]
Mask = Bool[np.ndarray, "T H W"] | Bool[np.ndarray, " T"]
"""Pixels or frames of a clip that are kept (True)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """An image or a clip that a sampled clip has from a frame on; named as `LTXVideoCondition` in diffusers.

    Raises:
      UserError: If the strength is not above 0 and at most 1.
    """

    content: Clip | Image
    """Image, as a clip of one frame or as pixels `[H W 3]`, or a clip; it is fitted to the height and width."""
    frame: int = 0
    """Number of the sampled clip's frame that is the first of the content; negative numbers count from the end."""
    mask: Bool[np.ndarray, "T H W"] | Bool[np.ndarray, " T"] | None = None
    """Pixels, or frames, of the content that are kept (True); None for all."""
    strength: float = 1.0
    """Degree to which the content is kept: 1 keeps it, smaller values let the model change it."""

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength} is invalid: it must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """Parts of a model that tasks use."""

    backbone: BackboneConfig
    codec: LatentCodec
    frame_conditioning: FrameConditioning | None
    """Conditioning on frames that the denoiser was trained with; None for a model without it."""
    image_encoder_folder: str | None
    """Folder of the image encoder whose tokens it attends to."""
    task: "GenerationTask | None" = None
    """Task that the model is used for; None for text to video, or image to video where there is an image."""
    token_dt: float = 1.0
    """Distance of consecutive tokens along time, in units of positions."""
    token_lead: float = 0.0
    """Fraction of that distance by which all tokens but a clip's first begin earlier."""
    offload: Offload | None = None
    """Weights of the image encoder in host memory; None for weights that stay on the device."""

    @functools.cached_property
    def image_encoder(self) -> FrozenImageEncoder:
        """Return the image encoder, which is read when the first image arrives."""
        assert self.image_encoder_folder is not None
        return FrozenImageEncoder(self.image_encoder_folder, offload=self.offload)


class GenerationTask(abc.ABC):
    """A use of a trained model: what is known of a clip, and how sampling keeps to it.

    A task of one's own is passed to `Pipeline.generate(task=...)`.
    """

    @abc.abstractmethod
    def __call__(self, request: "Request", model: TaskModel) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: If the request or the model does not fit the task.
        """


class Request(NamedTuple):
    """Request for one clip."""

    prompt: str
    size: Grid | tuple[int, int, int] | None = None
    """Frames, height and width in pixels; None for the model's own, with the aspect ratio of the first picture."""
    seed: int = 0
    negative: str | None = None
    """Negative prompt, which replaces the empty prompt (or no class) in guidance; None for the model's own."""
    image: Image | None = None
    """First frame of the clip, in models that accept one."""
    last_image: Image | None = None
    """Last frame of the clip, in models that accept one."""
    conditioning: Mapping[str, Any] = {}
    """Values of further conditioning that the model was trained with, by name; without, it is dropped."""
    strengths: Mapping[str, float | int | Sequence[float | int]] = {}
    """Strengths of further conditioning, by name; 1 by default."""
    task: GenerationTask | None = None
    """Task that the model is used for; None for the model's own."""
    video: Clip | None = None
    """Clip whose pixels are kept where `mask` is True, in models that accept one."""
    mask: Mask | None = None
    """Pixels `[T H W]`, or frames `[T]`, of `video` that are kept (True); all others are generated."""
    control: Clip | None = None
    """Clip that steers what is generated, such as poses, depth or edges, in models that accept one."""
    reference_images: Sequence[Image] = ()
    """Images of subjects that the clip shows, in models that accept them."""
    conditions: Sequence[Condition] = ()
    """Images and clips that the clip has at some frames, in models that accept them."""
    noise: Float32[np.ndarray, "t h w c"] | None = None
    """Initial noise of the latents' size, standard normal, instead of the seed's."""
    strength: float | None = None
    """Diffusion time, in (0, 1], that `video` is noised to and sampling starts at (SDEdit, arXiv 2108.01073): the part
    of it that changes, which with a mask is what is not kept. None for noise alone."""
    method: Method = "auto"
    """Way in which known pixels are kept: `trained`, as the model was trained, `training_free`, by replacement of
    their latents after every step, or `auto`, the first if the model was trained for what is known."""
    resample: int = 1
    """Number of times that training-free sampling takes every part of the steps, returning to its first time by adding
    noise (RePaint, arXiv 2201.09865); more make known and new parts agree better, and take longer."""

    @property
    def grid(self) -> Grid:
        """Return the size, which pipelines resolve before they plan a request."""
        assert self.size is not None
        return Grid(*self.size)

    @property
    def pictures(self) -> dict[str, Any]:
        """Return the images, clips and masks of the request by the names of their fields, without those it lacks."""
        values = {name: getattr(self, name) for name in PICTURES}
        return {
            name: value
            for name, value in values.items()
            if value is not None and not (isinstance(value, Sequence) and not value)
        }

    def check_pictures(self, accepted: Collection[str]) -> None:
        """Check that the model, or its task, accepts all pictures of the request, and options of how they are kept.

        Raises:
          UserError: If one of them is not accepted.
        """
        defaults = Request("")
        options = {name for name in OPTIONS if getattr(self, name) != getattr(defaults, name)}
        if refused := sorted((self.pictures.keys() | options) - set(accepted)):
            fix = f"It accepts {', '.join(accepted)}" if accepted else "It accepts a prompt alone"
            raise UserError(f"{', '.join(refused)} of a request is invalid: this model was not trained with it. {fix}.")

    def get_picture_size(self) -> Grid | None:
        """Return the number of frames, height and width of the picture that gives the clip its aspect ratio, if any.

        Images of subjects do not: they are placed inside of the clip.
        """
        contents = [self.image, self.video, self.control, *(each.content for each in self.conditions), self.last_image]
        picture = next((each for each in contents if each is not None), None)
        if picture is None:
            return None
        frames = picture.frames if isinstance(picture, Clip) else np.asarray(picture)[None]
        return Grid(*frames.shape[:3])


class GenerateOptions(SamplingOverrides, total=False):
    """Arguments of `Pipeline.generate` besides the prompt and the kind of output."""

    size: tuple[int, int, int] | None
    negative: str | None
    seed: int
    noise: Float32[np.ndarray, "t h w c"] | None
    image: Image | None
    last_image: Image | None
    conditioning: Mapping[str, Any] | None
    strengths: Mapping[str, float | int | Sequence[float | int]] | None
    task: GenerationTask | None
    video: Clip | None
    mask: Mask | None
    control: Clip | None
    reference_images: Sequence[Image]
    conditions: Sequence[Condition]
    strength: float | None
    method: Method
    resample: int


def split_options(prompt: str | int, options: Mapping[str, Any]) -> tuple[Request, SamplingOverrides]:
    """Return the request that arguments of `Pipeline.generate` describe, and what they override of its sampling.

    Raises:
      TypeError: If an argument does not exist.
    """
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    overrides: Any = {name: value for name, value in options.items() if name in SamplingOverrides.__annotations__}
    fields: Any = {name: value for name, value in options.items() if name not in overrides}
    for name in ("conditioning", "strengths"):
        fields[name] = fields.get(name) or {}
    return Request(prompt=str(prompt), **fields), overrides


def fit_image(image: Clip | np.ndarray, size: Grid) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image at the height and width of a clip, without distortion; see `fit_frames`.

    Raises:
      UserError: If the clip has several frames, or the pixels are not uint8 `[H W 3]`.
    """
    if isinstance(image, Clip):
        if len(image.frames) != 1:
            raise UserError(f"a clip of {len(image.frames)} frames is no image; use Clip(clip.frames[:1], clip.fps)")
        return fit_frames(image.frames, size)[0]
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape or pixels.dtype != np.uint8:
        raise UserError(
            f"an image of {pixels.dtype} {list(pixels.shape)} is invalid: it must be a clip of one frame, or uint8 "
            "pixels [H W 3]. Use dit_video.core.pixels.to_uint8"
        )
    return fit_frames(pixels[None], size)[0]


def fit_frames(frames: UInt8[np.ndarray, "T H W 3"], size: Grid) -> UInt8[np.ndarray, "T h w 3"]:
    """Return frames at a clip's height and width; see `resize_and_crop`."""
    return resize_and_crop(frames, size.h, size.w)
