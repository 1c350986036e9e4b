"""Conditioning on motion vectors of a column of the data set, as a file of another package."""

from dataclasses import dataclass

import numpy as np

from dit_video.core.registry import register
from dit_video.models.conditioning import ClipConditioning
from dit_video.tokens import Field


@register
@dataclass(frozen=True, kw_only=True)
class MotionVectors(ClipConditioning):
    """Mean motion (down, right) of every latent frame; the column has one for every frame of the file."""

    field = Field(name="motion", alignment="frame", shape=(2,))
    column: str = "motion_vectors"

    @property
    def columns(self):
        return (self.column,)

    def from_clip(self, view):
        first = view.start + np.arange(view.latents.t) * view.stride.t  # the first latent frame has one frame
        vectors = np.reshape(view.columns[self.column], (-1, 2))[np.rint(first * view.frame_stride).astype(int)]
        return self.from_request(vectors * ([1, -1] if view.is_flipped else [1, 1]), view.latents)

    def from_request(self, value, latents):
        return np.broadcast_to(np.asarray(value, np.float32), (latents.t, 2))
