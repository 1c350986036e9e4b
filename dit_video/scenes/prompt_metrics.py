"""Prompt following on rendered scenes, judged from pixels alone: attributes, number, relation and motion of objects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int
from scipy.ndimage import binary_opening, label

from dit_video.evaluation.metrics.metric import ExampleMetric, MetricBatch, MetricDescription, ShareMetric
from dit_video.scenes.draw import FREE_FRAMES
from dit_video.scenes.objects import AppearanceMetric, ObjectTrack, classify_colours, find_objects, select_whole_frames
from dit_video.scenes.scene import COLOURS, RELATIONS, SPEEDS
from dit_video.video import Clip


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


_MIN_AREA = 0.018
"""Smallest area of an object relative to the square of the frame's shorter side. The smallest object of the data, a
triangle, has 0.045."""
_CORE = np.ones((2, 2), bool)
"""Parts that hold no such block are edges that blend two other colours."""


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


def count_objects(clip: Clip, background: str) -> Int[np.ndarray, " T"]:
    """Return the number of objects in every frame.

    Args:
      clip: the clip.
      background: name of its background.
    """
    colours = classify_colours(clip, background)
    smallest = _MIN_AREA * min(clip.height, clip.width) ** 2
    masks = [[frame == number for number in range(len(COLOURS))] for frame in colours]
    return np.array([sum(_count_parts(mask, smallest) for mask in frame) for frame in masks])


def _count_parts(mask: Bool[np.ndarray, "H W"], smallest: float) -> int:
    """Return the number of objects of one colour in a frame; parts near a larger one belong to it."""
    if mask.sum(axis=(0, 1)) < smallest:
        return 0  # as after the opening, which is slow and takes pixels away
    mask, count = binary_opening(mask, structure=_CORE), 0
    while mask.sum(axis=(0, 1)) >= smallest:
        parts, _ = label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        rows, columns = np.nonzero(parts == sizes.argmax(axis=0) + 1)
        # Textures and objects in front may divide an object.
        reach = 1.2 * np.sqrt(sizes.max(axis=0)) + 2
        distances = np.hypot(*(np.indices(mask.shape) - np.array([rows.mean(), columns.mean()])[:, None, None]))
        is_near = mask & (distances < reach)
        count += int(is_near.sum(axis=(0, 1)) >= smallest)
        mask = mask & ~is_near
    return count


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


_MARGIN = 1.2
"""Factor by which a speed may lie outside the range of all speeds."""
_MIN_FRAMES = 3


@dataclass(frozen=True, kw_only=True)
class SceneSpeeds(ShareMetric):
    """Share of moving objects of all samples whose speed has the name that the caption says: slowly or quickly.

    The speed is that of a line through the centroids of the first frames, before any bounce. The border between two
    names is the geometric mean of the ranges' bounds. Objects that stand still, and those of level 3, do not count.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "scene_speeds"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="speeds as prompted", unit="%", decimals=1, is_higher_better=True, explanation="of all moving objects"
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return for every moving object of every sample with several frames whether its speed is right."""
        answers = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            moving = [each for each in truth.scene.objects if each.speed is not None]
            if len(clip.frames) == 1 or not moving:
                continue
            tracks, side = batch.derive(find_objects, clip, truth.scene.background), min(clip.height, clip.width)
            for each in moving:
                track = tracks.get(each.colour)
                speed = None if track is None else classify_speed(track, fps=clip.fps, side=side)
                answers.append(speed == each.speed)
        return answers

    list_examples = ExampleMetric.list_examples  # answers are of objects, of which an example may have several


def classify_speed(track: ObjectTrack, *, fps: float, side: int) -> str | None:
    """Return the name of an object's speed; None for one that is slower or faster than all of the data.

    Args:
      track: the object.
      fps: frames per second of its clip.
      side: shorter side of the frame, in pixels.
    """
    frames = select_whole_frames(track)
    frames = frames[frames < FREE_FRAMES]
    if len(frames) < _MIN_FRAMES:
        return None
    velocity = np.polyfit(frames / fps, track.centre[frames], 1)[0]
    speed = float(np.hypot(*velocity)) / side
    (low, slow), (quick, high) = SPEEDS["slowly"], SPEEDS["quickly"]
    if not low / _MARGIN <= speed <= high * _MARGIN:
        return None
    return "slowly" if speed < np.sqrt(slow * quick) else "quickly"
