"""Prompt following on rendered scenes, judged from pixels alone: objects, their attributes, motion and relation."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import ExampleMetric, MetricBatch, MetricDescription, ShareMetric
from dit_video.scenes.objects import ObjectTrack, classify_speed, count_objects, find_objects, judge_appearance
from dit_video.scenes.scene import RELATIONS, Scene, SceneObject
from dit_video.video import Clip

_MAX_ANGLE = np.deg2rad(55.0)
"""Largest angle between the relation's direction and that from one centroid to the other. It is 45 degrees in the data,
between centres; the centroid of a triangle lies below its centre."""


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
class SceneCounts(ShareMetric):
    """Share of samples that show as many objects as the scene, in the median frame.

    Two objects of one colour are two where they are apart. Scenes with a figure or a post do not count: these have
    parts of the objects' colours, or hide objects.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "scene_counts"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="number of objects as prompted", unit="%", decimals=1, is_higher_better=True
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return for every sample whether the number of its objects is right, and None for those that do not count."""
        answers: list[bool | None] = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if truth.scene.figure is not None or truth.scene.occluder is not None:
                answers.append(None)
                continue
            number = int(np.median(count_objects(clip, truth.scene.background)))
            answers.append(number == len(truth.scene.objects))
        return answers


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


class ObjectMetric(ShareMetric):
    """Base of the metrics of one attribute: the share of objects of all samples that have it as the scene's."""

    needs = ("samples", "scenes")

    @abc.abstractmethod
    def counts(self, clip: Clip, scene: Scene, each: SceneObject) -> bool:
        """Return whether an object of a scene counts: its caption names the attribute, and a clip can show it."""

    @abc.abstractmethod
    def is_right(self, batch: MetricBatch, clip: Clip, scene: Scene, each: SceneObject, track: ObjectTrack) -> bool:
        """Return whether the object that a clip shows has the attribute of the scene's."""

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return for every object that counts, of all samples, whether it is shown with the attribute."""
        answers = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            for each in truth.scene.objects:
                if not self.counts(clip, truth.scene, each):
                    continue
                track = batch.derive(find_objects, clip, truth.scene.background).get(each.colour)
                answers.append(track is not None and self.is_right(batch, clip, truth.scene, each, track))
        return answers

    list_examples = ExampleMetric.list_examples  # answers are of objects, of which an example may have several


class AppearanceMetric(ObjectMetric):
    """Base of the metrics of an attribute that an upright object has in every frame.

    Objects that spin, and those of scenes whose camera moves, do not count.
    """

    attribute: ClassVar[str]
    """Field of `Appearance` and of `SceneObject`."""

    def counts(self, clip: Clip, scene: Scene, each: SceneObject) -> bool:
        """Return True if no object of the scene turns in the picture, or is scaled."""
        return scene.camera.caption is None and not any(one.spin for one in scene.objects)

    def is_right(self, batch: MetricBatch, clip: Clip, scene: Scene, each: SceneObject, track: ObjectTrack) -> bool:
        """Return whether the object has the scene's attribute."""
        judged = batch.derive(judge_appearance, clip, scene.background, track)
        return judged is not None and getattr(judged, self.attribute) == getattr(each, self.attribute)


@dataclass(frozen=True, kw_only=True)
class SceneShapes(AppearanceMetric):
    """Share of objects of all samples that have the shape of the scene's (see `judge_appearance`)."""

    attribute = "shape"
    name: ClassVar[str] = "scene_shapes"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="shapes as prompted", unit="%", decimals=1, is_higher_better=True, explanation="of all upright objects"
    )


@dataclass(frozen=True, kw_only=True)
class SceneSizes(AppearanceMetric):
    """Share of objects of all samples that have the size of the scene's (see `judge_appearance`)."""

    attribute = "size"
    name: ClassVar[str] = "scene_sizes"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="sizes as prompted", unit="%", decimals=1, is_higher_better=True, explanation="of all upright objects"
    )


@dataclass(frozen=True, kw_only=True)
class SceneTextures(AppearanceMetric):
    """Share of objects of all samples that have the texture of the scene's (see `judge_appearance`)."""

    attribute = "texture"
    name: ClassVar[str] = "scene_textures"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="textures as prompted", unit="%", decimals=1, is_higher_better=True, explanation="of all upright objects"
    )


@dataclass(frozen=True, kw_only=True)
class SceneDirections(ObjectMetric):
    """Share of objects of all samples that move as the scene's, or stand still.

    Objects of level 3 do not count: they move as the physics asks, in no direction that the caption names.
    """

    name: ClassVar[str] = "scene_directions"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="directions as prompted",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="of all objects of clips",
    )

    def counts(self, clip: Clip, scene: Scene, each: SceneObject) -> bool:
        """Return True for an object of a clip of several frames that has a direction, or stands still."""
        return len(clip.frames) > 1 and (each.direction is not None or not any(each.velocity))

    def is_right(self, batch: MetricBatch, clip: Clip, scene: Scene, each: SceneObject, track: ObjectTrack) -> bool:
        """Return whether the object moves in the scene's direction."""
        return track.classify_direction() == each.direction


@dataclass(frozen=True, kw_only=True)
class SceneSpeeds(ObjectMetric):
    """Share of moving objects of all samples whose speed has the name that the caption says: slowly or quickly.

    The speed is that of a line through the centroids of the first frames, before any bounce. The border between two
    names is the geometric mean of the ranges' bounds. Objects that stand still, and those of level 3, do not count.
    """

    name: ClassVar[str] = "scene_speeds"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="speeds as prompted", unit="%", decimals=1, is_higher_better=True, explanation="of all moving objects"
    )

    def counts(self, clip: Clip, scene: Scene, each: SceneObject) -> bool:
        """Return True for an object of a clip of several frames whose speed has a name."""
        return len(clip.frames) > 1 and each.speed is not None

    def is_right(self, batch: MetricBatch, clip: Clip, scene: Scene, each: SceneObject, track: ObjectTrack) -> bool:
        """Return whether the object's speed has the scene's name."""
        return classify_speed(track, fps=clip.fps, side=min(clip.height, clip.width)) == each.speed
