"""The interface of metrics of physics: whether objects of a sample keep a law."""

import abc
from collections.abc import Sequence
from typing import ClassVar

from dit_video.evaluation.metrics.metric import MetricBatch, ShareMetric
from dit_video.scenes import Scene
from dit_video.scenes.metrics.scene_objects import ObjectTrack, find_objects
from dit_video.video import Clip

MAX_RESIDUAL = 0.025
"""Largest root mean square distance of centroids from a fit, relative to the frame's shorter side."""


class LawMetric(ShareMetric):
    """Base of the metrics of a law: the share of samples of its scenes whose objects keep it.

    The truth of a sample has the law that its scene shows (`SceneTruth`); samples of other laws, or of scenes without
    one, do not count: they are None. A sample without all of the scene's objects does not keep the law.
    """

    needs = ("samples", "scenes")
    law: ClassVar[str]
    """Name of the law."""
    min_share: ClassVar[float] = 0.9
    """Smallest share of the frames that show each object."""

    @abc.abstractmethod
    def keeps_law(self, clip: Clip, scene: Scene, tracks: Sequence[ObjectTrack]) -> bool:
        """Return whether the objects of a clip, in the order of the scene's, keep the law."""

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return for every sample of a scene of the law whether it keeps the law, and None for the others."""
        answers: list[bool | None] = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if getattr(truth, "law", None) != self.law:
                answers.append(None)
                continue
            tracks = batch.derive(find_objects, clip, truth.scene.background, min_share=self.min_share)
            own = [tracks[each.colour] for each in truth.scene.objects if each.colour in tracks]
            answers.append(len(own) == len(truth.scene.objects) and self.keeps_law(clip, truth.scene, own))
        return answers
