"""Prompt following on rendered scenes: speeds of moving objects, judged from pixels alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import ExampleMetric, MetricBatch, MetricDescription, ShareMetric
from dit_video.scenes.description import SPEEDS
from dit_video.scenes.draw import FREE_FRAMES
from dit_video.scenes.metrics.scene_objects import ObjectTrack, find_objects, select_whole_frames

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
