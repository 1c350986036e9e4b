"""Seams of loops, and the motion that is left in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    estimate_mean,
)
from dit_video.scenes.metrics.scene_objects import ObjectTrack, find_objects


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
