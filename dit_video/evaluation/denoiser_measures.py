"""Measurements of the denoiser itself on data clips: their latents, captions and noise."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from dit_video.evaluation.clip_set import hash_clip
from dit_video.evaluation.protocol import ClipSampling, needs_first_frame
from dit_video.sampling.clip_functions import ClipFunction
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip


def measure_clips(
    pipeline: Pipeline, clips: Sequence[Clip], function: ClipFunction, *, seed: int
) -> Float32[np.ndarray, "clips values"]:
    """Return a denoiser function's values for every clip, under its caption.

    The autoencoder encodes clips to the mean of their posterior. Random numbers depend only on the seed and the clip's
    pixels, so they are the same for all models and any order of the clips. A model that always has a first frame gets
    the clip's.

    Args:
      pipeline: The model.
      clips: Clips of any sizes; frames and borders beyond a multiple of the model's size steps are cut off.
      function: The function.
      seed: Seed of its random numbers.

    Raises:
      UserError: If a clip is smaller than a size step, or the model does not accept a caption.
    """
    if not clips:
        return np.zeros((0, 0), np.float32)
    cut = [_cut_clip(pipeline.config, clip) for clip in clips]
    requests = [
        Request(
            clip.caption,
            Grid(*clip.frames.shape[:3]),
            seed=zlib.crc32(f"{seed} {hash_clip(clip)}".encode()),
            image=clip.frames[0] if needs_first_frame(pipeline) else None,
        )
        for clip in cut
    ]
    return pipeline.compute_clip_function(function, requests, [pipeline.encode(clip) for clip in cut])


def _cut_clip(config: PipelineConfig, clip: Clip) -> Clip:
    stride, step = config.model.autoencoder.stride, config.model.backbone.size_multiple
    return ClipSampling(multiple=(stride.t, stride.h * step.h, stride.w * step.w)).sample(clip, seed=0, number=0)
