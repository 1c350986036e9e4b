"""Reference frames as extra tokens of a clip, as a file of another package."""

from dataclasses import dataclass

import numpy as np

from dit_video.core.registry import register
from dit_video.models.conditioning import ClipConditioning
from dit_video.nn import Linear
from dit_video.tokens import Field, Grid, compute_positions

GRID = Grid(1, 4, 4)


@register
@dataclass(frozen=True, kw_only=True)
class ReferenceFrame(ClipConditioning):
    """Colours of a frame on a grid of 4 by 4, whose tokens lie before the first frame."""

    field = Field(name="reference", alignment="extra", shape=(3,), length=GRID.volume)

    def from_clip(self, view):
        return self.from_request(view.frames[-1], view.latents)

    def from_request(self, value, latents):
        height, width, _ = value.shape
        patches = value.reshape(GRID.h, height // GRID.h, GRID.w, width // GRID.w, 3).mean(axis=(1, 3))
        return (patches.reshape(-1, 3) / 127.5 - 1).astype(np.float32)

    def make_positions(self):
        return compute_positions(GRID) - np.asarray([1, 0, 0], np.float32)

    def make_embedding(self, width, *, patch, dtype, partitioner, rngs):
        return Linear(3, width, dtype=dtype, partitioner=partitioner, rngs=rngs)
