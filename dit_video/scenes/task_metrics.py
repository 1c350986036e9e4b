"""Metrics of generation tasks on rendered scenes: edits of a colour, and loops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    estimate_mean,
    estimate_share,
)
from dit_video.scenes.objects import ObjectTrack, find_objects

_MAX_REST = 0.3
"""Largest area of the source's colour relative to the target's that counts as changed."""


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


@dataclass(frozen=True, kw_only=True)
class LoopSeam(ExampleMetric[tuple[float, float]]):
    """Change from a loop's last frame to its first, and the way that objects go.

    The change is relative to the median change of neighbouring frames, the way to that of the scene's rendering, both
    with the step over the seam. A loop that stands still has no seam, but no motion either.
    """

    needs = ("samples", "scenes")

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of both ratios."""
        return {
            "loop_seam": MetricDescription(label="seam of loops", decimals=2, is_higher_better=False),
            "loop_motion": MetricDescription(label="motion in loops", unit="%", decimals=0, is_higher_better=True),
        }

    def measure(self, batch: MetricBatch) -> Sequence[tuple[float, float]]:
        """Return both ratios of every loop."""
        ratios = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            frames = clip.frames.astype(np.float32)
            changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
            seam = float(np.abs(frames[0] - frames[-1]).mean(axis=(0, 1, 2)))
            ways = []
            for each in (clip, truth.reference):
                tracks = batch.derive(find_objects, each, truth.scene.background)
                ways.append(
                    sum(_measure_way(tracks[one.colour]) for one in truth.scene.objects if one.colour in tracks)
                )
            ratios.append((seam / max(float(np.median(changes)), 1e-3), ways[0] / max(ways[1], 1e-3)))
        return ratios

    def compute(self, state: tuple[tuple[float, float], ...]) -> Mapping[str, MetricValue]:
        """Return the means of both ratios."""
        ratios = np.reshape(state, (-1, 2)).T.tolist()
        return {name: estimate_mean(each) for name, each in zip(self.describe(), ratios, strict=True)}

    def list_examples(self, state: tuple[tuple[float, float], ...]) -> Sequence[Mapping[str, float | bool]]:
        """Return both ratios of every loop."""
        return [dict(zip(self.describe(), ratios, strict=True)) for ratios in state]


def _measure_way(track: ObjectTrack) -> float:
    """Return the length of an object's way, of positions that are averaged over three frames."""
    centre = track.centre[track.is_visible]
    if len(centre) < 4:
        return 0.0
    smooth = (centre[:-2] + centre[1:-1] + centre[2:]) / 3
    return float(np.hypot(*np.diff(smooth, axis=0).T).sum(axis=0))
