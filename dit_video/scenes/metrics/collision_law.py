"""Elastic collision of two discs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MetricDescription
from dit_video.scenes import Scene
from dit_video.scenes.laws import exchange_momentum
from dit_video.scenes.metrics.law_metric import MAX_RESIDUAL, LawMetric
from dit_video.scenes.metrics.motion_fits import fit_contact
from dit_video.scenes.metrics.scene_objects import ObjectTrack
from dit_video.video import Clip

_TOLERANCE = 0.25
"""Largest error of the change of each disc's velocity, relative to the change that the law asks for."""
_MIN_APPROACH = 0.2
"""Smallest speed with which the discs approach each other, in shorter sides of a frame per second."""
_DISTANCES = (0.8, 1.25)
"""Smallest and largest distance of the centres at the collision, relative to the sum of the radii."""


@dataclass(frozen=True, kw_only=True)
class CollisionLaw(LawMetric):
    """Share of samples whose two discs exchange momentum as in an elastic collision, with masses like their areas.

    A line before the collision and one after it are fitted to the centroids of each disc; the velocities after it must
    be those that follow from the velocities before it and the line between the centres. Starts, velocities, radii and
    time are those of the sample, so that a sample of a caption, or after a known first frame, is judged alike. A
    reversed collision, or one that is faster throughout, is a collision too; discs that pass each other, stop, or move
    in accelerated time are not.
    """

    law = "collision"
    name: ClassVar[str] = "collision_law"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="collision",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="change of both velocities within 25%",
    )

    def keeps_law(self, clip: Clip, scene: Scene, tracks: Sequence[ObjectTrack]) -> bool:
        """Return whether the discs exchange momentum."""
        side = min(clip.height, clip.width)
        is_visible = tracks[0].is_visible & tracks[1].is_visible
        centres = np.stack([track.centre[is_visible] for track in tracks], axis=1)
        fit = fit_contact(np.flatnonzero(is_visible) / clip.fps, centres)
        if fit is None or fit.residual > MAX_RESIDUAL * side:
            return False
        masses = np.array([np.median(track.area[is_visible]) for track in tracks], np.float64)
        offset = fit.centres[1] - fit.centres[0]
        distance = float(np.hypot(*offset))
        relative = distance / np.sqrt(masses / np.pi).sum(axis=0)
        if not _DISTANCES[0] <= relative <= _DISTANCES[1]:
            return False
        before, normal = fit.before.velocity, offset / distance
        if (before[0] - before[1]) @ normal < _MIN_APPROACH * side:
            return False
        lawful = exchange_momentum(before, masses, normal)
        errors = np.hypot(*(fit.after.velocity - lawful).T)
        return bool((errors <= _TOLERANCE * np.hypot(*(lawful - before).T)).all(axis=0))
