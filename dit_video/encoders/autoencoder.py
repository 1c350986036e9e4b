"""Trained autoencoder in use: clips to latents and back."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.autoencoders import AutoencoderConfig, Tiles, decode_stream, encode_stream, latent_grid
from dit_video.autoencoders.streaming import OptionalSharding
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import count_values as count
from dit_video.core.trees import flatten
from dit_video.tokens import Grid
from dit_video.video import Clip

CHUNK_PIXELS = 1 << 24
"""Approximate number of pixels that are coded at once, over all frames and clips; longer clips are coded in chunks."""


class LatentCodec:
    """An autoencoder with its parameters.

    Long clips are coded in chunks of frames, with the same result as at once; memory does not grow with their length.

    Args:
      config: the autoencoder's config.
      params: its parameters, a nested dictionary of arrays.
      tiles: how frames that do not fit into memory are tiled; see `Tiles` for the cost.
      sharding: devices that the height of a frame is sharded over; see `decode_stream`.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        params: dict[str, Any],
        *,
        tiles: Tiles | None = None,
        sharding: OptionalSharding = None,
    ):
        self.config, self.params = config, params
        self._options: dict[str, Any] = {"tiles": tiles, "sharding": sharding}

    def encode(self, clip: Clip) -> Float32[np.ndarray, "t h w c"]:
        """Encode a clip, whose size fits the stride, to normalised latents.

        Raises:
          UserError: the size does not fit.
        """
        return self.encode_pixels(clip.frames)

    def encode_pixels(
        self, pixels: UInt8[np.ndarray, "T H W 3"] | Float32[np.ndarray, "T H W 3"]
    ) -> Float32[np.ndarray, "t h w c"]:
        """Encode pixels in 0..255, not necessarily whole numbers, to normalised latents; raises as `encode` does."""
        grid = latent_grid(Grid(*pixels.shape[:3]), self.config.stride)
        chunk = self._get_chunk_length(1, grid)
        chunks = encode_stream(self.config, self.params, [pixels[None]], chunk=chunk, **self._options)
        return np.concatenate(list(chunks), axis=1)[0]

    def decode(self, latents: Float32[np.ndarray, "t h w c"], *, fps: float, caption: str = "", seed: int = 0) -> Clip:
        """Decode normalised latents to a clip; `seed` is for decoders that take noise.

        Raises:
          UserError: latents with another number of channels, or that are not finite.
        """
        channels, shape = self.config.channels, np.shape(latents)
        if len(shape) != 4 or shape[-1] != channels:
            raise UserError(f"latents of shape {list(shape)} are invalid: this autoencoder decodes [t h w {channels}]")
        if not np.isfinite(latents).all():
            raise UserError("the latents hold NaN or infinity; check the model or the file that they come from")
        return Clip(frames=self.decode_many(latents[None], seeds=[seed])[0], fps=fps, caption=caption)

    def decode_many(
        self, latents: Float32[np.ndarray, "B t h w c"], *, seeds: Sequence[int] | None = None
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """Return the frames of several clips of one size."""
        return np.concatenate(list(self.decode_chunks(latents, seeds=seeds)), axis=1)

    def decode_chunks(
        self, latents: Float32[np.ndarray, "B t h w c"], *, seeds: Sequence[int] | None = None
    ) -> Iterator[UInt8[np.ndarray, "B _ H W 3"]]:
        """Yield the frames of `decode_many` in chunks, for clips that are written as they are decoded."""
        values = np.asarray(latents, np.float32)
        chunk = self._get_chunk_length(len(values), Grid(*values.shape[1:4]))
        return decode_stream(self.config, self.params, values, chunk=chunk, seeds=seeds, **self._options)

    def reconstruct(self, clip: Clip) -> Clip:
        """Encode and decode a clip."""
        return replace(clip, frames=self.decode(self.encode(clip), fps=clip.fps).frames)

    def count_parameters(self) -> int:
        """Return the number of parameters."""
        return count(self.params)

    def _get_chunk_length(self, clips: int, latents: Grid) -> int:
        """Return the number of latent frames that are coded at once."""
        frame_pixels = clips * self.config.stride.volume * latents.h * latents.w
        return min(latents.t, max(1, CHUNK_PIXELS // frame_pixels))


def compute_autoencoder_identity(config: AutoencoderConfig, params: dict[str, Any]) -> str:
    """Return a hash of an autoencoder's config and weights: latents of one autoencoder are of no use to another.

    Options at their default do not count, so that a new option leaves existing latents valid; nor do those that only
    change how the same values are computed (the field's metadata has `how`).
    """
    chosen = {
        field.name: config_json.to_json(getattr(config, field.name))
        for field in fields(cast(Any, config))
        if not field.metadata.get("how") and getattr(config, field.name) != field.default
    }
    digest = hashlib.sha256(f"{type(config).__qualname__} {chosen}".encode())
    for name, leaf in sorted(flatten(params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
