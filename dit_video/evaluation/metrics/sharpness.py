"""Sharpness of samples, by the variance of the Laplacian."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from scipy.ndimage import laplace

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription

LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in the brightness (ITU-R BT.601)."""


def compute_sharpness(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return the variance over pixels of the Laplacian of the brightness, averaged over frames.

    This is the focus measure LAP4 of Pertuz et al. 2013, after Pech-Pacheco et al. 2000, with the Laplacian of four
    neighbours and frames mirrored about their outermost pixels. Its unit is the square of a level of 255.
    """
    variances = []
    for frame in frames:
        variances.append(float(laplace(frame @ np.array(LUMA), mode="mirror").var(axis=(0, 1))))
    return float(np.mean(variances))


@dataclass(frozen=True, kw_only=True)
class Sharpness(MeanMetric):
    """Mean sharpness of samples.

    Noise raises it as edges do, and it depends on the content and the size of frames: it is to be compared with that of
    the data, at one size.
    """

    needs, name = ("samples",), "sharpness"
    description = MetricDescription(
        label="sharpness",
        decimals=0,
        explanation="variance of the Laplacian of the brightness in 0..255; noise raises it, too",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the sharpness of every sample."""
        return [compute_sharpness(clip.frames) for clip in batch.samples]
