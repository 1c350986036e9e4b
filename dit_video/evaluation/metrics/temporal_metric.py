"""Metrics over time, which images do not take part in."""

from collections.abc import Sequence
from typing import ClassVar

from dit_video.evaluation.metrics.metric import MeanMetric


class TemporalMetric(MeanMetric):
    """A metric with one number per clip of several frames: their mean, with Student's 95 % interval.

    Clips that are too short to have a number, such as images, have the measurement None and do not count; the note of
    the value says how many they are.
    """

    min_frames: ClassVar[int] = 2
    """Number of frames of the shortest clip that counts."""

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return a sentence on the clips that are too short; empty if there are none."""
        return describe_short_clips(state)


def describe_short_clips(state: Sequence[float | bool | None]) -> str:
    """Return a sentence on the clips that are too short to have a measurement; empty if there are none."""
    count = sum(value is None for value in state)
    return f"without {count} clips that are too short" if count else ""
