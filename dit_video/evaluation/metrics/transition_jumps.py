"""Jumps in transitions between clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription


@dataclass(frozen=True, kw_only=True)
class TransitionJump(MeanMetric):
    """Largest change of neighbouring frames over the median one, in the mean over clips: high where there is a cut."""

    needs = ("samples",)
    name: ClassVar[str] = "transition_jump"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="largest change of frames over the median", decimals=2, is_higher_better=False
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the ratio of every clip."""
        ratios = []
        for clip in batch.samples:
            changes = np.abs(np.diff(clip.frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
            ratios.append(float(changes.max(axis=0)) / max(float(np.median(changes)), 1e-3))
        return ratios
