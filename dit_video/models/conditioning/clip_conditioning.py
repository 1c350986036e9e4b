"""Interface for conditioning on a clip's values other than its text: a camera path, actions, a control signal."""

import abc
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Key, Shaped, UInt8

from dit_video.core.errors import MissingError, UserError
from dit_video.models.autoencoders import AutoencoderConfig
from dit_video.models.conditioning.frame_conditioning import COND_LATENTS, COND_MASK, IMAGE_TOKENS
from dit_video.models.conditioning.records import ClassIds, ConditioningLatents, ImageTokens, TextTokens, TrainingKeys
from dit_video.nn import Linear, Partitioner
from dit_video.tokens import Field, Grid, PackedRows


class Codec(Protocol):
    """A trained autoencoder, as conditioning uses it."""

    @property
    def config(self) -> AutoencoderConfig:
        """Return its config, which has its stride."""

    def encode_pixels(self, pixels: UInt8[np.ndarray, "T H W 3"], /) -> Float32[np.ndarray, "t h w c"]:
        """Return the latents of a clip."""


class FrameCrop(NamedTuple):
    """Part of a clip's frames that is trained on."""

    height: int
    """Height and width to which the frames are resized."""
    width: int
    top: int
    """First row and column that are kept."""
    left: int


class ClipView(NamedTuple):
    """A training clip as it is encoded: decoded, resized, cropped in time and perhaps mirrored."""

    name: str
    """Name of the clip."""
    frames: UInt8[np.ndarray, "T H W 3"]
    fps: float
    """Rate of these frames."""
    frame_stride: float
    """Frames of the clip's file for each frame here: the file's rate divided by `fps`."""
    latents: Grid
    """Size of its latents: latent frames, rows, columns."""
    stride: Grid
    """Frames, rows and columns of pixels that a latent stands for; the first latent frame stands for one frame."""
    start: int = 0
    """Number of the clip's frames, at the training rate, that precede the first frame here."""
    crop: FrameCrop | None = None
    """Part of the resized frames that is here; None for whole frames."""
    is_flipped: bool = False
    """True if the frames are mirrored."""
    encoded: Mapping[int, Float32[np.ndarray, "t h w c"]] = {}
    """Latents of the frames for each of the conditioning's `encoded_prefixes`."""
    columns: Mapping[str, Any] = {}
    """Values of the clip in the conditioning's `columns`, as Python's; None where a column has none."""

    def read_alike(self, file: Path) -> UInt8[np.ndarray, "T H W 3"]:
        """Return the frames of a file that belong to those here, such as a video of the clip's depth.

        They are sampled in time, resized, cropped and mirrored as the clip's own.

        Raises:
          DecodeError: If the file is damaged.
          UserError: If it is shorter.
        """
        from dit_video.video import decode  # Imported here: models need no library of videos.

        count, height, width = self.frames.shape[:3]
        crop = self.crop or FrameCrop(height, width, 0, 0)
        size = Grid(count, crop.height, crop.width)
        frames = decode(file, size=size, start=self.start / self.fps, fps=self.fps).frames
        frames = frames[:, crop.top : crop.top + height, crop.left : crop.left + width]
        return frames[:, :, ::-1] if self.is_flipped else frames

    @property
    def caption(self) -> str:
        """Return the clip's first caption, from the column `captions`; empty if there is none.

        Raises:
          UserError: If the conditioning does not name the column, so that changed captions would go unseen.
        """
        if "captions" not in self.columns:
            raise UserError('columns lacks "captions", from which the caption is taken. Name it in `columns`.')
        return next(iter(self.columns["captions"] or ()), "")


ConditioningT = TypeVar("ConditioningT", bound="ClipConditioning")


class _Values(NamedTuple):
    values: Any


@dataclass(frozen=True, kw_only=True)
class ClipConditioning(abc.ABC):
    """Conditioning of a model on one field per clip; subclasses are frozen dataclasses.

    The values are computed when clips are encoded, stored with their latents, and passed in the rows to the model,
    which embeds them. In sampling, a request gives the values and how strongly they act; values that it leaves out are
    zero.

    Raises:
      UserError: If `dropout` is outside [0, 1).
    """

    dropout: float = 0.1
    """Probability that the values of a clip are dropped in training: replaced by zeros."""
    record: ClassVar[type]
    """Class of the record that the model gets: a NamedTuple of no other input, with the field `values`. By default one
    is made, of the name of the conditioning's class."""
    codec: ClassVar[Codec | None] = None
    """The model's trained autoencoder, when `from_clip` and `from_request` are called; it is in no config."""
    encoded_prefixes: ClassVar[tuple[int, ...]] = ()
    """Counts of leading frames to keep when a training clip is encoded for `from_clip`; the other frames are grey."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if not hasattr(cls, "record"):
            cls.record = type(cls.__name__, (_Values,), {})

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} is invalid: it must lie in [0, 1). Use 0.1.")

    @property
    @abc.abstractmethod
    def field(self) -> Field:
        """Return the description of the field; its name, which no other input has, is also the conditioning's name.

        A subclass sets `field = Field(…)`, or has a property if the field depends on its config.
        """

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the data set's table that `from_clip` reads, such as motion vectors or captions.

        Each must exist before the training begins. Cached values of a clip whose value changes are computed again.
        """
        return ()

    @property
    def strength_shape(self) -> tuple[int, ...]:
        """Return the shape of a clip's strength: a single number, unless parts of the model have their own."""
        return ()

    def open(self, folder: Path) -> "ClipConditioning":
        """Return the conditioning with what it reads of files, such as an encoder's weights; by default itself.

        It is called once for a run whose clips are encoded, and once for a pipeline with a request that has a value.
        `from_clip` and `from_request` are those of the result, which is in no config.

        Args:
          folder: Folder of the run, to which paths may be relative; of a pipeline without its run, the pipeline's own.
        """
        return self

    def use_codec(self: ConditioningT, codec: Codec) -> ConditioningT:
        """Return the conditioning with the model's trained autoencoder as its `codec`."""
        used = copy.copy(self)
        object.__setattr__(used, "codec", codec)
        return used

    @abc.abstractmethod
    def from_clip(self, view: ClipView) -> np.ndarray:
        """Return the values of a training clip, with shape `field.get_shape(view.latents)`."""

    @abc.abstractmethod
    def from_request(self, value: Any, latents: Grid) -> np.ndarray:
        """Return the values that a request asks for, with shape `field.get_shape(latents)`.

        Raises:
          UserError: If the request's value is invalid.
        """

    def finish(self, frames: UInt8[np.ndarray, "T H W 3"], value: Any) -> UInt8[np.ndarray, "T H W 3"]:
        """Return the decoded frames of a request with a value of full strength, changed to agree with it.

        By default they stay as they are.
        """
        return frames

    def make_embedding(
        self, width: int, *, patch: Grid, dtype: Any, partitioner: Partitioner, rngs: nnx.Rngs
    ) -> nnx.Module:
        """Return the module that maps the record's values to the model's width; values on a grid come as patches.

        By default it is a linear map that starts at zero, so that extending a trained model leaves its predictions
        unchanged.
        """
        features = math.prod(self.field.to_rows(patch).shape)
        return LinearEmbedding(Linear(features, width, init="zero", dtype=dtype, partitioner=partitioner, rngs=rngs))

    def make_positions(self) -> Float32[np.ndarray, "length 3"]:
        """Return the positions (t, h, w) of an `extra` field's tokens, in the units of clip positions.

        By default they are zero, so nothing is rotated.
        """
        return np.zeros((self.field.length, 3), np.float32)

    def prepare(
        self, values: Array, layout: PackedRows, keys: Key[Array, "B G"], strength: Float[Array, "B G *strength"] | None
    ) -> Any:
        """Return the record of a batch.

        By default values are dropped at random in training, and multiplied by the strength in sampling.

        Args:
          values: The field in rows.
          layout: Places of the clips.
          keys: Keys of the clips, for random numbers; in sampling they come from the requests' seeds.
          strength: Strengths that requests ask for (1 by default), of shape `strength_shape`; None in training.
        """
        if strength is not None:
            if self.field.dtype == "float32":
                values = values * self.spread(strength, values, layout)
        elif self.dropout:
            is_dropped = jax.vmap(jax.vmap(jax.random.uniform))(keys) < self.dropout
            values = jnp.where(self.spread(is_dropped, values, layout), jnp.zeros_like(values), values)
        return self.record(jnp.asarray(values))

    def spread(self, per_clip: Shaped[Array, "B G"], values: Array, layout: PackedRows) -> Shaped[Array, "..."]:
        """Return one value per clip in a shape that broadcasts against the field's values."""
        if self.field.alignment in ("frame", "grid"):
            per_clip = layout.expand(per_clip)
        elif self.field.length:
            per_clip = jnp.repeat(per_clip, self.field.length, axis=1)
        return per_clip.reshape(*per_clip.shape, *(1,) * (values.ndim - per_clip.ndim))


def group_frames(
    values: Shaped[np.ndarray, "T *shape"], stride: int, count: int, setting: str
) -> Float32[np.ndarray, "n *shape"]:
    """Return means of a clip's values of frames: `count` for each latent, of consecutive frames.

    The first latent, which stands for one frame, has that frame's value as often as the others have frames.

    Args:
      values: Values of the frames, one of the first latent and `stride` of each other.
      stride: Frames that a latent stands for.
      count: Number of means for a latent.
      setting: The count as its config has it, for the error.

    Raises:
      UserError: If the count does not divide the stride.
    """
    if stride % count:
        raise UserError(f"{setting} is invalid: a latent has {stride} frames. Use a divisor of them.")
    repeated = np.concatenate([np.repeat(values[:1], stride - 1, axis=0), values]).astype(np.float32)
    return repeated.reshape(-1, stride // count, *values.shape[1:]).mean(axis=1)


def find_own_file(folder: str, name: str, kind: str, suffix: str = "") -> Path:
    """Return the file of a training clip in a folder with files under the names of the clips.

    Args:
      folder: The folder; empty if there is none.
      name: Name of the clip.
      kind: What the file holds, for the error.
      suffix: What follows the clip's name.

    Raises:
      MissingError: If there is no such file.
    """
    path = Path(folder) / f"{name}{suffix}"
    if not folder or not path.is_file():
        where = path if folder else f"folder={folder!r}, and the {kind} of {name},"
        raise MissingError(f"{where} does not exist. Name the folder of the {kind}, with NAME_OF_THE_CLIP{suffix}.")
    return path


_TAKEN_NAMES = (
    *("text", "image"),  # of guidance's other conditions
    "caption",  # whose dropout is drawn by its name
    *("tokens", "segments", "positions"),  # of the other arrays of rows
    *(COND_LATENTS, COND_MASK, IMAGE_TOKENS),  # of the other fields
    "embed",  # of a DiT's embedding of conditioning latents, `cond_embed`
)
_TAKEN_RECORDS = (TextTokens, ImageTokens, ClassIds, ConditioningLatents, TrainingKeys)


def check_conditioning(conditioning: Sequence[ClipConditioning]) -> None:
    """Check that names and records identify each conditioning of a model, and none of the model's other inputs.

    Raises:
      UserError: If two have one name or one class of records, or if one has that of another input.
    """
    names = [each.field.name for each in conditioning]
    for number, (each, name) in enumerate(zip(conditioning, names, strict=True)):
        kind = type(each).__name__
        if name in names[:number] or name in _TAKEN_NAMES or name.startswith((f"{COND_LATENTS}_", f"{COND_MASK}_")):
            owner = "another conditioning" if name in names[:number] else "another input of the model"
            rule = f"{owner} has this name. Use {name}_of_clip, or another."
            raise UserError(f"name={name!r} of the field of {kind} is invalid: {rule}")
        others = [other.record for other in conditioning[:number]]
        if each.record in others or each.record in _TAKEN_RECORDS:
            owner = "another conditioning" if each.record in others else "another input of the model"
            rule = f"{owner} has this record. Use a NamedTuple of its own, with the field values"
            raise UserError(f"record={each.record.__name__} of {kind} is invalid: {rule}.")


class LinearEmbedding(nnx.Module):
    """Linear map of the values of a conditioning, whatever their shape."""

    def __init__(self, linear: Linear):
        self.linear = linear

    def __call__(self, values: Array) -> Array:
        shape = values.shape[:2]
        return self.linear(values.reshape(*shape, -1).astype(jnp.float32))
