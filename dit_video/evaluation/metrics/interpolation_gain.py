"""Frames between known ones, against linear blending."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.reconstruction import compute_limited_psnr


@dataclass(frozen=True, kw_only=True)
class InterpolationGain(MeanMetric):
    """Mean PSNR of new frames above that of linear blending of the autoencoder's reconstruction of known frames."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "interpolation_gain"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="new frames above linear blending", unit="dB", decimals=2, is_higher_better=True, explanation="PSNR"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the gain of every sample."""
        gains = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            is_known = np.any(truth.is_known, axis=(1, 2))
            blended = blend_linearly(truth.reconstruction.frames, is_known)
            true = truth.reference.frames[~is_known]
            gains.append(
                compute_limited_psnr(true, clip.frames[~is_known]) - compute_limited_psnr(true, blended[~is_known])
            )
        return gains


def blend_linearly(frames: np.ndarray, is_known: Any) -> np.ndarray:
    """Return frames of which unknown ones are blended of the known ones around them."""
    known = np.flatnonzero(is_known)
    blended = []
    for number in range(len(frames)):
        after = min(int(np.searchsorted(known, number)), len(known) - 1)
        before = after if known[after] <= number else max(after - 1, 0)
        first, last = known[before], known[after]
        weight = 0.0 if first == last else (number - first) / (last - first)
        blended.append((1 - weight) * frames[first].astype(np.float32) + weight * frames[last])
    return np.rint(np.stack(blended)).astype(np.uint8)
