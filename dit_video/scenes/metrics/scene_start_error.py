"""Start positions of objects of rendered scenes where the model got the first frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.scenes.metrics.object_position import measure_position_error


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

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the mean distance of every sample whose first frame was known, and None for the others."""
        return [
            measure_position_error(batch, clip, truth, frame=0) if is_first_frame_known(truth) else None
            for clip, truth in zip(batch.samples, batch.scenes, strict=True)
        ]


def is_first_frame_known(truth: Any) -> bool:
    """Return True if the model got the whole first frame of a sample.

    Args:
      truth: truth of the sample; `is_known`, if it has one, are the pixels that the model got.
    """
    is_known = getattr(truth, "is_known", None)
    return is_known is not None and bool(is_known[0].all(axis=(0, 1)))
