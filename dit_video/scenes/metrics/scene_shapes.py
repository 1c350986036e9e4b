"""Prompt following on rendered scenes: shapes of all objects, judged from pixels alone."""

from dataclasses import dataclass
from typing import ClassVar

from dit_video.evaluation.metrics.metric import MetricDescription
from dit_video.scenes.metrics.scene_appearance import AppearanceMetric


@dataclass(frozen=True, kw_only=True)
class SceneShapes(AppearanceMetric):
    """Share of objects of all samples that have the shape of the scene's (see `judge_appearance`)."""

    attribute = "shape"
    name: ClassVar[str] = "scene_shapes"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="shapes as prompted", unit="%", decimals=1, is_higher_better=True, explanation="of all upright objects"
    )
