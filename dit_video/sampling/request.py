"""Requests of clips, and the interface of generation tasks, which make plans for sampling of them."""

import abc
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from dit_video.core.errors import UserError
from dit_video.core.offload import Offload
from dit_video.data.latents.codec import LatentCodec
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.sampling.pictures import Condition, Image
from dit_video.sampling.plan import SamplingPlan
from dit_video.tokens import Grid
from dit_video.video import Clip
from dit_video.weights.frozen_encoders import FrozenImageEncoder

PICTURES = ("image", "last_image", "video", "mask", "control", "reference_images", "conditions")
"""Fields of a request with images, clips and masks."""
OPTIONS = ("strength", "method", "resample")
"""Fields of a request that say how they are kept."""
Method = Literal["auto", "trained", "training_free"]
Mask = Bool[np.ndarray, "T H W"] | Bool[np.ndarray, " T"]
"""Pixels or frames of a clip that are kept (True)."""


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
          UserError: the request or the model does not fit the task.
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
        return {name: value for name, value in values.items() if not (value is None or _is_empty(value))}

    def check_pictures(self, accepted: Collection[str]) -> None:
        """Check that the model, or its task, accepts all pictures of the request, and options of how they are kept.

        Raises:
          UserError: it does not.
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


def _is_empty(value: Any) -> bool:
    return isinstance(value, Sequence) and not value
