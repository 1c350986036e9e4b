"""Positions of objects in frames that a model continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.scenes.metrics.scene_objects import find_objects
from dit_video.video import Clip


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

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the mean error of every sample's objects; None without any."""
        pairs = zip(batch.samples, batch.scenes, strict=True)
        return [measure_position_error(batch, clip, truth, frame=truth.frame) for clip, truth in pairs]


def measure_position_error(batch: MetricBatch, clip: Clip, truth: Any, *, frame: int) -> float | None:
    """Return the mean distance in pixels of a sample's objects from their places in the rendering, in one frame.

    An object that is lost, or farther away, counts as half the frame's diagonal.

    Args:
      batch: batch of the sample, which keeps the objects of its clips.
      clip: the sample.
      truth: truth of the sample, with a scene and its rendering.
      frame: number of the frame.
    """
    own, true = (batch.derive(find_objects, each, truth.scene.background) for each in (clip, truth.reference))
    lost = float(np.hypot(clip.height, clip.width)) / 2
    distances = []
    for name in (each.colour for each in truth.scene.objects if each.colour in true):
        distance = float(np.hypot(*(own[name].centre[frame] - true[name].centre[frame]))) if name in own else np.nan
        distances.append(lost if np.isnan(distance) else min(distance, lost))
    return float(np.mean(distances)) if distances else None
