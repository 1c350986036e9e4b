"""Metrics of generation tasks on rendered scenes: edits of a colour, loops, and control by depth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float

from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MeanMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    ShareMetric,
    estimate_mean,
    estimate_share,
)
from dit_video.scenes.objects import ObjectTrack, classify_colours, find_objects
from dit_video.scenes.render import BACKGROUND_DEPTH, render
from dit_video.scenes.scene import COLOURS, DIRECTIONS

_MAX_REST = 0.3
"""Largest area of the source's colour relative to the target's that counts as changed."""
_MIN_RIGHT_STEPS, _MIN_LOOP_STEP, _MAX_LOOP_STEP = 0.75, 0.25, 8.0
"""Smallest share of an object's steps in a loop that go in its direction, their smallest mean, and the size of those
over the border of the frame, in pixels."""
_MAX_AREA_FACTOR = 1.25
"""Largest area of an object in a transition, relative to that of the true clip: one that fades from one place to
another has the area of both."""
_MAX_STEP_FACTOR, _MIN_STEP = 1.5, 1.0
"""Largest step of an object in a transition, relative to that of the true clip or at least to a pixel."""
_SAME_DEPTH = 0.1
"""Difference below which two depths are the same; those of two objects differ by 0.2."""


@dataclass(frozen=True, kw_only=True)
class EditSuccess(ExampleMetric[tuple[bool, float]]):
    """Share of edits whose object has the new colour alone, and its mean distance from the source's positions.

    An object without the new colour counts as half the frame's diagonal.
    """

    needs = ("samples", "scenes")

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of the share and of the distance."""
        return {
            "edited_colour": MetricDescription(label="colour changed", unit="%", decimals=1, is_higher_better=True),
            "edited_distance": MetricDescription(
                label="distance from the source", unit="pixels", decimals=2, is_higher_better=False
            ),
        }

    def measure(self, batch: MetricBatch) -> Sequence[tuple[bool, float]]:
        """Return both values of every edit."""
        values = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            background = truth.scene.background
            own, true = (
                batch.derive(find_objects, clip, background),
                batch.derive(find_objects, truth.reference, background),
            )
            for new, old in zip(truth.scene.objects, truth.source.objects, strict=True):
                if new.colour == old.colour:
                    continue
                track, rest = own.get(new.colour), own.get(old.colour)
                area = 0.0 if track is None else float(track.area.mean(axis=0))
                is_changed = area > 0 and (rest is None or rest.area.mean(axis=0) < _MAX_REST * area)
                distance = float(np.hypot(clip.height, clip.width)) / 2
                if track is not None and new.colour in true:
                    offsets = np.hypot(*(track.centre - true[new.colour].centre).T)
                    distance = float(np.nanmean(offsets, axis=0)) if np.isfinite(offsets).any(axis=0) else distance
                values.append((bool(is_changed), distance))
        return values

    def compute(self, state: tuple[tuple[bool, float], ...]) -> Mapping[str, MetricValue]:
        """Return the share and the mean distance."""
        share = estimate_share([is_changed for is_changed, _ in state])
        distance = estimate_mean([distance for _, distance in state])
        return dict(zip(self.describe(), (share, distance), strict=True))


class LoopValues(NamedTuple):
    """Seam, motion and direction of a loop."""

    seam: float
    motion: float
    is_prompted_direction: bool


@dataclass(frozen=True, kw_only=True)
class LoopSeam(ExampleMetric[LoopValues]):
    """Change from a loop's last frame to its first, and how far and in which direction its object moves.

    The change is relative to the median change of neighbouring frames, the motion to that of the scene's rendering. A
    loop that stands still has no seam, but no motion either. Steps of the object over the border of the frame, which
    are large, do not count.
    """

    needs = ("samples", "scenes")

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of the three values."""
        return {
            "loop_seam": MetricDescription(label="seam of loops", decimals=2, is_higher_better=False),
            "loop_motion": MetricDescription(label="motion in loops", unit="%", decimals=0, is_higher_better=True),
            "loop_direction": MetricDescription(
                label="direction of loops as prompted", unit="%", decimals=1, is_higher_better=True
            ),
        }

    def measure(self, batch: MetricBatch) -> Sequence[LoopValues]:
        """Return the values of every loop, whose scene has one object."""
        values = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            frames, (each,) = clip.frames.astype(np.float32), truth.scene.objects
            changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
            seam = float(np.abs(frames[0] - frames[-1]).mean(axis=(0, 1, 2)))
            steps, true_steps = (
                list_steps(batch.derive(find_objects, one, truth.scene.background).get(each.colour))
                for one in (clip, truth.reference)
            )
            step, true_step = steps.mean(axis=0), true_steps.mean(axis=0)
            along = int(np.argmax(np.abs(step), axis=0))
            is_right = np.sign(steps[:, along]) == DIRECTIONS[each.direction][along]
            is_moving = bool(DIRECTIONS[each.direction][along] != 0 and np.abs(step[along]) > _MIN_LOOP_STEP)
            values.append(
                LoopValues(
                    seam / max(float(np.median(changes)), 1e-3),
                    float(np.hypot(*step)) / max(float(np.hypot(*true_step)), 1e-3),
                    is_moving and bool(is_right.mean(axis=0) >= _MIN_RIGHT_STEPS),
                )
            )
        return values

    def compute(self, state: tuple[LoopValues, ...]) -> Mapping[str, MetricValue]:
        """Return the means of the ratios, and the share of right directions."""
        seams, motions, directions = (list(each) for each in zip(*state, strict=True)) if state else ([], [], [])
        values = estimate_mean(seams), estimate_mean(motions), estimate_share(directions)
        return dict(zip(self.describe(), values, strict=True))

    def list_examples(self, state: tuple[LoopValues, ...]) -> Sequence[Mapping[str, float | bool]]:
        """Return the values of every loop."""
        return [dict(zip(self.describe(), each, strict=True)) for each in state]


@dataclass(frozen=True, kw_only=True)
class ConnectedTransition(ShareMetric):
    """Share of transitions between two clips in which every object can be followed from the one to the other.

    An object is in every frame, and takes no step that is much larger than those of the true clip: what stands still
    and then jumps, appears elsewhere, or fades from one place to another, does not connect the clips.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "transition_connected"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="objects can be followed", unit="%", decimals=1, is_higher_better=True
    )

    def measure(self, batch: MetricBatch) -> Sequence[bool]:
        """Return whether each sample connects both clips."""
        answers = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            own, true = (batch.derive(find_objects, each, truth.scene.background) for each in (clip, truth.reference))
            colours = [each.colour for each in truth.scene.objects]
            answers.append(all(_is_followed(own.get(colour), true.get(colour)) for colour in colours))
        return answers


def _is_followed(own: ObjectTrack | None, true: ObjectTrack | None) -> bool:
    """Return whether an object is in every frame, once, with steps of about the size that they truly have."""
    if own is None or true is None:
        return own is true
    kept = true.is_visible
    if not own.is_visible[kept].all(axis=0) or (own.area > _MAX_AREA_FACTOR * true.area)[kept].any(axis=0):
        return False
    largest, limit = (float(np.nanmax(np.hypot(*np.diff(each.centre, axis=0).T), initial=0.0)) for each in (own, true))
    return largest <= _MAX_STEP_FACTOR * max(limit, _MIN_STEP)


@dataclass(frozen=True, kw_only=True)
class DepthAgreement(MeanMetric):
    """Mean share of pixels that are as near as the control says, of those that are near in one of both.

    The depth of a sample is that of the scene's object with the pixel's colour, and the background's elsewhere. An
    object in another place, or two objects that have changed their colours, are wrong.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "depth_agreement"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="depth as the control", unit="%", decimals=1, is_higher_better=True, explanation="of pixels of objects"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the share of every sample."""
        shares = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            colours = classify_colours(clip, truth.scene.background)
            depth = np.full(colours.shape, BACKGROUND_DEPTH)
            for each in truth.scene.objects:
                depth[colours == list(COLOURS).index(each.colour)] = each.depth
            true = render(truth.scene).depth
            is_near = (depth < BACKGROUND_DEPTH) | (true < BACKGROUND_DEPTH)
            shares.append(float((np.abs(depth - true) < _SAME_DEPTH)[is_near].mean(axis=0)) if is_near.any() else 1.0)
        return shares


def list_steps(track: ObjectTrack | None) -> Float[np.ndarray, "n 2"]:
    """Return rows and columns between an object's positions in neighbouring frames, without those over a border.

    Without any there is one of zero.
    """
    if track is None:
        return np.zeros((1, 2))
    steps = np.diff(np.where(track.is_visible[:, None], track.centre, np.nan), axis=0)
    steps = steps[np.isfinite(steps).all(axis=1)]
    steps = steps[np.abs(steps).max(axis=1) < _MAX_LOOP_STEP]
    return steps if len(steps) else np.zeros((1, 2))
