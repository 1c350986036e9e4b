"""Conditioning of clips besides their prompts, packed into rows: images and known latent frames."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from dit_video.conditioning import Conditioning, ConditioningLatents, ImageTokens
from dit_video.core.typing import AnyArray
from dit_video.diffusion import DenoiseFn, Process
from dit_video.tokens import Grid, PackedShape, patchify


class GivenClip(NamedTuple):
    """Conditioning of one clip; None for kinds that it lacks.

    All clips of a model have the same of the first two kinds.
    """

    beside: Float32[np.ndarray, "t h w g"] | None = None
    """Mask channels and clean latents, which the model gets as channels in addition to the noisy latents."""
    image: Float32[np.ndarray, "i F"] | None = None
    """Tokens of an image encoder."""
    known: Float32[np.ndarray, "f h w c"] | None = None
    """First latent frames to keep unchanged: the model sees them clean, at time 0."""


class GivenRows(NamedTuple):
    """Conditioning of packed rows."""

    beside: Float[AnyArray, "B N g"] | None = None
    image: Float[AnyArray, "B I F"] | None = None
    image_segments: Int[AnyArray, "B I"] | None = None
    clean: Float[AnyArray, "B N p"] | None = None
    """The known tokens, at their positions."""
    known: Bool[AnyArray, "B N"] | None = None

    @property
    def conditioning(self) -> Conditioning:
        """Return the inputs of the denoiser."""
        conditioning = Conditioning()
        if self.beside is not None:
            conditioning = conditioning.add(ConditioningLatents(jnp.asarray(self.beside)))
        if self.image is not None and self.image_segments is not None:
            tokens = ImageTokens(jnp.asarray(self.image), jnp.asarray(self.image_segments))
            conditioning = conditioning.add(tokens)
        return conditioning

    def held(self, denoise: DenoiseFn, process: Process) -> DenoiseFn:
        """Return a `denoise` of times of tokens as one of a single time, with known tokens clean, at time 0."""

        def denoise_unknown(noisy, time, state):
            times = jnp.full(noisy.shape[:2], time)
            if self.known is None or self.clean is None:
                return denoise(noisy, times, state)
            clean = process.input_scale(jnp.zeros(())) * jnp.asarray(self.clean)
            return denoise(jnp.where(self.known[..., None], clean, noisy), jnp.where(self.known, 0.0, times), state)

        return denoise_unknown

    def restored(self, tokens: Float[AnyArray, "*steps B N p"]) -> Float[AnyArray, "*steps B N p"]:
        """Return the tokens with the known ones restored."""
        if self.known is None or self.clean is None:
            return tokens
        return jnp.where(self.known[..., None], self.clean, tokens)


def given_rows(
    members: Sequence[Sequence[tuple[GivenClip, Grid, int]]], *, patch: Grid, shape: PackedShape, rows: int
) -> GivenRows:
    """Return the conditioning of `rows` rows of `shape`, from each row's clips with their latent grids and channels."""
    channels = members[0][0][2]
    fields: dict[str, np.ndarray] = {}
    cond_latents = [[patchify(clip.beside, patch) for clip, *_ in row if clip.beside is not None] for row in members]
    if cond_latents[0]:
        fields["beside"] = _filled(cond_latents, shape.tokens, rows)
    images = [[clip.image for clip, *_ in row if clip.image is not None] for row in members]
    if images[0]:
        length = shape.segments * len(images[0][0])
        ids = [[np.full((len(image), 1), number) for number, image in enumerate(row, 1)] for row in images]
        fields["image"] = _filled(images, length, rows)
        fields["image_segments"] = _filled(ids, length, rows)[..., 0].astype(np.int32)
    if any(clip.known is not None for row in members for clip, *_ in row):
        values = [[patchify(_marked(clip.known, grid, channels), patch) for clip, grid, _ in row] for row in members]
        filled = _filled(values, shape.tokens, rows).reshape(rows, shape.tokens, patch.volume, channels + 1)
        fields["clean"] = filled[..., :-1].reshape(rows, shape.tokens, -1)
        fields["known"] = filled[..., 0, -1] > 0
    return GivenRows(**fields)


def _marked(known: Float32[np.ndarray, "f h w c"] | None, grid: Grid, channels: int) -> Float32[np.ndarray, "t h w c1"]:
    """Return a clip's latents, zero where they are not known, with a mask channel."""
    latents = np.zeros((*grid, channels + 1), np.float32)
    if known is not None:
        latents[: len(known), ..., :-1], latents[: len(known), ..., -1] = known, 1
    return latents


def _filled(values: list[list[np.ndarray]], length: int, rows: int) -> Float32[np.ndarray, "B _ _"]:
    """Concatenate each row's arrays and pad them with zeros."""
    filled = np.zeros((rows, length, values[0][0].shape[1]), np.float32)
    for row, arrays in zip(filled, values, strict=False):
        joined = np.concatenate(arrays)
        row[: len(joined)] = joined
    return filled
