"""What clips are given besides their prompts, and the rows that hold it: images, and latent frames that are known."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from dit_video.backbones.dit import Given
from dit_video.core.typing import AnyArray
from dit_video.diffusion import Process
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
        fields = {"latents": self.beside, "image": self.image, "image_segments": self.image_segments}
        return Given(**{name: jnp.asarray(value) for name, value in fields.items() if value is not None})

    def held(self, denoise: Callable[[Array, Array], Array], process: Process) -> Callable[[Array, Array], Array]:
        """`denoise(noisy, time of each token)` as one of the time, which sees known tokens clean, at time 0."""

        def at(noisy, time):
            times = jnp.full(noisy.shape[:2], time)
            if self.known is None or self.clean is None:
                return denoise(noisy, times)
            clean = process.input_scale(jnp.zeros(())) * jnp.asarray(self.clean)
            return denoise(jnp.where(self.known[..., None], clean, noisy), jnp.where(self.known, 0.0, times))

        return at

    def restored(self, tokens: Float[AnyArray, "*steps B N p"]) -> Float[AnyArray, "*steps B N p"]:
        """With the known tokens in their places."""
        if self.known is None or self.clean is None:
            return tokens
        return jnp.where(self.known[..., None], self.clean, tokens)


def given_rows(
    members: Sequence[Sequence[tuple[GivenClip, Grid, int]]], *, patch: Grid, shape: RowShape, rows: int
) -> GivenRows:
    """What `rows` rows of `shape` are given: of each row's clips with their latents' sizes and channels, in order."""
    channels = members[0][0][2]
    fields: dict[str, np.ndarray] = {}
    beside = [[patchify(clip.beside, patch) for clip, *_ in row if clip.beside is not None] for row in members]
    if beside[0]:
        fields["beside"] = _filled(beside, shape.tokens, rows)
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
