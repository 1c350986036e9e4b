"""Temporal flickering of samples, after VBench (arXiv 2311.17982)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from dit_video.evaluation.metrics.metric import MetricBatch, MetricDescription
from dit_video.evaluation.metrics.temporal_metric import TemporalMetric


def compute_temporal_flickering(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return `(255 - E) / 255` with the mean absolute difference E of neighbouring frames, of at least two.

    This is the definition of VBench's `temporal_flickering.py`. 1 is a clip at rest.
    """
    # A pair of frames at a time: memory does not grow with the clip.
    changes = [
        float(np.abs(after.astype(np.int16) - before.astype(np.int16)).mean(axis=(0, 1, 2)))
        for before, after in itertools.pairwise(frames)
    ]
    return (255 - float(np.mean(changes))) / 255


@dataclass(frozen=True, kw_only=True)
class TemporalFlickering(TemporalMetric):
    """Mean likeness of neighbouring frames, VBench's temporal flickering.

    Motion lowers it as well as flicker does: VBench computes it on prompts of scenes at rest, and leaves out samples in
    which much moves (see `DynamicDegree`).
    """

    needs, name = ("samples",), "temporal_flickering"
    description = MetricDescription(
        label="temporal flickering",
        is_higher_better=True,
        explanation="likeness of neighbouring frames, at most 1 (VBench); meant for prompts of scenes at rest",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the likeness of neighbouring frames of every sample; None for images."""
        clips = [clip.frames for clip in batch.samples]
        return [compute_temporal_flickering(each) if len(each) >= self.min_frames else None for each in clips]
