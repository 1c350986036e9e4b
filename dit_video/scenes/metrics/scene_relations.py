"""Prompt following on rendered scenes: the relation of two objects at the start, judged from pixels alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MetricBatch, MetricDescription, ShareMetric
from dit_video.scenes.description import RELATIONS
from dit_video.scenes.metrics.scene_objects import find_objects

_MAX_ANGLE = np.deg2rad(55.0)
"""Largest angle between the relation's direction and that from one centroid to the other. It is 45 degrees in the data,
between centres; the centroid of a triangle lies below its centre."""


@dataclass(frozen=True, kw_only=True)
class SceneRelations(ShareMetric):
    """Share of samples of two objects whose first is where the caption says, relative to the second, in frame 0."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "scene_relations"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="relations as prompted",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="to the left, to the right, above, below, in the first frame",
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return for every sample of a caption with a relation whether its objects have it, and None for the others."""
        answers: list[bool | None] = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if truth.scene.relation is None:
                answers.append(None)
                continue
            tracks = batch.derive(find_objects, clip, truth.scene.background)
            first, second = (tracks.get(each.colour) for each in truth.scene.objects)
            if first is None or second is None:
                answers.append(False)
                continue
            axis, sign = RELATIONS[truth.scene.relation]
            offset = second.centre[0] - first.centre[0]  # nan, which is False, if one is not there
            answers.append(bool(np.abs(offset[1 - axis]) <= np.tan(_MAX_ANGLE) * sign * offset[axis]))
        return answers
