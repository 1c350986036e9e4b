"""Borders of regions that are filled in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription

_REACH = 4
"""Distance from the border, in pixels, within which gradients are compared."""


@dataclass(frozen=True, kw_only=True)
class RegionBorder(MeanMetric):
    """Mean gradient across the border of known pixels, relative to that near it: above 1 where there is an edge."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "border_gradient"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="gradient at the border over that beside it", decimals=2, is_higher_better=False
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the ratio of every sample with known pixels, and None for the others."""
        return [
            None if truth.is_known is None else measure_border(clip.frames, truth.is_known)
            for clip, truth in zip(batch.samples, batch.scenes, strict=True)
        ]


def measure_border(frames: np.ndarray, is_known: np.ndarray) -> float:
    """Return the mean gradient across the border of a mask over that of pixel pairs near it, on either side."""
    across, nearby = [], []
    values = frames.astype(np.float32)
    for axis in (1, 2):
        gradient = np.abs(np.diff(values, axis=axis)).mean(axis=-1)
        is_border = np.diff(is_known.astype(np.int8), axis=axis) != 0
        near = np.zeros_like(is_border)
        for shift in (*range(-_REACH, 0), *range(1, _REACH + 1)):
            near |= np.roll(is_border, shift, axis=axis)
        across.append(gradient[is_border])
        nearby.append(gradient[near & ~is_border])
    return float(np.concatenate(across).mean(axis=0) / max(float(np.concatenate(nearby).mean(axis=0)), 1e-3))
