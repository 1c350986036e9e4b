"""The frames of clips through a vision tower, in batches of two sizes."""

from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.features.clip.images import ClipImages, prepare
from dit_video.features.clip.vision import ClipVisionConfig
from dit_video.nn import graph_of

Part = Literal["values", "before", "pooled", "projected"]
"""of `VisionFeatures`"""


class FrameEncoder:
    """One part of what a vision tower makes of each frame: `encode(frames)`. Threads may share it."""

    def __init__(
        self, config: ClipVisionConfig, params: Any, images: ClipImages, *, part: Part = "projected", batch: int = 16
    ):
        """From what `weights.load_clip_vision` gives.

        Args:
          config: the tower's.
          params: its parameters, a nested dictionary.
          images: how frames become its images.
          part: what is wanted; Wan's image-to-video takes `before`.
          batch: frames at a time.

        Raises:
          UserError: a part that the tower has no map to, images of another size than it reads, or a batch of none.
        """
        if part == "projected" and config.projection is None:
            raise UserError("this vision tower has no projection; use part='pooled', or a folder with one")
        if images.crop not in (None, (config.size, config.size)):
            raise UserError(f"the vision tower reads {config.size}x{config.size}, images are cropped to {images.crop}")
        if batch < 1:
            raise UserError(f"a batch has at least one frame, not {batch}")
        graph = graph_of(config.make)
        self._params, self._images, self._batch = params, images, batch
        self._encode = jax.jit(lambda params, images: getattr(nnx.merge(graph, params)(images), part))

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T *part"]:
        """Of each frame: a vector, or one for each token.

        Raises:
          UserError: no frames, or ones that don't become images of the tower's size.
        """
        if not len(frames):
            raise UserError("a clip of no frames has no features; give at least one")
        return np.concatenate([self._of(frames[at : at + self._batch]) for at in range(0, len(frames), self._batch)])

    def _of(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T *part"]:
        images = prepare(frames, self._images)
        # Filled up for the computation only: a single image and a full batch are two programs for clips of any length.
        missing = 0 if len(images) == 1 else self._batch - len(images)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return np.asarray(self._encode(self._params, images), np.float32)[: len(frames)]
