"""Interface of autoencoders, and the sizes of clips and their latents."""

from typing import Protocol, runtime_checkable

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
    """An autoencoder of clips, whose latents have about zero mean and unit variance in every channel."""

    def encode(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Latents:
        """Encode a clip, or one chunk of it given the cache left by the previous chunk.

        `segment_ids` names the clip of each latent position where several share a canvas, one position or more apart:
        1, 2, …, and 0 for padding.
        """
        ...

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Decode a clip, or one chunk of it given the cache left by the previous chunk."""
        ...


@runtime_checkable
class AutoencoderConfig(Protocol):
    """The configuration of an autoencoder: makes its module and knows the size of its latents."""

    def __hash__(self) -> int: ...

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w); the first frame has a latent frame of its own."""
        ...

    @property
    def channels(self) -> int:
        """Return the channels of the latents."""
        ...

    @property
    def last_layer(self) -> str:
        """Return the path of the parameter that makes the pixels: the decoder's last kernel."""
        ...

    def make(self, rngs: nnx.Rngs) -> nnx.Module: ...


@runtime_checkable
class NoisyAutoencoderConfig(AutoencoderConfig, Protocol):
    """The configuration of an autoencoder whose decoder is also a denoiser: it takes a time and noise.

    Its module is called as `decode(latents, cache, time=…, keys=…)`, with one key for each clip and chunk.
    """

    @property
    def decode_time(self) -> float:
        """Return the diffusion time at which latents are decoded."""
        ...


@runtime_checkable
class SymmetricAutoencoderConfig(AutoencoderConfig, Protocol):
    """The configuration of an autoencoder whose decoder sees later frames, too: it decodes clips as a whole."""

    @property
    def is_decoder_symmetric(self) -> bool:
        """Return True if decoded frames depend on later latents."""
        ...


def decodes_whole_clips(config: AutoencoderConfig) -> bool:
    """Return True for an autoencoder whose decoder gets all latents of a clip at once."""
    return isinstance(config, SymmetricAutoencoderConfig) and config.is_decoder_symmetric


def latent_grid(clip: Grid, stride: Grid) -> Grid:
    """Return the latent size of a clip of `T H W` pixels.

    Raises:
      UserError: a length other than 1 + k * temporal stride, or a size that the spatial stride does not divide.
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
      UserError: a first chunk that `latent_grid` rejects, or later frames that the temporal stride does not divide.
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
