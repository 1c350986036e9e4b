"""Features of clips' frames from a vision tower, in batches of two sizes."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.offload import move_to_devices
from dit_video.models.features.clip.images import ClipImageProcessor, preprocess_frames
from dit_video.models.features.clip.vision import ClipVisionConfig
from dit_video.nn import get_graph_def

FeatureName = Literal["values", "penultimate", "pooled", "projected"]
"""Name of a field of `ClipFeatures`."""


def make_frame_program(config: ClipVisionConfig, feature: FeatureName) -> Callable[..., Any]:
    """Return the jitted function from parameters and preprocessed images `B h w 3` to one feature of each image."""
    graph = get_graph_def(config.make)
    return jax.jit(lambda params, images: getattr(nnx.merge(graph, params)(images), feature))


class FrameEncoder:
    """A function `encode(frames)` that returns one feature of each frame. Threads may share it."""

    def __init__(
        self,
        config: ClipVisionConfig,
        params: Any,
        processor: ClipImageProcessor,
        *,
        feature: FeatureName = "projected",
        batch: int = 16,
    ):
        """Create an encoder; `weights.load_clip_vision` reads config and parameters.

        Args:
          config: configuration of the tower.
          params: its parameters, a nested dictionary; those in host memory are copied to the device for each call.
          processor: preprocessing of frames.
          feature: field of `ClipFeatures` to return; Wan's image-to-video uses `penultimate`.
          batch: frames per batch.

        Raises:
          UserError: a projection that the tower does not have, images of another size than it reads, or an empty batch.
        """
        if feature == "projected" and config.projection is None:
            raise UserError("feature='projected' is invalid: this tower has no projection. Use 'pooled'")
        if processor.crop not in (None, (config.size, config.size)):
            raise UserError(f"crop={processor.crop} is invalid: use the tower's {config.size}x{config.size}")
        check_at_least(1, batch=batch)
        self._params, self._processor, self._batch = params, processor, batch
        self._encode = make_frame_program(config, feature)

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T *part"]:
        """Return the feature of each frame: a vector, or one vector per token.

        Raises:
          UserError: no frames, or frames that the preprocessing does not bring to the tower's size.
        """
        if not len(frames):
            raise UserError("frames are empty: there is nothing to encode. Use at least one frame")
        batches = [frames[start : start + self._batch] for start in range(0, len(frames), self._batch)]
        with move_to_devices(self._params) as params:
            return np.concatenate([self._encode_batch(params, batch) for batch in batches])

    def _encode_batch(self, params: Any, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T *part"]:
        images = preprocess_frames(frames, self._processor)
        # Padded for the computation only: one image and a full batch are two programs for clips of any length.
        missing = 0 if len(images) == 1 else self._batch - len(images)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return np.asarray(self._encode(params, images), np.float32)[: len(frames)]
