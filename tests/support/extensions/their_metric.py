"""A metric of another package, which tests/test_extending.py writes beside a run."""

from dataclasses import dataclass

import numpy as np

from dit_video.core.registry import register
from dit_video.evaluation.metrics.metric import MeanMetric, MetricDescription


@register
@dataclass(frozen=True, kw_only=True)
class MotionError(MeanMetric):
    """Mean absolute error of the differences of consecutive frames."""

    scale: float = 1.0
    needs, name = ("samples", "references"), "motion_error"
    description = MetricDescription(
        label="motion error", unit="levels", decimals=2, is_higher_better=False, explanation="of 255, <per pixel>"
    )

    def measure(self, batch):
        both = (batch.samples, batch.references)
        motions = ([np.diff(clip.frames.astype(float), axis=0) for clip in clips] for clips in both)
        return [self.scale * np.abs(motion - expected).mean() for motion, expected in zip(*motions, strict=True)]
