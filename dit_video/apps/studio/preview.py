"""Previews of a clip while it is sampled, as animated pictures that a page can show."""

import io
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.preview import PreviewDecoder, PreviewFit
from dit_video.sampling.progress import PipelineProgress
from dit_video.tokens import Grid
from dit_video.video import Clip

MAX_SIDE = 320
"""Maximum pixels of a side of a preview."""
MAX_FRAMES = 48
"""Maximum number of frames of a preview, evenly spaced."""
MIN_SECONDS = 0.15
"""Minimum seconds between two previews of a job."""


def encode_preview(clip: Clip) -> bytes:
    """Return an animated WebP that repeats for ever."""
    step = -(-len(clip.frames) // MAX_FRAMES)
    pictures = [Image.fromarray(frame) for frame in clip.frames[::step]]
    buffer = io.BytesIO()
    duration = max(20, round(1000 * step / clip.fps))
    pictures[0].save(
        buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=80, method=0
    )
    return buffer.getvalue()


class Previewer:
    """The previews of a model: by its own preview decoder, or by one that is fitted to the clips that it makes."""

    def __init__(self) -> None:
        self._fit: PreviewFit | None = None
        self._decoder: PreviewDecoder | None = None
        self._last_time = 0.0
        self._latents: dict[int, np.ndarray] | None = None

    def start(self, pipeline: Pipeline) -> Pipeline:
        """Begin a job, and return the pipeline with the fitted preview decoder if it has none of its own."""
        self._last_time = 0.0
        self._latents = {} if pipeline.preview_decoder is None else None
        return pipeline if self._latents is None else pipeline.with_preview_decoder(self._decoder)

    def make_preview(self, progress: PipelineProgress) -> bytes | None:
        """Return a preview of the first clip of a job; None if there is no decoder, or the last one is too recent."""
        is_last = progress.step == progress.steps
        if is_last and self._latents is not None:
            self._latents |= progress.progress.estimate_latents()
        is_recent = time.perf_counter() - self._last_time < MIN_SECONDS
        if progress.preview_decoder is None or is_last or is_recent:
            return None
        clips = progress.quick_preview(max_side=MAX_SIDE)
        self._last_time = time.perf_counter()
        return encode_preview(clips[min(clips)])

    def learn(self, stride: Grid, clips: Sequence[Clip]) -> None:
        """Fit the preview decoder to finished clips of a model that has none, so that the next job has previews.

        Clips that a task has changed since they were decoded are left out.

        Args:
          stride: stride of the autoencoder.
          clips: clips of the job.
        """
        for number, latents in (self._latents or {}).items():
            t, h, w, channels = latents.shape
            size = (1 + (t - 1) * stride.t, h * stride.h, w * stride.w)
            if number < len(clips) and clips[number].frames.shape[:3] == size and np.isfinite(latents).all():
                self._fit = self._fit or PreviewFit(stride, channels)
                self._fit.add(latents, clips[number].frames)
                self._decoder = self._fit.solve()
        self._latents = None
