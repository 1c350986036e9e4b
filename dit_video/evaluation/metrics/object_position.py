"""Positions of objects in frames that a model continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.scene_objects import find_objects


@dataclass(frozen=True, kw_only=True)
class ObjectPosition(MeanMetric):
    """Mean distance of objects from their true positions in a new frame.

    An object that is lost counts as half the frame's diagonal.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "position_error"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="position error", unit="pixels", decimals=2, is_higher_better=False, explanation="of objects' centroids"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the mean error of every sample's objects."""
        errors = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            own, true = (batch.derive(find_objects, each, truth.scene.background) for each in (clip, truth.reference))
            lost = float(np.hypot(clip.height, clip.width)) / 2
            distances = []
            for name in (each.colour for each in truth.scene.objects if each.colour in true):
                offset = own[name].centre[truth.frame] - true[name].centre[truth.frame] if name in own else [np.nan] * 2
                distance = float(np.hypot(*offset))
                distances.append(lost if np.isnan(distance) else min(distance, lost))
            if distances:
                errors.append(float(np.mean(distances)))
        return errors
