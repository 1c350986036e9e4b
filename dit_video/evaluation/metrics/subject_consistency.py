"""Consistency of the subject of samples over time, after VBench (arXiv 2311.17982), over any features of images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction
from dit_video.evaluation.metrics.metric import MetricBatch, MetricDescription
from dit_video.evaluation.metrics.temporal_metric import TemporalMetric
from dit_video.video import Clip


def compute_consistency(features: Float[np.ndarray, "T d"]) -> float:
    """Return the mean cosine similarity of each frame's features with those of the first and of the previous frame.

    Negative similarities count as 0, as in VBench's `subject_consistency.py`; there are at least two frames. Features
    that are all zero are like no others.
    """
    features = features.astype(np.float64)
    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    first, previous = units[1:] @ units[0], (units[1:] * units[:-1]).sum(axis=1)
    return float((np.clip(first, 0, 1) + np.clip(previous, 0, 1)).mean(axis=0) / 2)


@dataclass(frozen=True, kw_only=True)
class SubjectConsistency(TemporalMetric):
    """Mean likeness of the frames of a sample by features of images.

    VBench's features are those of DINO ViT-B/16; values of other features are not comparable with it. Every sample
    counts alike, which differs from VBench's mean over frames where lengths differ.
    """

    features: FeatureFunction
    """Features of images; it is called with clips of one frame."""

    needs, name = ("samples",), "subject_consistency"
    description = MetricDescription(
        label="subject consistency",
        is_higher_better=True,
        explanation="cosine similarity of features of frames with the first and the previous one, at most 1 (VBench)",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the consistency of every sample; None for images."""
        return [self._measure_clip(clip) if len(clip.frames) >= self.min_frames else None for clip in batch.samples]

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return the identity of the features, and a sentence on images."""
        return "; ".join(filter(None, (super().make_note(state), self.features.open().identity if state else "")))

    def _measure_clip(self, clip: Clip) -> float:
        images = [Clip(frames=clip.frames[index : index + 1], fps=clip.fps) for index in range(len(clip.frames))]
        return compute_consistency(self.features.open().extract(images))
