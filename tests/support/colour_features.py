"""Features of clips that need no weights, for tests of the metrics that compare them."""

from dataclasses import dataclass

import numpy as np

from dit_video.core.registry import register
from dit_video.evaluation.feature_functions import FeatureFunction, OpenFeatures
from dit_video.video import Clip


@register
@dataclass(frozen=True, kw_only=True)
class FrameColours(FeatureFunction):
    """Mean colour of each frame, in 0..1."""

    def load(self) -> OpenFeatures:
        def extract(clips):
            return np.concatenate([clip.frames.mean(axis=(1, 2)) for clip in clips]).astype(np.float32) / 255

        return OpenFeatures(extract, "frame colours", is_of_frames=True)


@register
@dataclass(frozen=True, kw_only=True)
class ColourFeatures(FeatureFunction):
    """Mean colours of the first and the last frame, in 0..1."""

    gain: float = 1.0

    def load(self) -> OpenFeatures:
        def extract(clips):
            ends = [clip.frames[[0, -1]].mean(axis=(1, 2)).ravel() for clip in clips]
            return self.gain * np.array(ends, np.float32) / 255

        return OpenFeatures(extract, "mean colours")


def draw_clips(count: int, *, seed: int, shift: float = 0.0) -> list[Clip]:
    """Return clips of noise about random colours."""
    generator = np.random.default_rng(seed)
    colours = generator.normal(128 + shift, 20, (count, 1, 1, 1, 3))
    pixels = colours + generator.normal(0, 20, (count, 3, 4, 4, 3))
    return [Clip(np.clip(frames, 0, 255).astype(np.uint8), fps=8) for frames in pixels]
