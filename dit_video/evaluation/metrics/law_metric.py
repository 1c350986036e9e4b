"""The interface of metrics of physics: whether objects of a sample keep a law."""

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

from dit_video.data.synthetic.scenes import Scene
from dit_video.evaluation.metrics.intervals import compute_wilson_interval
from dit_video.evaluation.metrics.metric import ExampleMetric, MetricBatch, MetricDescription, MetricValue
from dit_video.evaluation.metrics.scene_objects import ObjectTrack, find_objects
from dit_video.video import Clip

MAX_RESIDUAL = 0.025
"""Largest root mean square distance of centroids from a fit, relative to the frame's shorter side."""


class LawMetric(ExampleMetric[bool | None]):
    """Base of the metrics of a law: the share of samples of its scenes whose objects keep it.

    The truth of a sample has the law that its scene shows (`PhysicsTruth`); samples of other laws, or of scenes without
    one, do not count: they are None. A sample without all of the scene's objects does not keep the law.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str]
    """Name of the value."""
    description: ClassVar[MetricDescription]
    """Description of the value."""
    law: ClassVar[str]
    """Name of the law."""
    min_share: ClassVar[float] = 0.9
    """Smallest share of the frames that show each object."""

    @abc.abstractmethod
    def keeps_law(self, clip: Clip, scene: Scene, tracks: Sequence[ObjectTrack]) -> bool:
        """Return whether the objects of a clip, in the order of the scene's, keep the law."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the share."""
        return {self.name: self.description}

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

    def compute(self, state: tuple[bool | None, ...]) -> Mapping[str, MetricValue]:
        """Return the share of the samples that count."""
        answers = [answer for answer in state if answer is not None]
        right, count = sum(answers), len(answers)
        value = right / count if count else None
        return {self.name: MetricValue(value=value, interval=compute_wilson_interval(right, count), count=count)}

    def list_examples(self, state: tuple[bool | None, ...]) -> Sequence[Mapping[str, float | bool]]:
        """Return the answer of every example that counts, and nothing of the others."""
        return [{} if answer is None else {self.name: answer} for answer in state]
