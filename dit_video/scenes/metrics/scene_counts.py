"""Prompt following on rendered scenes: the number of objects, judged from pixels alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int
from scipy.ndimage import binary_opening, label

from dit_video.evaluation.metrics.metric import MetricBatch, MetricDescription, ShareMetric
from dit_video.scenes.description import COLOURS
from dit_video.scenes.metrics.scene_objects import classify_colours
from dit_video.video import Clip

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
