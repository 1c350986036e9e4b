"""Trained autoencoder in use: clips to latents and back."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.offload import move_to_devices
from dit_video.core.platform.devices import get_memory_limits
from dit_video.core.trees import count_values as count
from dit_video.core.trees import flatten
from dit_video.models.autoencoders import AutoencoderConfig, Tiles, decode_stream, encode_stream, latent_grid
from dit_video.models.autoencoders.streaming import OptionalSharding, estimate_chunk_bytes
from dit_video.tokens import Grid
from dit_video.video import Clip

_DEFAULT_MEMORY, _DEVICE_SHARE = 8 * 2**30, 0.5
"""Bytes that coding may take by default, and the largest share of a device's memory. Few frames of 480p keep a device
busy, so that longer chunks gain little. These are estimates: programs of Wan's autoencoder for TPUs, which pad channels
to 128, take up to twice as much."""
_MAX_PIXEL_BYTES = 8192
"""Bytes per pixel that are enough for any autoencoder: what then fits is coded at once without an estimate."""


class LatentCodec:
    """An autoencoder with its parameters.

    Long clips are coded in chunks of as many latent frames as the memory allows by an estimate, with the same result as
    at once.

    Args:
      config: The autoencoder's config.
      params: Its parameters, a nested dictionary of arrays; those in host memory are copied to the device for each
        call.
      memory: Bytes that coding may take on a device besides the parameters; by default 8 GiB, or half of the device's
        memory if that is less.
      tiles: How frames that do not fit into memory are tiled; see `Tiles` for the cost.
      sharding: Devices that the height of a frame is sharded over; see `decode_stream`.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        params: dict[str, Any],
        *,
        memory: int | None = None,
        tiles: Tiles | None = None,
        sharding: OptionalSharding = None,
    ):
        self.config, self.params, self.memory, self.tiles = config, params, memory, tiles
        self._options: dict[str, Any] = {"tiles": tiles, "sharding": sharding}

    def encode(self, clip: Clip) -> Float32[np.ndarray, "t h w c"]:
        """Encode a clip, whose size fits the stride, to normalised latents.

        Raises:
          UserError: If the size does not fit.
        """
        return self.encode_pixels(clip.frames)

    def encode_pixels(
        self, pixels: UInt8[np.ndarray, "T H W 3"] | Float32[np.ndarray, "T H W 3"]
    ) -> Float32[np.ndarray, "t h w c"]:
        """Encode pixels in 0..255, not necessarily whole numbers, to normalised latents; raises as `encode` does."""
        grid = latent_grid(Grid(*pixels.shape[:3]), self.config.stride)
        chunk = self.get_chunk_length("encode", 1, grid)
        with move_to_devices(self.params) as params:
            chunks = encode_stream(self.config, params, [pixels[None]], chunk=chunk, **self._options)
            return np.concatenate(list(chunks), axis=1)[0]

    def decode(self, latents: Float32[np.ndarray, "t h w c"], *, fps: float, caption: str = "", seed: int = 0) -> Clip:
        """Decode normalised latents to a clip; `seed` is for decoders that take noise.

        Raises:
          UserError: If latents have another number of channels, or are not finite.
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
        chunk = self.get_chunk_length("decode", len(values), Grid(*values.shape[1:4]))
        with move_to_devices(self.params) as params:
            yield from decode_stream(self.config, params, [values], chunk=chunk, seeds=seeds, **self._options)

    def reconstruct(self, clip: Clip) -> Clip:
        """Encode and decode a clip."""
        return replace(clip, frames=self.decode(self.encode(clip), fps=clip.fps).frames)

    def count_parameters(self) -> int:
        """Return the number of parameters."""
        return count(self.params)

    def get_chunk_length(self, method: str, clips: int, latents: Grid) -> int:
        """Return the number of latent frames of `clips` clips that `encode` or `decode` codes at once.

        Raises:
          UserError: If the memory does not allow a single one.
        """
        memory = compute_default_memory(get_memory_limits().device) if self.memory is None else self.memory
        sharding, tiles = self._options["sharding"], self.tiles
        devices = 1 if sharding is None else sharding.num_devices
        pixels = clips * latents.volume * self.config.stride.volume
        if pixels * _MAX_PIXEL_BYTES <= memory * devices:
            return latents.t
        if tiles is not None:
            stride = self.config.stride
            height, width = min(latents.h, tiles.height // stride.h), min(latents.w, tiles.width // stride.w)
            latents = latents._replace(h=height, w=width)
        needed, count = fit_chunk(self.config, method, clips, latents, memory * devices)
        if needed > memory * devices and self.memory is not None:
            shortest = "all latent frames" if count == latents.t > 1 else "one latent frame"
            raise UserError(
                f"memory={memory} is invalid: to {method} {shortest} of {clips} clips takes about {needed} bytes. "
                "Use at least these, or smaller tiles"
            )
        return count


def fit_chunk(config: AutoencoderConfig, method: str, clips: int, latents: Grid, memory: int) -> tuple[int, int]:
    """Return the estimated bytes of the shortest chunk of latents, and the longest chunk that the memory allows.

    The shortest chunk is one latent frame, or the whole clip for a decoder that sees later frames; the longest one is
    at least as long.
    """
    if method == "decode" and config.is_decoder_symmetric:
        return estimate_chunk_bytes(config, method, clips, latents), latents.t
    one, two = (estimate_chunk_bytes(config, method, clips, latents._replace(t=count)) for count in (1, 2))
    return one, min(latents.t, 1 + max(0, memory - one) // max(1, two - one))


def compute_default_memory(device_memory: int | None) -> int:
    """Return the bytes that coding may take by default on a device with this memory, None if unknown."""
    return _DEFAULT_MEMORY if device_memory is None else min(_DEFAULT_MEMORY, int(_DEVICE_SHARE * device_memory))


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
