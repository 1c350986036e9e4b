"""Interface of autoencoders, the sizes of clips and their latents, and the base of variational autoencoders."""

import abc
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.core.errors import UserError
from dit_video.nn import ConvCache
from dit_video.tokens import Grid

Pixels = Float[Array, "B T H W 3"]
"""Clips, with pixels in [-1, 1]."""
Latents = Float[Array, "B t h w c"]
SegmentIds = Int[Array, "B h w"] | Bool[Array, "B h w"] | None
"""Clip of each latent position of canvases that several clips share; None if each clip has its own."""


@runtime_checkable
class Autoencoder(Protocol):
    """An autoencoder of clips, whose latents have about zero mean and unit variance in every channel.

    A model may have a `normalizer` (`Normalizer`), which `encode` and `decode` apply. It is measured at the end of the
    training; without one, the latents are as the training has left them.
    """

    def encode(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Latents:
        """Encode a clip, or one chunk of it given the cache left by the previous chunk.

        `segment_ids` names the clip of each latent position where several share a canvas, one position or more apart:
        1, 2, …, and 0 for padding.
        """
        ...

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Decode a clip, or one chunk of it given the cache left by the previous chunk."""
        ...


def latent_grid(clip: Grid, stride: Grid) -> Grid:
    """Return the latent size of a clip of `T H W` pixels.

    Raises:
      UserError: If the length is not 1 + k * temporal stride, or the spatial stride does not divide the size.
    """
    if clip.t < 1 or (clip.t - 1) % stride.t:
        below = max(1, clip.t - (clip.t - 1) % stride.t)
        raise UserError(
            f"T={clip.t} is not 1 + {stride.t}k for temporal stride {stride.t}; use {below} or {below + stride.t}"
        )
    _check_divisible(f"height {clip.h}", clip.h, "spatial", stride.h)
    _check_divisible(f"width {clip.w}", clip.w, "spatial", stride.w)
    return Grid(1 + (clip.t - 1) // stride.t, clip.h // stride.h, clip.w // stride.w)


def chunk_grid(chunk: Grid, stride: Grid, *, is_first: bool) -> Grid:
    """Return the latent size of a chunk of a clip: its first frames, or frames that follow.

    Raises:
      UserError: If `latent_grid` rejects a first chunk, or the temporal stride does not divide later frames.
    """
    if is_first:
        return latent_grid(chunk, stride)
    _check_divisible(f"a chunk of {chunk.t} frames after a clip's first", chunk.t, "temporal", stride.t)
    frame = latent_grid(Grid(1, chunk.h, chunk.w), stride)
    return frame._replace(t=chunk.t // stride.t)


def _check_divisible(subject: str, length: int, axis: str, step: int) -> None:
    if length < 1 or length % step:
        below = max(step, length - length % step)
        raise UserError(f"{subject} is not divisible by the {axis} stride {step}; use {below} or {below + step}")


_LOG_VARIANCE_BOUNDS = (-30.0, 20.0)
"""Bounds of the log variance, as in the open models."""


class Posterior(NamedTuple):
    """A diagonal normal distribution over unnormalised latents."""

    mean: Latents
    log_variance: Latents
    """Logarithm of the variance of each value."""

    @classmethod
    def from_moments(cls, moments: Float[Array, "B t h w _"], std: float | None) -> "Posterior":
        """Split moments along channels into mean and log variance, which is bounded as in the open models.

        Args:
          moments: Means of all channels, then their log variances.
          std: Standard deviation of all values instead, 0 for none; None for that of the moments.
        """
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        if std is not None:
            log_variance = jnp.full_like(mean, 2 * math.log(std) if std else -math.inf)
        return cls(mean, jnp.clip(log_variance, *_LOG_VARIANCE_BOUNDS))

    def sample(self, noise: Latents) -> Latents:
        """Return latents for standard normal noise."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Array, " B"]:
        """Return the divergence from the standard normal in nats, summed over channels, averaged over positions."""
        values = 0.5 * (jnp.square(self.mean) + jnp.exp(self.log_variance) - 1 - self.log_variance)
        return values.sum(axis=-1).mean(axis=(1, 2, 3))


class Normalizer(nnx.Module):
    """Mean and standard deviation of each latent channel, measured on training clips after the training.

    They are the parameters `normalizer/mean` and `normalizer/std`. An optimizer that does not train them keeps them as
    they are.
    """

    def __init__(self, channels: int):
        self.mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.std = nnx.Param(jnp.ones((channels,), jnp.float32))

    def normalize(self, latents: Latents) -> Latents:
        """Return latents with zero mean and unit variance in every channel."""
        return (latents - self.mean[...]) / self.std[...]

    def denormalize(self, latents: Latents) -> Latents:
        """Return latents in the autoencoder's own scale."""
        return latents * self.std[...] + self.mean[...]


def check_std(std: float | None) -> None:
    """Check the fixed standard deviation of a config.

    Raises:
      UserError: If it is negative or infinite.
    """
    if std is not None and not 0 <= std < math.inf:
        raise UserError(f"std={std} is invalid: must be finite and not negative. None learns it")


class Vae(nnx.Module):
    """A variational autoencoder, from `posterior` and `reconstruct`: `encode` returns the posterior's normalised mean.

    It is trained by the divergence of the posterior (`KlLoss`), and knows nothing of normalised latents then: their
    mean and deviation are measured at the end. Layers with a cache, such as `nn.CausalConv`, make it stream.
    """

    normalizer: Normalizer
    """Mean and deviation of the posterior's means, which a subclass makes: `Normalizer(channels)`."""

    @abc.abstractmethod
    def posterior(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Posterior:
        """Return the distribution of latents before normalisation. See `encode` for the arguments."""

    @abc.abstractmethod
    def reconstruct(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels from latents that are not normalised."""

    def encode(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Latents:
        """Return normalised latents.

        Args:
          pixels: Clips, canvases that several clips share (see `dit_video.models.autoencoders.canvas`), or a chunk of
            them: 1 + k * temporal stride frames of a clip's start, then multiples of the temporal stride.
          segment_ids: Clip of each latent position of a canvas; 0 is padding. Clips, one position or more apart, do
            not see each other: they get the latents that they get alone.
          cache: Cache left by the previous chunk.

        Raises:
          UserError: If the size does not fit the stride, or the pixels are not RGB.
        """
        return self.normalizer.normalize(self.posterior(pixels, segment_ids, cache).mean)

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels, approximately in [-1, 1], of the normalised latents of a clip or of one chunk of it."""
        return self.reconstruct(self.normalizer.denormalize(latents), cache)
