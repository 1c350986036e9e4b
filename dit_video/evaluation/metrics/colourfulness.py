"""Colourfulness of samples (Hasler and Süsstrunk 2003)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription


def compute_colourfulness(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return the measure M3 of Hasler and Süsstrunk, "Measuring colourfulness in natural images", averaged over frames.

    It is `s + 0.3 m` with the root of the sum of squares of the standard deviations (s) and of the means (m) of the
    opponent colours `R - G` and `(R + G) / 2 - B`, in 0..255, over a frame's pixels. In the paper 15 is slightly
    colourful, 33 moderately, 45 averagely, 59 quite, 82 highly, 109 extremely.
    """
    values = []
    for frame in frames:
        red, green, blue = np.moveaxis(frame.astype(np.float64), -1, 0)
        opponents = np.stack([red - green, (red + green) / 2 - blue])
        deviation = np.hypot(*opponents.std(axis=(1, 2)))
        values.append(float(deviation + 0.3 * np.hypot(*opponents.mean(axis=(1, 2)))))
    return float(np.mean(values))


@dataclass(frozen=True, kw_only=True)
class Colourfulness(MeanMetric):
    """Mean colourfulness of samples, to be compared with that of the data."""

    needs, name = ("samples",), "colourfulness"
    description = MetricDescription(
        label="colourfulness",
        decimals=1,
        explanation="measure M3 of Hasler and Süsstrunk 2003: 15 is slightly colourful, 59 quite, 109 extremely",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the colourfulness of every sample."""
        return [compute_colourfulness(clip.frames) for clip in batch.samples]
