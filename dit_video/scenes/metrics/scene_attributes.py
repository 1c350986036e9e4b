"""Prompt following on rendered scenes: colours and directions of all objects, judged from pixels alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dit_video.evaluation.metrics.metric import ExampleMetric, MetricBatch, MetricDescription, ShareMetric
from dit_video.scenes.metrics.scene_objects import find_objects


@dataclass(frozen=True, kw_only=True)
class SceneColours(ShareMetric):
    """Share of samples that show an object of each of the scene's colours, and no other object as large as these."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "scene_colours"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="colours as prompted",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="of all objects of a scene",
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return for every sample whether its largest objects have the scene's colours."""
        answers = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            tracks = batch.derive(find_objects, clip, truth.scene.background)
            by_area = sorted(tracks.values(), key=lambda track: -track.area.mean(axis=0))
            expected = {each.colour for each in truth.scene.objects}
            answers.append({track.colour for track in by_area[: len(expected)]} == expected)
        return answers


@dataclass(frozen=True, kw_only=True)
class SceneDirections(ShareMetric):
    """Share of objects of all samples that move as the scene's, or stand still.

    Objects of level 3 do not count: they move as the physics asks, in no direction that the caption names.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "scene_directions"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="directions as prompted",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="of all objects of clips",
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return for every object of every sample with several frames whether its direction is right."""
        answers = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if len(clip.frames) == 1:
                continue
            tracks = batch.derive(find_objects, clip, truth.scene.background)
            for each in truth.scene.objects:
                if each.direction is None and any(each.velocity):
                    continue
                track = tracks.get(each.colour)
                answers.append(track is not None and track.classify_direction() == each.direction)
        return answers

    list_examples = ExampleMetric.list_examples  # answers are of objects, of which an example may have several
