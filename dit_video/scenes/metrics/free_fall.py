"""Free fall of an object: a parabola with the scene's gravity."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MetricDescription
from dit_video.scenes import Scene
from dit_video.scenes.metrics.law_metric import MAX_RESIDUAL, LawMetric
from dit_video.scenes.metrics.motion_fits import fit_motion
from dit_video.scenes.metrics.scene_objects import ObjectTrack
from dit_video.video import Clip

_TOLERANCE = 0.15
"""Largest error of the acceleration, relative to gravity."""
_MAX_RISE = 0.15
"""Largest speed upwards at the start, in shorter sides of a frame per second. Reversed falls have 1.2 and more."""


@dataclass(frozen=True, kw_only=True)
class FreeFall(LawMetric):
    """Share of samples whose object falls with the scene's gravity.

    A parabola is fitted to the centroids: its acceleration must be gravity downwards, and none sideways. The start and
    the velocity are fitted, not compared with the scene's, so that a sample of a caption, or after a known first frame,
    is judged alike. The object must not rise at the start: scenes let it fall from rest, and a reversed fall has the
    same acceleration.
    """

    law = "free_fall"
    name: ClassVar[str] = "free_fall"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="free fall",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="acceleration within 15% of gravity",
    )

    def keeps_law(self, clip: Clip, scene: Scene, tracks: Sequence[ObjectTrack]) -> bool:
        """Return whether the object falls from rest with the scene's gravity."""
        side, is_visible = min(clip.height, clip.width), tracks[0].is_visible
        seconds = np.flatnonzero(is_visible) / clip.fps
        fit = fit_motion(seconds, tracks[0].centre[is_visible], is_accelerated=True)
        error = np.abs(fit.acceleration - np.array([scene.gravity, 0.0])).max(axis=0)
        is_lawful = error <= _TOLERANCE * scene.gravity and fit.residual <= MAX_RESIDUAL * side
        return bool(is_lawful and fit.velocity[0] >= -_MAX_RISE * side)
