"""Share of samples with large motion, after VBench (arXiv 2311.17982), with another optical flow."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.evaluation.metrics.metric import MetricBatch, MetricDescription, ShareMetric
from dit_video.evaluation.metrics.temporal_metric import describe_short_clips
from dit_video.evaluation.optical_flow import estimate_flow, import_opencv
from dit_video.video import Clip

FLOW_FPS = 8.0
"""Rate at which frames are compared, per second."""
TOP_SHARE = 0.05
"""Share of a frame's pixels, those that move most, whose mean flow counts."""
FLOW_THRESHOLD = 6.0 / 256
"""Mean flow of a frame with large motion, in shorter sides of the frame."""
MOVING_SHARE = 4 / 16
"""Share of the frames that have large motion in a clip with large motion."""


def compute_top_flow(flow: Float32[np.ndarray, "H W 2"]) -> float:
    """Return the mean length in pixels of the flow of the 5 % of pixels that move most."""
    lengths = np.hypot(flow[..., 0], flow[..., 1]).ravel()
    count = max(1, int(TOP_SHARE * lengths.size))
    return float(np.partition(lengths, -count)[-count:].mean(axis=0))


def select_frames(clip: Clip) -> UInt8[np.ndarray, "t H W 3"]:
    """Return the frames of a clip at about 8 per second, or at its own rate if that is lower."""
    return clip.frames[:: max(1, round(clip.fps / FLOW_FPS))]


def is_dynamic(frames: UInt8[np.ndarray, "t H W 3"]) -> bool:
    """Return True if at least two frames, at 8 per second, have large motion.

    A quarter of them must move by more than 6/256 of the shorter side until the next one; a frame moves as the 5 % of
    its pixels that move most. These are the rules of VBench's `dynamic_degree.py`, except that at least one frame must
    move; there, two frames always count as dynamic.

    Raises:
      UserError: OpenCV is not installed.
    """
    threshold = FLOW_THRESHOLD * min(frames.shape[1:3])
    required, moving = max(1, round(MOVING_SHARE * len(frames))), 0
    for pair in itertools.pairwise(frames):
        moving += compute_top_flow(estimate_flow(*pair)) > threshold
        if moving >= required:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class DynamicDegree(ShareMetric):
    """Share of samples with large motion, with Wilson's 95 % interval.

    VBench's rules with another flow: VBench computes it by the network RAFT, this by dense inverse search.
    """

    needs, name = ("samples",), "dynamic_degree"
    description = MetricDescription(
        label="dynamic degree",
        unit="%",
        decimals=1,
        explanation="samples with large motion (VBench's rules, with the flow of dense inverse search)",
    )

    def open_weights(self) -> tuple[str, ...]:
        """Check that OpenCV is installed, and return its version."""
        return (f"OpenCV {import_opencv().__version__}",)

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return True for every sample with large motion; None for images, and clips of less than 1/8 s."""
        clips = [select_frames(clip) for clip in batch.samples]
        return [is_dynamic(each) if len(each) > 1 else None for each in clips]

    def make_note(self, state: tuple[bool | None, ...]) -> str:
        """Return a sentence on the clips that are too short; empty if there are none."""
        return describe_short_clips(state)
