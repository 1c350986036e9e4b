"""Start positions of objects of rendered scenes where the model got the first frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import ExampleMetric, MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.scene_objects import find_objects


@dataclass(frozen=True, kw_only=True)
class SceneStartError(MeanMetric):
    """Mean distance of objects in the first frame from the truth's, of samples whose first frame was known.

    A caption does not say where an object starts: without a known first frame, `SceneStartSpread` says whether starts
    vary as those of the data. An object that is missing counts as half the frame's diagonal.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "scene_start_error"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="start position error",
        unit="pixels",
        decimals=2,
        is_higher_better=False,
        explanation="of objects' centroids in a first frame that the model got",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the mean distance of every sample whose first frame was known."""
        errors = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if not is_first_frame_known(truth):
                continue
            own, true = (batch.derive(find_objects, each, truth.scene.background) for each in (clip, truth.reference))
            lost = float(np.hypot(clip.height, clip.width)) / 2
            distances = []
            for name in (each.colour for each in truth.scene.objects if each.colour in true):
                distance = float(np.hypot(*(own[name].centre[0] - true[name].centre[0]))) if name in own else np.nan
                distances.append(lost if np.isnan(distance) else min(distance, lost))
            if distances:
                errors.append(float(np.mean(distances)))
        return errors

    list_examples = ExampleMetric.list_examples  # not all samples count


def is_first_frame_known(truth: Any) -> bool:
    """Return True if the model got the whole first frame of a sample.

    Args:
      truth: truth of the sample; `is_known`, if it has one, are the pixels that the model got.
    """
    is_known = getattr(truth, "is_known", None)
    return is_known is not None and bool(is_known[0].all(axis=(0, 1)))
