"""Elastic reflection of a disc at a wall."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MetricDescription
from dit_video.scenes import Scene
from dit_video.scenes.metrics.law_metric import MAX_RESIDUAL, LawMetric
from dit_video.scenes.metrics.motion_fits import fit_contact
from dit_video.scenes.metrics.scene_objects import ObjectTrack
from dit_video.video import Clip

_TOLERANCE = 0.15
"""Largest error of the velocity after the bounce, along each axis, relative to the speed before it."""
_MIN_SPEED = 0.1
"""Smallest speed before the bounce, in shorter sides of a frame per second."""
_MAX_DISTANCE = 0.06
"""Largest distance of the disc from the wall at the bounce, and between both ways there, in shorter sides."""


@dataclass(frozen=True, kw_only=True)
class BounceLaw(LawMetric):
    """Share of samples whose disc is reflected at a wall: as fast as before, its angle mirrored.

    Two lines are fitted to the centroids. Start, velocity, time and wall are those of the sample, not compared with the
    scene's, so that a sample of a caption, or after a known first frame, is judged alike. A reversed bounce, or one
    that is faster throughout, is a bounce too; one in which time is accelerated or speed lost is none.
    """

    law = "bounce"
    name: ClassVar[str] = "bounce_law"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="bounce",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="mirrored velocity within 15% of the speed",
    )

    def keeps_law(self, clip: Clip, scene: Scene, tracks: Sequence[ObjectTrack]) -> bool:
        """Return whether the disc is reflected at a wall."""
        side, (track,) = min(clip.height, clip.width), tracks
        fit = fit_contact(np.flatnonzero(track.is_visible) / clip.fps, track.centre[track.is_visible][:, None])
        if fit is None or fit.residual > MAX_RESIDUAL * side or fit.gap > _MAX_DISTANCE * side:
            return False
        before, after, centre = fit.before.velocity[0], fit.after.velocity[0], fit.centres[0]
        speed, axis = float(np.hypot(*before)), int(np.abs(after - before).argmax(axis=0))
        mirrored = np.where(np.arange(2) == axis, -before, before)
        is_mirrored = np.abs(after - mirrored).max(axis=0) <= _TOLERANCE * speed
        wall = (clip.height, clip.width)[axis] if before[axis] > 0 else 0
        radius = np.sqrt(float(np.median(track.area[track.is_visible])) / np.pi)
        distance = abs(abs(centre[axis] - wall) - radius)
        return bool(is_mirrored and speed >= _MIN_SPEED * side and distance <= _MAX_DISTANCE * side)
