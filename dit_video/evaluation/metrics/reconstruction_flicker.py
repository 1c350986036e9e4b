"""Flicker that an autoencoder adds to clips."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from dit_video.evaluation.metrics.metric import MetricBatch, MetricDescription
from dit_video.evaluation.metrics.ssim_terms import check_same_shape
from dit_video.evaluation.metrics.temporal_metric import TemporalMetric


def compute_added_flicker(original: UInt8[np.ndarray, "T H W 3"], decoded: UInt8[np.ndarray, "..."]) -> float:
    """Return the mean absolute difference of the changes from frame to frame, in 0..255.

    It is the mean of `|(y[t+1] - y[t]) - (x[t+1] - x[t])|` over time, pixels and colours, with the original x and its
    reconstruction y: dtSSD (Erofeev et al. 2015) with absolute values in place of squares, so that its unit is a level
    of brightness. An error that is the same in all frames, such as a blurred background at rest, adds nothing.

    Raises:
      UserError: the shapes differ.
    """
    check_same_shape(original, decoded)
    errors = (y.astype(np.int16) - x.astype(np.int16) for x, y in zip(original, decoded, strict=True))
    # A pair of frames at a time: memory does not grow with the clip.
    before, changes = next(errors), []
    for error in errors:
        changes.append(float(np.abs(error - before).mean(axis=(0, 1, 2))))
        before = error
    return float(np.mean(changes))


@dataclass(frozen=True, kw_only=True)
class ReconstructionFlicker(TemporalMetric):
    """Mean change from frame to frame that reconstructions have and their originals do not."""

    needs, name = ("pairs",), "reconstruction_flicker"
    description = MetricDescription(
        label="flicker of reconstructions",
        unit="levels",
        decimals=2,
        is_higher_better=False,
        explanation="mean absolute difference of changes from frame to frame, of 255 levels (after dtSSD, 2015)",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the flicker of every reconstruction; None for images."""
        pairs = [(pair.original.frames, pair.decoded.frames) for pair in batch.pairs]
        return [compute_added_flicker(*pair) if len(pair[0]) >= self.min_frames else None for pair in pairs]
