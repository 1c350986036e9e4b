"""Previews of a clip while it is sampled, as animated pictures that a page can show."""

import io
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from dit_video.encoders.preview import PreviewDecoder, PreviewFit
from dit_video.pipelines.pipeline import Pipeline
from dit_video.pipelines.progress import PipelineProgress
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
        self._latents: dict[int, np.ndarray] = {}

    def start(self) -> None:
        """Begin a job."""
        self._last_time, self._latents = 0.0, {}

    def make_preview(self, pipeline: Pipeline, progress: PipelineProgress) -> bytes | None:
        """Return a preview of the first clip of a job; None if there is no decoder, or the last one is too recent."""
        is_last = progress.step == progress.steps
        if pipeline.preview_decoder is None and is_last:
            self._latents |= progress.progress.estimate_latents()
        decoder = pipeline.preview_decoder or self._decoder
        if decoder is None or is_last or time.perf_counter() - self._last_time < MIN_SECONDS:
            return None
        latents = progress.progress.estimate_latents()
        clip = decoder.decode(latents[min(latents)], fps=pipeline.config.fps, max_side=MAX_SIDE)
        self._last_time = time.perf_counter()
        return encode_preview(clip)

    def learn(self, pipeline: Pipeline, clips: Sequence[Clip]) -> None:
        """Fit the preview decoder to finished clips of a model that has none, so that the next job has previews.

        Clips that a task has changed since they were decoded are left out.
        """
        stride = pipeline.config.autoencoder.stride
        for number, latents in self._latents.items():
            t, h, w, channels = latents.shape
            size = (1 + (t - 1) * stride.t, h * stride.h, w * stride.w)
            if number < len(clips) and clips[number].frames.shape[:3] == size and np.isfinite(latents).all():
                self._fit = self._fit or PreviewFit(stride, channels)
                self._fit.add(latents, clips[number].frames)
                self._decoder = self._fit.solve()
        self._latents = {}
