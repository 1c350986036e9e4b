"""Metrics of laws of motion: whether the objects of a sample fall, bounce, collide and reappear as physics asks."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float

from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    ShareMetric,
    estimate_mean,
)
from dit_video.scenes import Scene
from dit_video.scenes.laws import LAWS, Law
from dit_video.scenes.objects import ObjectTrack, find_objects, find_post
from dit_video.scenes.physics import exchange_momentum
from dit_video.video import Clip

MAX_RESIDUAL = 0.025
"""Largest root mean square distance of centroids from a fit, relative to the frame's shorter side."""


class LawMetric(ShareMetric):
    """Base of the metrics of a law: the share of samples of its scenes whose objects keep it.

    The truth of a sample has the law that its scene shows (`SceneTruth`); samples of other laws, or of scenes without
    one, do not count: they are None. A sample without all of the scene's objects does not keep the law.
    """

    needs = ("samples", "scenes")
    law: ClassVar[str]
    """Name of the law."""
    min_share: ClassVar[float] = 0.9
    """Smallest share of the frames that show each object."""

    @abc.abstractmethod
    def keeps_law(self, clip: Clip, scene: Scene, tracks: Sequence[ObjectTrack]) -> bool:
        """Return whether the objects of a clip, in the order of the scene's, keep the law."""

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


_FALL_TOLERANCE = 0.15
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
        is_lawful = error <= _FALL_TOLERANCE * scene.gravity and fit.residual <= MAX_RESIDUAL * side
        return bool(is_lawful and fit.velocity[0] >= -_MAX_RISE * side)


_BOUNCE_TOLERANCE = 0.15
"""Largest error of the velocity after the bounce, along each axis, relative to the speed before it."""
_MIN_BOUNCE_SPEED = 0.1
"""Smallest speed before the bounce, in shorter sides of a frame per second."""
_MAX_WALL_DISTANCE = 0.06
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
        if fit is None or fit.residual > MAX_RESIDUAL * side or fit.gap > _MAX_WALL_DISTANCE * side:
            return False
        before, after, centre = fit.before.velocity[0], fit.after.velocity[0], fit.centres[0]
        speed, axis = float(np.hypot(*before)), int(np.abs(after - before).argmax(axis=0))
        mirrored = np.where(np.arange(2) == axis, -before, before)
        is_mirrored = np.abs(after - mirrored).max(axis=0) <= _BOUNCE_TOLERANCE * speed
        wall = (clip.height, clip.width)[axis] if before[axis] > 0 else 0
        radius = np.sqrt(float(np.median(track.area[track.is_visible])) / np.pi)
        distance = abs(abs(centre[axis] - wall) - radius)
        return bool(is_mirrored and speed >= _MIN_BOUNCE_SPEED * side and distance <= _MAX_WALL_DISTANCE * side)


_COLLISION_TOLERANCE = 0.25
"""Largest error of the change of each disc's velocity, relative to the change that the law asks for."""
_MIN_APPROACH = 0.2
"""Smallest speed with which the discs approach each other, in shorter sides of a frame per second."""
_COLLISION_DISTANCES = (0.8, 1.25)
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
        if not _COLLISION_DISTANCES[0] <= relative <= _COLLISION_DISTANCES[1]:
            return False
        before, normal = fit.before.velocity, offset / distance
        if (before[0] - before[1]) @ normal < _MIN_APPROACH * side:
            return False
        lawful = exchange_momentum(before, masses, normal)
        errors = np.hypot(*(fit.after.velocity - lawful).T)
        return bool((errors <= _COLLISION_TOLERANCE * np.hypot(*(lawful - before).T)).all(axis=0))


_MIN_WHOLE_FRAMES = 3
"""Number of frames that show the whole object before it is hidden and after it, at least."""
_MAX_HIDDEN_AREA = 0.5
"""Largest area relative to the whole object's at the moment in which it is hidden most."""
_MAX_OFFSET = 0.08
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
        if min(len(before), len(after)) < _MIN_WHOLE_FRAMES or before[-1] > after[0]:
            return False
        hidden, whole = track.area[before[-1] : after[0] + 1].min(axis=0), np.median(track.area[frames])
        motion = fit_motion(before / clip.fps, track.centre[before])
        end = fit_motion(after / clip.fps, track.centre[after])
        offsets = track.centre[after] - motion.predict(after / clip.fps)
        distance = float(np.hypot(*offsets.T).mean(axis=0))
        residual = max(motion.residual, end.residual)
        return bool(
            hidden <= _MAX_HIDDEN_AREA * whole and distance <= _MAX_OFFSET * side and residual <= MAX_RESIDUAL * side
        )


class LawError(NamedTuple):
    """The error of a sample that continues a scene of a law."""

    law: Law
    error: float


@dataclass(frozen=True, kw_only=True)
class ContinuationError(ExampleMetric[LawError | None]):
    """Mean distance of objects from their true places in the frames after the known ones, relative to a still clip's.

    It is 0 for the truth, and 1 for a clip that stands still after the known frames, whose objects are at the places of
    the last of them. It falls before any share of kept laws rises. An object that is lost counts as one that stands
    still, and frames in which the truth hides an object do not count, nor do samples without known frames.
    """

    needs = ("samples", "references", "scenes")

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the error of each law."""
        return {
            f"{law}_error": MetricDescription(
                label=f"{law.replace('_', ' ')}, error of places",
                decimals=2,
                is_higher_better=False,
                explanation="after the known frames; 0 is the truth, and 1 a clip that stands still",
            )
            for law in LAWS
        }

    def measure(self, batch: MetricBatch) -> Sequence[LawError | None]:
        """Return the error of every sample with known frames, and None for the others."""
        return [
            LawError(truth.law, _measure_continuation(batch, clip, reference, truth)) if truth.known else None
            for clip, reference, truth in zip(batch.samples, batch.references, batch.scenes, strict=True)
        ]

    def compute(self, state: tuple[LawError | None, ...]) -> Mapping[str, MetricValue]:
        """Return the mean error of each law."""
        errors = [each for each in state if each is not None]
        return {f"{law}_error": estimate_mean([each.error for each in errors if each.law == law]) for law in LAWS}

    def list_examples(self, state: tuple[LawError | None, ...]) -> Sequence[Mapping[str, float]]:
        """Return the error of every sample by the name of its law's."""
        return [{} if each is None else {f"{each.law}_error": each.error} for each in state]


def _measure_continuation(batch: MetricBatch, clip: Clip, reference: Clip, truth: Any) -> float:
    """Return the mean distance of a sample's objects from the reference's, relative to that of a still clip."""
    own, true = (
        batch.derive(find_objects, each, truth.scene.background, min_share=ObjectPermanence.min_share)
        for each in (clip, reference)
    )
    distances, still_distances = [], []
    for colour in (each.colour for each in truth.scene.objects if each.colour in true):
        places, start = true[colour].centre[truth.known :], true[colour].centre[truth.known - 1]
        still = np.hypot(*(places - start).T)
        found = np.hypot(*(own[colour].centre[truth.known :] - places).T) if colour in own else np.nan
        distances.append(np.where(np.isnan(found), still, found))
        still_distances.append(still)
    return float(np.nansum(distances) / np.nansum(still_distances))


_MIN_SIDE_FRAMES = 4
"""Number of frames on each side of a contact, at least."""


class MotionFit(NamedTuple):
    """Polynomials of time through centroids; positions in pixels, times in seconds."""

    start: Float[np.ndarray, "*n 2"]
    """Rows and columns at time 0."""
    velocity: Float[np.ndarray, "*n 2"]
    """Velocity at time 0."""
    acceleration: Float[np.ndarray, "*n 2"]
    """Acceleration; zero of uniform motion."""
    squares: float
    """Sum of the squared distances of the centroids from the fit."""
    num_centroids: int
    """Number of centroids."""

    @property
    def residual(self) -> float:
        """Return the root mean square distance of the centroids from the fit, in pixels."""
        return float(np.sqrt(self.squares / self.num_centroids))

    def predict(self, seconds: Float[np.ndarray, "*t"]) -> Float[np.ndarray, "*t 2"]:
        """Return the positions of one object at some times."""
        times = seconds[..., None]
        return self.start + self.velocity * times + self.acceleration * times**2 / 2


def fit_motion(
    seconds: Float[np.ndarray, " T"], centres: Float[np.ndarray, "T *n 2"], *, is_accelerated: bool = False
) -> MotionFit:
    """Return the least-squares fit of uniform motion, or of uniformly accelerated one.

    Args:
      seconds: Time of each frame.
      centres: Centroids of one object, or of several.
      is_accelerated: True to fit an acceleration.
    """
    degree = 2 if is_accelerated else 1
    powers = np.vander(seconds, degree + 1, increasing=True)
    flat = np.asarray(centres, np.float64).reshape(len(seconds), -1)
    factors = np.linalg.lstsq(powers, flat, rcond=None)[0]
    squares = float(np.square(flat - powers @ factors).sum(axis=(0, 1)))
    start, velocity, *rest = (factor.reshape(centres.shape[1:]) for factor in factors)
    acceleration = 2 * rest[0] if rest else np.zeros_like(start)
    return MotionFit(start, velocity, acceleration, squares, flat.size // 2)


class ContactFit(NamedTuple):
    """Uniform motion before a contact and after it."""

    before: MotionFit
    after: MotionFit
    seconds: float
    """Time of the contact, at which both fits are nearest to each other."""
    residual: float
    """Root mean square distance of the centroids from the fits, in pixels."""
    gap: float
    """Largest distance in pixels between the positions that both fits have at the contact."""

    @property
    def centres(self) -> Float[np.ndarray, "n 2"]:
        """Return the positions at the contact, by the motion before it."""
        return self.before.start + self.before.velocity * self.seconds


def fit_contact(seconds: Float[np.ndarray, " T"], centres: Float[np.ndarray, "T n 2"]) -> ContactFit | None:
    """Return the fit of uniform motion that changes once, with all objects; None for too few frames.

    The contact is between the two frames for which the sum of squares is the smallest.

    Args:
      seconds: Time of each frame.
      centres: Centroids of the objects.
    """
    splits = range(_MIN_SIDE_FRAMES, len(seconds) - _MIN_SIDE_FRAMES + 1)
    fits = [
        (fit_motion(seconds[:split], centres[:split]), fit_motion(seconds[split:], centres[split:])) for split in splits
    ]
    if not fits:
        return None
    before, after = min(fits, key=lambda pair: pair[0].squares + pair[1].squares)
    offset, change = after.start - before.start, after.velocity - before.velocity
    time = -float((offset * change).sum(axis=(0, 1)) / max(np.square(change).sum(axis=(0, 1)), 1e-9))
    gap = float(np.hypot(*(offset + change * time).T).max(axis=0))
    residual = float(np.sqrt((before.squares + after.squares) / (before.num_centroids + after.num_centroids)))
    return ContactFit(before, after, time, residual, gap)
