"""Fidelity of the frames of a zoom out: each holds the former one, smaller, in its centre."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dit_video.core.resize import resize
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.reconstruction import compute_limited_psnr


@dataclass(frozen=True, kw_only=True)
class ZoomSteps(MeanMetric):
    """Mean PSNR of the centres of a zoom out below that of the autoencoder's own reconstruction of the first frame.

    The centre of a frame, the known pixels of `TaskTruth.is_known`, is compared with the former frame of that size.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "zoom_centre_loss"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="centre of a zoom below the reconstruction", unit="dB", decimals=2, is_higher_better=False
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the mean loss over the frames of every sample with known pixels, and None for the others."""
        losses: list[float | None] = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if truth.is_known is None:
                losses.append(None)
                continue
            best = compute_limited_psnr(truth.reference.frames, truth.reconstruction.frames)
            steps = zip(clip.frames, clip.frames[1:], truth.is_known[1:], strict=False)
            losses.append(best - float(np.mean([_measure_step(*step) for step in steps])))
        return losses


def _measure_step(former: np.ndarray, frame: np.ndarray, is_centre: np.ndarray) -> float:
    """Return the PSNR of the centre of a frame, in dB."""
    rows, columns = np.flatnonzero(is_centre.any(axis=1)), np.flatnonzero(is_centre.any(axis=0))
    centre = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return compute_limited_psnr(resize(former[None], *centre.shape[:2])[0], centre)
