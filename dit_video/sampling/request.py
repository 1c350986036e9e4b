"""Requests of clips, with their pictures, and the interface of conditioners, which make their plans."""

import abc
import functools
import numbers
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8

from dit_video.core.errors import UserError, check_number, check_whole
from dit_video.core.offload import Offload
from dit_video.core.resize import resize_and_crop
from dit_video.data.latents.codec import LatentCodec
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.conditioning import ClipConditioning, FrameConditioning
from dit_video.sampling.pictures import Mask, to_clip, to_image, to_image_or_clip, to_mask
from dit_video.sampling.plan import SamplingPlan
from dit_video.tokens import Grid
from dit_video.video import Clip
from dit_video.weights.frozen_encoders import FrozenImageEncoder

PICTURES = ("image", "last_image", "video", "generated", "control", "reference_images", "conditions")
"""Fields of a request with images, clips and masks."""
OPTIONS = ("strength", "method", "resample")
"""Fields of a request that say how they are kept."""
Method = Literal["auto", "trained", "training_free"]
Size = Grid | tuple[int, int, int]
"""Frames, height and width in pixels."""
Strengths = Mapping[str, float | Sequence[float]]
"""Strengths of conditioning by name, each a number or one for every layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """An image or a clip that a sampled clip has from a frame on; named as `LTXVideoCondition` in diffusers.

    Raises:
      UserError: If the content is no picture, the frame is not a whole number, or the strength is not above 0 and at
        most 1.
    """

    content: Clip
    """Image or clip, given in any form of `dit_video.sampling.pictures`; it is fitted to the height and width."""
    frame: int = 0
    """Number of the sampled clip's frame that is the first of the content; negative numbers count from the end."""
    generated: Mask | None = None
    """Mask of the content: pixels or frames that are generated (True) all the same; None to keep all."""
    strength: float = 1.0
    """Degree to which the content is kept: 1 keeps it, smaller values let the model change it."""

    def __post_init__(self):
        object.__setattr__(self, "content", to_image_or_clip("content of a condition", self.content))
        if self.generated is not None:
            object.__setattr__(self, "generated", to_mask("generated", self.generated))
        check_whole(frame=self.frame)
        check_number(strength=self.strength)
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength} is invalid: it must be above 0 and at most 1. Use 1.")


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """Parts of a model that requests use."""

    backbone: BackboneConfig
    codec: LatentCodec
    frame_conditioning: FrameConditioning | None
    """Conditioning on frames that the denoiser was trained with; None for a model without it."""
    image_encoder_folder: str | None
    """Folder of the image encoder whose tokens it attends to."""
    token_dt: float
    """Distance of consecutive tokens along time, in units of positions."""
    token_lead: float
    """Fraction of that distance by which all tokens but a clip's first begin earlier."""
    conditioner: "Conditioner | None" = None
    """The model's own conditioner; None for `Completion`."""
    offload: Offload | None = None
    """Weights of the image encoder in host memory; None for weights that stay on the device."""
    folder: Path = Path()
    """Folder that files of conditioning are relative to."""

    @functools.cached_property
    def conditioning(self) -> Mapping[str, ClipConditioning]:
        """Return the conditioning by fields of the clips, by name, which is opened when the first value arrives."""
        return {each.field.name: each.open(self.folder).use_codec(self.codec) for each in self.backbone.conditioning}

    @functools.cached_property
    def image_encoder(self) -> FrozenImageEncoder:
        """Return the image encoder, which is read when the first image arrives."""
        assert self.image_encoder_folder is not None
        return FrozenImageEncoder(self.image_encoder_folder, offload=self.offload)


class Conditioner(abc.ABC):
    """A model's way to use what is known of a clip, such as images and masks: it makes the plan of a request.

    One of one's own is passed to `Pipeline.generate(conditioner=...)`.
    """

    accepted: ClassVar[tuple[str, ...]] = ("image", "last_image", "video", "generated", "conditions")
    """Pictures and options of a request that it uses, by the names of their fields; the studio has fields for these."""

    @abc.abstractmethod
    def __call__(self, request: "Request", model: ModelParts) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: If the request or the model does not fit.
        """


@dataclass(frozen=True)
class Request:
    """Request for one clip. Pictures and masks are given in any form of `dit_video.sampling.pictures`.

    Raises:
      UserError: If a value is of another kind than its field, the seed is not below 2**32, or no pixel of the mask is
        generated.
    """

    prompt: str
    size: Size | None = None
    """Frames, height and width in pixels; None for the model's own, with the aspect ratio of the first picture."""
    seed: int = 0
    negative: str | None = None
    """Negative prompt, which replaces the empty prompt (or no class) in guidance; None for the model's own."""
    image: Clip | None = None
    """First frame of the clip, in models that accept one."""
    last_image: Clip | None = None
    """Last frame of the clip, in models that accept one."""
    video: Clip | None = None
    """Clip that is kept where `generated` is False, or that `strength` changes; frames after the last are left out."""
    generated: Mask | None = None
    """Mask of `video`: pixels or frames that are generated (True); all others are kept."""
    strength: float | None = None
    """Diffusion time, in (0, 1], that `video`, or what `generated` says of it, is noised to and sampling starts at
    (SDEdit, arXiv 2108.01073). None for noise alone."""
    conditions: Sequence[Condition] = ()
    """Images and clips that the clip has at some frames, in models that accept them."""
    control: Clip | None = None
    """Clip that steers what is generated, such as poses, depth or edges, in models that accept one."""
    reference_images: Sequence[Clip] = ()
    """Images of subjects that the clip shows, in models that accept them."""
    method: Method = "auto"
    """Way in which known pixels are kept: `trained`, as the model was trained, `training_free`, by replacement of
    their latents after every step, or `auto`, the first if the model was trained for what is known."""
    resample: int = 1
    """Number of times that training-free sampling takes every part of the steps, returning to its first time by adding
    noise (RePaint, arXiv 2201.09865); more make known and new parts agree better, and take longer."""
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    """Values of further conditioning that the model was trained with, by name; without, it is dropped."""
    strengths: Strengths = field(default_factory=dict)
    """Strengths of further conditioning, by name; 1 by default."""
    noise: Float32[np.ndarray, "t h w c"] | None = None
    """Initial noise of the latents' size, standard normal, instead of the seed's."""
    conditioner: Conditioner | None = None
    """Conditioner; None for the model's own."""

    def __post_init__(self):
        check_whole(seed=self.seed, resample=self.resample)
        check_number(strength=self.strength)
        for name, (kind, rule) in _KINDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise UserError(f"{name}={_show(value)} is invalid: it must be {rule}.")
        object.__setattr__(self, "seed", int(self.seed))  # of numbers of NumPy, which JSON does not have
        object.__setattr__(self, "resample", int(self.resample))
        object.__setattr__(self, "strength", None if self.strength is None else float(self.strength))
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is invalid: a seed is a whole number from 0 to {2**32 - 1}. Use 0.")
        for name, convert in _CONVERSIONS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, convert(name, value))
        if self.generated is not None and not self.generated.any():
            raise UserError("generated is invalid: no pixel is generated. Use True where pixels are generated.")

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
        """Check that the model, or its conditioner, accepts all pictures of the request, and how they are kept.

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
        return None if picture is None else Grid(*picture.frames.shape[:3])


def check_request_list(requests: Any) -> None:
    """Check that a value is a list of requests.

    Raises:
      UserError: If it is not.
    """
    if not is_many(requests) or not all(isinstance(each, Request) for each in requests):
        raise UserError('requests are invalid: they must be a list, each a Request. Use [Request("a red circle")].')


def to_conditions(name: str, value: Any) -> tuple[Condition, ...]:
    """Return conditions as a tuple; `name` begins the errors.

    Raises:
      UserError: If the value is no list of them.
    """
    if not is_many(value) or not all(isinstance(each, Condition) for each in value):
        rule = "it must be a list, each a Condition"
        raise UserError(f"{name} is invalid: {rule}. Use [Condition(content=image, frame=0)].")
    return tuple(value)


def _to_images(name: str, value: Any) -> tuple[Clip, ...]:
    if not is_many(value):
        raise UserError(f"{name} is invalid: it must be a list of images. Use [image].")
    return tuple(to_image(name, each) for each in value)


def _to_noise(name: str, value: Any) -> Float[np.ndarray, "t h w c"]:
    if not hasattr(value, "dtype") or np.ndim(value) != 4 or not jnp.issubdtype(value.dtype, jnp.floating):
        found = f" of {value.dtype} {list(np.shape(value))}" if hasattr(value, "dtype") else f"={_show(value)}"
        rule = "it must be an array [t h w c] of real numbers, standard normal"
        raise UserError(f"{name}{found} is invalid: {rule}. Use None for that of the seed.")
    return np.asarray(value)


_KINDS: dict[str, tuple[Any, str]] = {
    "prompt": (str, "a text. Use one in quotes"),
    "negative": (str | None, "a text. Use one in quotes"),
    "method": (str, "a text. Use 'auto', 'trained' or 'training_free'"),
    "conditioning": (Mapping, "a mapping of names. Use {name: value}"),
    "strengths": (Mapping, "a mapping of names. Use {name: 1.0}"),
    "conditioner": (Conditioner | None, "a Conditioner. Use None for the model's own"),
}
"""Types of fields, and what they must be in the words of an error, with the fix."""
_CONVERSIONS: dict[str, Callable[[str, Any], Any]] = {
    "image": to_image,
    "last_image": to_image,
    "video": to_clip,
    "generated": to_mask,
    "conditions": to_conditions,
    "control": to_clip,
    "reference_images": _to_images,
    "noise": _to_noise,
}
"""Conversions of pictures by the names of their fields."""


def fit_frames(frames: UInt8[np.ndarray, "T H W 3"], size: Grid) -> UInt8[np.ndarray, "T h w 3"]:
    """Return frames at a clip's height and width; see `resize_and_crop`."""
    return resize_and_crop(frames, size.h, size.w)


_T = TypeVar("_T")
OneOrMany: TypeAlias = Sequence[_T] | _T
"""A value for all prompts, or a list with one for each."""
Prompts = list[str] | list[int] | tuple[str | int, ...]
"""A list of prompts."""
_SEQUENCES = ("size", "conditions", "reference_images")
"""Fields whose single value is a sequence: only a list of sequences has one for each prompt."""


_EMPTY: dict[str, Any] = {"conditions": (), "reference_images": (), "conditioning": {}, "strengths": {}}
"""Values of fields for a prompt that has None of them."""


def is_many(value: Any) -> bool:
    """Return whether a prompt or another value is a list or tuple, and not a size or another named tuple."""
    return isinstance(value, list | tuple) and not hasattr(value, "_fields")


def make_requests(
    prompt: str | int | Prompts,
    *,
    has_classes: bool,
    method: Method,
    resample: int,
    conditioner: Conditioner | None,
    **fields: Any,
) -> list[Request]:
    """Return the request of a prompt, or of every prompt of a list.

    Args:
      prompt: The prompt or prompts.
      has_classes: Whether the number of a class is a prompt.
      method: Way in which known pixels are kept.
      resample: Number of times that training-free sampling takes every part of the steps.
      conditioner: Conditioner; None for the model's own.
      fields: Other fields of `Request`, each one for all prompts or, with a list of prompts, a list with one for each.
        With a single prompt, a list for `video` or `control` is its frames.

    Raises:
      TypeError: If a prompt is neither a text nor the number of a class.
      UserError: If a list is not as long as that of the prompts, or `Request` refuses a value.
    """
    prompts = [_to_text(each, has_classes) for each in (prompt if isinstance(prompt, list | tuple) else [prompt])]
    shared: dict[str, Any] = {"method": method, "resample": resample, "conditioner": conditioner}
    columns = {name: _spread(name, value, len(prompts), is_many(prompt)) for name, value in fields.items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [Request(text, **shared, **row) for text, row in zip(prompts, rows, strict=True)]


def _to_text(prompt: Any, has_classes: bool) -> str:
    if isinstance(prompt, str):
        return prompt
    if has_classes and not isinstance(prompt, bool) and isinstance(prompt, numbers.Integral):
        return str(int(prompt))
    kinds = "a text or the number of a class" if has_classes else "a text"
    fix = "list(prompt)" if hasattr(prompt, "tolist") else "a text in quotes"
    raise TypeError(f"prompt={_show(prompt)} is invalid: it must be {kinds}, or a list of them. Use {fix}.")


def _show(value: Any) -> str:
    return textwrap.shorten(repr(value), 60, placeholder="…")


def _spread(name: str, value: Any, count: int, has_prompts: bool) -> list[Any]:
    """Return the values of a field for every prompt; one for all is converted once."""
    has_many = is_many(value) and (name not in _SEQUENCES or (bool(value) and all(map(_is_sequence, value))))
    if has_prompts and has_many:
        if len(value) != count:
            rule = f"the list that it is for has {count}"
            raise UserError(f"{name} of {len(value)} values is invalid: {rule}. Use as many values, or one for all.")
        values = list(value)
    else:
        convert = _CONVERSIONS.get(name)
        values = [value if convert is None or value is None else convert(name, value)] * count
    return [_EMPTY.get(name) if each is None else each for each in values]


def _is_sequence(value: Any) -> bool:
    return value is None or isinstance(value, list | tuple)
