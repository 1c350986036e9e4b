"""What clips are given besides their prompts, and the rows that hold it: images, and latent frames that are known."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from dit_video.arrays import AnyArray
from dit_video.dit import Given
from dit_video.tokens import Grid, RowShape, patchify


class GivenClip(NamedTuple):
    """What one clip is given, each None where it is given none. All clips of a model are given the first two alike."""

    beside: Float32[np.ndarray, "t h w g"] | None = None
    """mask channels and clean latents, which the model reads beside the noisy ones"""
    image: Float32[np.ndarray, "i F"] | None = None
    """an image encoder's tokens"""
    known: Float32[np.ndarray, "f h w c"] | None = None
    """the first latent frames, if they are to stay what they are: the model sees them clean, at time 0"""


class GivenRows(NamedTuple):
    """The same of packed rows."""

    beside: Float[AnyArray, "B N g"] | None = None
    image: Float[AnyArray, "B I F"] | None = None
    image_segments: Int[AnyArray, "B I"] | None = None
    clean: Float[AnyArray, "B N p"] | None = None
    """the known tokens, in their places"""
    known: Bool[AnyArray, "B N"] | None = None

    @property
    def given(self) -> Given:
        return Given(latents=self.beside, image=self.image, image_segments=self.image_segments)

    def held(self, denoise: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
        """`denoise(noisy, time of each token)` as one of the time, which sees known tokens clean, at time 0."""

        def at(noisy, time):
            times = jnp.full(noisy.shape[:2], time)
            if self.known is not None:
                times = jnp.where(self.known, 0.0, times)
            return denoise(self.restored(noisy), times)

        return at

    def restored(self, tokens: Float[Array, "B N p"]) -> Float[Array, "B N p"]:
        """With the known tokens in their places."""
        return tokens if self.known is None else jnp.where(self.known[..., None], self.clean, tokens)


def given_rows(
    members: Sequence[Sequence[tuple[GivenClip, Grid, int]]], *, patch: Grid, shape: RowShape, rows: int
) -> GivenRows:
    """What `rows` rows of `shape` are given: of each row's clips with their latents' sizes and channels, in order."""
    first, _, channels = members[0][0]
    fields: dict[str, np.ndarray] = {}
    if first.beside is not None:
        values = [[patchify(clip.beside, patch) for clip, *_ in row] for row in members]
        fields["beside"] = _filled(values, shape.tokens, rows)
    if first.image is not None:
        length = shape.segments * len(first.image)
        fields["image"] = _filled([[clip.image for clip, *_ in row] for row in members], length, rows)
        ids = [[np.full((len(first.image), 1), number) for number, _ in enumerate(row, 1)] for row in members]
        fields["image_segments"] = _filled(ids, length, rows)[..., 0].astype(np.int32)
    if any(clip.known is not None for row in members for clip, *_ in row):
        values = [[patchify(_marked(clip.known, grid, channels), patch) for clip, grid, _ in row] for row in members]
        filled = _filled(values, shape.tokens, rows).reshape(rows, shape.tokens, patch.volume, channels + 1)
        fields["clean"] = filled[..., :-1].reshape(rows, shape.tokens, -1)
        fields["known"] = filled[..., 0, -1] > 0
    return GivenRows(**fields)


def _marked(known: Float32[np.ndarray, "f h w c"] | None, grid: Grid, channels: int) -> Float32[np.ndarray, "t h w c1"]:
    """A whole clip's latents, zero where they are not known, and a channel that says where they are."""
    whole = np.zeros((*grid, channels + 1), np.float32)
    if known is not None:
        whole[: len(known), ..., :-1], whole[: len(known), ..., -1] = known, 1
    return whole


def _filled(values: list[list[np.ndarray]], length: int, rows: int) -> Float32[np.ndarray, "B _ _"]:
    """Each row's arrays one after the other, and zeros."""
    filled = np.zeros((rows, length, values[0][0].shape[1]), np.float32)
    for row, arrays in zip(filled, values, strict=False):
        joined = np.concatenate(arrays)
        row[: len(joined)] = joined
    return filled
