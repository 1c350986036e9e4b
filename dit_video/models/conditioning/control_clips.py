"""Conditioning on a second clip of the same frames: one of low resolution, or one that steers, such as depth."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Float32, Key, UInt8

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.resize import make_bicubic_matrix, resize, resize_and_crop
from dit_video.models.conditioning.clip_conditioning import (
    ClipConditioning,
    ClipView,
    LinearEmbedding,
    find_own_file,
    group_frames,
)
from dit_video.nn import Linear, Partitioner
from dit_video.tokens import Field, Grid, PackedRows

_PASSES = 3
"""Number of times that the error of an enlarged clip at its low resolution is taken back."""


@dataclass(frozen=True, kw_only=True)
class SecondClip(ClipConditioning):
    """Base of conditioning on a second clip, whose pixels or latents the model reads at the place of its own tokens.

    A request gives the clip as a `Clip`, or as its frames; it is scaled to cover the sampled one, and cropped, and its
    frames after the sampled clip's last are left out.

    Raises:
      UserError: If there are no pixels, or a negative number of channels.
    """

    pixels: Grid = Grid(1, 1, 1)
    """Frames, rows and columns of the clip that the model reads for each of the latents; smaller than the
    autoencoder's stride, they are means."""
    latent_channels: int = 0
    """Channels of the autoencoder, whose latents of the clip the model reads instead of its pixels; 0 for pixels."""

    def __post_init__(self):
        super().__post_init__()
        check_at_least(1, pixels=min(self.pixels))
        check_at_least(0, latent_channels=self.latent_channels)

    @property
    def channels(self) -> int:
        """Return the number of values at a position of the latents."""
        return self.latent_channels or 3 * self.pixels.volume

    def from_request(self, value: Any, latents: Grid) -> Float32[np.ndarray, "t h w c"]:
        """Return the values of a clip that a request gives.

        Raises:
          UserError: If it is no clip, or shorter than the sampled one.
        """
        name, frames = self.field.name, np.asarray(getattr(value, "frames", value))
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            rule = "it must be a clip, or its frames [T H W 3] of uint8"
            raise UserError(f"{name} of {type(value).__name__} is invalid: {rule}. Use a Clip")
        assert self.codec is not None
        count = 1 + (latents.t - 1) * self.codec.config.stride.t
        if len(frames) < count:
            rule = f"it must have the sampled clip's {count} frames"
            raise UserError(f"{name} of {len(frames)} frames is invalid: {rule}. Use a longer one")
        return self.compute_values(frames[:count], latents)

    def compute_values(self, frames: UInt8[np.ndarray, "T H W 3"], latents: Grid) -> Float32[np.ndarray, "t h w c"]:
        """Return the values of a clip with the frames of the model's own.

        Raises:
          UserError: If the autoencoder has another stride, or other channels, than the config says.
        """
        assert self.codec is not None
        stride = self.codec.config.stride
        if not self.latent_channels:
            frames = resize_and_crop(frames, latents.h * self.pixels.h, latents.w * self.pixels.w)
            return fold_pixels(frames, stride.t, self.pixels)
        values = self.codec.encode_pixels(resize_and_crop(frames, latents.h * stride.h, latents.w * stride.w))
        if values.shape[-1] != self.latent_channels:
            rule = f"the autoencoder has {values.shape[-1]}"
            raise UserError(f"latent_channels={self.latent_channels} is invalid: {rule}. Use {values.shape[-1]}")
        return values


def fold_pixels(frames: UInt8[np.ndarray, "T H W 3"], stride: int, pixels: Grid) -> Float32[np.ndarray, "t h w c"]:
    """Return a clip's pixels, in -1..1, as vectors at the positions of latents.

    The first position along time has the first frame, as often as the others have frames.

    Args:
      frames: Frames of a size that is a multiple of `pixels`.
      stride: Frames that a latent stands for.
      pixels: Frames, rows and columns of a vector; the frames are means of consecutive ones.

    Raises:
      UserError: If the number of frames does not divide the stride.
    """
    values = group_frames(frames.astype(np.float32) / 127.5 - 1, stride, pixels.t, f"pixels={pixels}")
    return rearrange(values, "(t x) (h y) (w z) c -> t h w (x y z c)", x=pixels.t, y=pixels.h, z=pixels.w)


@dataclass(frozen=True, kw_only=True)
class LowResolutionClip(SecondClip):
    """The clip itself in low resolution, for models that make clips larger (arXiv 2106.15282).

    Gaussian noise is added to the values: in training with a random standard deviation in [0, 1), which the model
    reads, too, and in sampling with 1 minus the strength. A model so trained corrects samples of another model, and
    not its training clips alone. The low resolution is that of `pixels`; with `latent_channels` the latents are those
    of the clip enlarged again.
    """

    @property
    def field(self) -> Field:
        return Field(name="low_resolution", alignment="grid", shape=(self.channels,))

    def from_clip(self, view: ClipView) -> Float32[np.ndarray, "t h w c"]:
        """Return the values of a training clip, reduced to the low resolution."""
        return self.compute_values(view.frames, view.latents)

    def compute_values(self, frames: UInt8[np.ndarray, "T H W 3"], latents: Grid) -> Float32[np.ndarray, "t h w c"]:
        low = resize_and_crop(frames, latents.h * self.pixels.h, latents.w * self.pixels.w)
        return super().compute_values(low, latents)

    def finish(self, frames: UInt8[np.ndarray, "T H W 3"], value: Any) -> UInt8[np.ndarray, "T H W 3"]:
        """Return the enlarged clip, which is again the given one where it is reduced (iterative back-projection).

        The autoencoder and the sampler change colours a little; their error at the low resolution is known, and taken
        back (Irani and Peleg, 1991).
        """
        assert self.codec is not None
        stride, (count, height, width) = self.codec.config.stride, frames.shape[:3]
        sides = height // stride.h * self.pixels.h, width // stride.w * self.pixels.w
        low = resize_and_crop(np.asarray(getattr(value, "frames", value))[:count], *sides).astype(np.float32)
        enlarge = make_bicubic_matrix(sides[0], height), make_bicubic_matrix(sides[1], width)
        for _ in range(_PASSES):
            error = low - resize(frames, *sides)
            error = np.einsum("gh,vw,thwc->tgvc", *enlarge, error, optimize=True)
            frames = np.clip(np.rint(frames + error), 0, 255).astype(np.uint8)
        return frames

    def make_embedding(
        self, width: int, *, patch: Grid, dtype: Any, partitioner: Partitioner, rngs: nnx.Rngs
    ) -> nnx.Module:
        features = patch.volume * self.channels + 1
        return LinearEmbedding(Linear(features, width, init="zero", dtype=dtype, partitioner=partitioner, rngs=rngs))

    def prepare(
        self, values: Array, layout: PackedRows, keys: Key[Array, "B G"], strength: Float[Array, "B G"] | None
    ) -> Any:
        """Return the record of a batch: the values with noise, followed by its standard deviation."""
        level_keys, noise_keys = (jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, i) for i in (0, 1))
        level = jax.vmap(jax.vmap(jax.random.uniform))(level_keys) if strength is None else 1 - strength
        level = self.spread(level, values, layout)
        noisy = values + level * layout.sample_noise(noise_keys, values.shape[-1])
        record = super().prepare(noisy, layout, keys, None if strength is None else jnp.ones_like(strength))
        level = jnp.broadcast_to(level, (*values.shape[:2], 1))
        return record._replace(values=jnp.concatenate([record.values, level], axis=-1))


class Control(NamedTuple):
    """Values of control clips at their tokens, and how strongly they act."""

    values: Float[Array, "B N q"]
    strength: Float[Array, "B G"] | None = None
    """Factor of a control stack's output, which the values are multiplied by, too; 1 in training."""


@dataclass(frozen=True, kw_only=True)
class ControlClip(SecondClip):
    """A clip that steers what is generated, such as depth, edges or poses, for `ControlledDiT` or another model.

    A request gives it as `control`.
    """

    folder: str = ""
    """Folder of the training clips' control, each under the name of its clip."""
    record = Control

    @property
    def field(self) -> Field:
        return Field(name="control", alignment="grid", shape=(self.channels,))

    def from_clip(self, view: ClipView) -> Float32[np.ndarray, "t h w c"]:
        """Return the values of a training clip's control.

        Raises:
          MissingError: If there is no file of control.
        """
        path = find_own_file(self.folder, view.name, "control")
        return self.compute_values(view.read_alike(path), view.latents)

    def prepare(
        self, values: Array, layout: PackedRows, keys: Key[Array, "B G"], strength: Float[Array, "B G"] | None
    ) -> Control:
        """Return the record of a batch, with the strengths."""
        ones = jnp.ones((values.shape[0], layout.count))
        record = super().prepare(values, layout, keys, strength)
        return record._replace(strength=ones if strength is None else strength)
