"""What an autoencoder is to the rest."""

from typing import Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Bool, Float

from dit_video.errors import UserError
from dit_video.tokens import Grid


@runtime_checkable
class Autoencoder(Protocol):
    """Clips to latents and back. Latents are normalised: about zero mean and unit variance in every channel."""

    def encode(
        self, pixels: Float[Array, "B T H W 3"], inside: Bool[Array, "B h w"] | None = None
    ) -> Float[Array, "B t h w c"]:
        """`inside`: which latent positions belong to a clip; those of several, a position apart, share a canvas."""
        ...

    def decode(self, latents: Float[Array, "B t h w c"]) -> Float[Array, "B T H W 3"]: ...


@runtime_checkable
class AutoencoderConfig(Protocol):
    """The config of an autoencoder: makes its module, and knows the size of its latents."""

    @property
    def stride(self) -> Grid:
        """Pixels for one latent along (t, h, w); the first frame has a latent frame of its own."""
        ...

    @property
    def channels(self) -> int: ...

    def make(self, rngs: nnx.Rngs) -> nnx.Module: ...


def latent_grid(clip: Grid, stride: Grid) -> Grid:
    """The latent size of a clip of `T H W` pixels.

    Raises:
      UserError: a length that is not 1 + k * temporal stride, or a size that the spatial stride does not divide.
    """
    if clip.t < 1 or (clip.t - 1) % stride.t:
        below = max(1, clip.t - (clip.t - 1) % stride.t)
        raise UserError(
            f"T={clip.t} is not 1 + {stride.t}k for temporal stride {stride.t}; use {below} or {below + stride.t}"
        )
    for name, length, step in (("height", clip.h, stride.h), ("width", clip.w, stride.w)):
        if length < 1 or length % step:
            below = max(step, length - length % step)
            raise UserError(
                f"{name} {length} is not divisible by the spatial stride {step}; use {below} or {below + step}"
            )
    return Grid(1 + (clip.t - 1) // stride.t, clip.h // stride.h, clip.w // stride.w)


def clip_grid(latents: Grid, stride: Grid) -> Grid:
    """The clip size of latents: the inverse of `latent_grid`."""
    return Grid(1 + (latents.t - 1) * stride.t, latents.h * stride.h, latents.w * stride.w)
