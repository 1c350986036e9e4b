"""Permanence of an object that passes behind a post."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MetricDescription
from dit_video.scenes import Scene
from dit_video.scenes.metrics.law_metric import MAX_RESIDUAL, LawMetric
from dit_video.scenes.metrics.motion_fits import fit_motion
from dit_video.scenes.metrics.scene_objects import ObjectTrack, find_post
from dit_video.video import Clip

_MIN_FRAMES = 3
"""Number of frames that show the whole object before it is hidden and after it, at least."""
_MAX_HIDDEN_AREA = 0.5
"""Largest area relative to the whole object's at the moment in which it is hidden most."""
_MAX_DISTANCE = 0.08
"""Largest mean distance of the object from where uniform motion puts it, in shorter sides of a frame."""


@dataclass(frozen=True, kw_only=True)
class ObjectPermanence(LawMetric):
    """Share of samples whose object is hidden by the post and reappears where uniform motion puts it.

    A line is fitted to the centroids before the object reaches the post, and continued behind it. The object's radius
    is the scene's; post, start and velocity are those of the sample, not compared with the scene's, so that a sample of
    a caption, or after a known first frame, is judged alike. A reversed clip keeps the law too; an object that
    vanishes, waits behind the post, turns back, comes out elsewhere, or passes in front does not, and there must be a
    post.
    """

    law = "permanence"
    min_share: ClassVar[float] = 0.15
    name: ClassVar[str] = "object_permanence"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="permanence behind a post",
        unit="%",
        decimals=1,
        is_higher_better=True,
        explanation="within 8% of the frame's shorter side of uniform motion",
    )

    def keeps_law(self, clip: Clip, scene: Scene, tracks: Sequence[ObjectTrack]) -> bool:
        """Return whether the object reappears where uniform motion puts it."""
        side, (track,), post = min(clip.height, clip.width), tracks, find_post(clip, scene.background)
        if post is None:
            return False
        distance_from_post = track.centre[:, 1] - post.column
        is_whole = np.abs(distance_from_post) >= post.half_width + scene.objects[0].radius  # False for nan
        frames = np.flatnonzero(track.is_visible & is_whole)
        if not len(frames):
            return False
        is_before = np.sign(distance_from_post[frames]) == np.sign(distance_from_post[frames[0]])
        before, after = frames[is_before], frames[~is_before]
        if min(len(before), len(after)) < _MIN_FRAMES or before[-1] > after[0]:
            return False
        hidden, whole = track.area[before[-1] : after[0] + 1].min(axis=0), np.median(track.area[frames])
        motion = fit_motion(before / clip.fps, track.centre[before])
        end = fit_motion(after / clip.fps, track.centre[after])
        offsets = track.centre[after] - motion.predict(after / clip.fps)
        distance = float(np.hypot(*offsets.T).mean(axis=0))
        residual = max(motion.residual, end.residual)
        return bool(
            hidden <= _MAX_HIDDEN_AREA * whole and distance <= _MAX_DISTANCE * side and residual <= MAX_RESIDUAL * side
        )
