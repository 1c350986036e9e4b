"""Smoothness of the motion of samples, after VBench (arXiv 2311.17982), with another interpolation of frames."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from dit_video.evaluation.metrics.metric import MetricBatch, MetricDescription
from dit_video.evaluation.metrics.temporal_metric import TemporalMetric
from dit_video.evaluation.optical_flow import import_opencv, interpolate_middle


def compute_motion_smoothness(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return `(255 - E) / 255` with the mean absolute error E of every second frame, interpolated from its neighbours.

    Frames 1, 3, 5 … that have two neighbours are compared, as in VBench's `motion_smoothness.py`; clips have at least
    three frames. 1 is a clip whose frames are where a steady motion puts them.

    Raises:
      UserError: OpenCV is not installed.
    """
    errors = []
    for index in range(1, len(frames) - 1, 2):
        middle = interpolate_middle(frames[index - 1], frames[index + 1])
        difference = middle.astype(np.int16) - frames[index].astype(np.int16)
        errors.append(float(np.abs(difference).mean(axis=(0, 1, 2))))
    return (255 - float(np.mean(errors))) / 255


@dataclass(frozen=True, kw_only=True)
class MotionSmoothness(TemporalMetric):
    """Mean smoothness of motion: how well frames are predicted from their neighbours.

    A variant of VBench's, whose values are not comparable with it: VBench interpolates by the network AMT-S, this by
    optical flow (see `interpolate_middle`).
    """

    needs, name, min_frames = ("samples",), "motion_smoothness", 3
    description = MetricDescription(
        label="motion smoothness",
        is_higher_better=True,
        explanation="frames predicted from their neighbours by optical flow, at most 1 (VBench's, without its network)",
    )

    def open_weights(self) -> tuple[str, ...]:
        """Check that OpenCV is installed, and return its version."""
        return (f"OpenCV {import_opencv().__version__}",)

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the smoothness of every sample; None for those of fewer than three frames."""
        clips = [clip.frames for clip in batch.samples]
        return [compute_motion_smoothness(each) if len(each) >= self.min_frames else None for each in clips]
