"""Edits of an object's colour: whether it changed, and whether the object stayed where it was."""

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
from dit_video.scenes.metrics.scene_objects import find_objects

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
