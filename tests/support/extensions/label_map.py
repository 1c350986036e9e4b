"""Conditioning on a map of labels, which are numbers of rows in a table, as a file of another package."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_video.core.registry import register
from dit_video.models.conditioning import ClipConditioning
from dit_video.tokens import Field


@register
@dataclass(frozen=True, kw_only=True)
class LabelMap(ClipConditioning):
    """Number of the brightest channel of the pixels of every latent, from 1; 0 where it is not known."""

    field = Field(name="labels", alignment="grid", dtype="int32")

    def from_clip(self, view):
        frames = view.frames[np.linspace(0, len(view.frames) - 1, view.latents.t).round().astype(int)]
        blocks = frames.reshape(view.latents.t, view.latents.h, view.stride.h, view.latents.w, view.stride.w, 3)
        return self.from_request(1 + blocks.mean(axis=(2, 4)).argmax(axis=-1), view.latents)

    def from_request(self, value, latents):
        return np.asarray(value, np.int32)

    def make_embedding(self, width, *, patch, dtype, partitioner, rngs):
        return Table(4, patch.volume, width, rngs)


class Table(nnx.Module):
    """The sum over a patch's positions of the rows of their labels."""

    def __init__(self, labels, positions, width, rngs):
        self.rows = nnx.Param(jax.random.normal(rngs.params(), (positions, labels, width)))

    def __call__(self, values):
        return self.rows[...][jnp.arange(values.shape[-1]), values].sum(axis=-2)
