"""Metrics over time, which images do not take part in."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from dit_video.evaluation.metrics.intervals import compute_mean_interval
from dit_video.evaluation.metrics.metric import ExampleMetric, MetricDescription, MetricValue


class TemporalMetric(ExampleMetric[float | None]):
    """A metric with one number per clip of several frames: their mean, with Student's 95 % interval.

    Clips that are too short to have a number, such as images, have the measurement None and do not count; the note of
    the value says how many they are.
    """

    name: ClassVar[str]
    """Name of the value."""
    description: ClassVar[MetricDescription]
    """Description of the value."""
    min_frames: ClassVar[int] = 2
    """Number of frames of the shortest clip that counts."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the mean."""
        return {self.name: self.description}

    def compute(self, state: tuple[float | None, ...]) -> Mapping[str, MetricValue]:
        """Return the mean over the clips that count."""
        values = [value for value in state if value is not None]
        mean, interval = float(np.mean(values)) if values else None, compute_mean_interval(values)
        return {self.name: MetricValue(value=mean, interval=interval, count=len(values), note=self.make_note(state))}

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return a sentence on the clips that are too short; empty if there are none."""
        count = sum(value is None for value in state)
        return f"without {count} clips that are too short" if count else ""

    def list_examples(self, state: tuple[float | None, ...]) -> Sequence[Mapping[str, float | bool]]:
        """Return the number of every clip; nothing for one that is too short."""
        return [{} if value is None else {self.name: float(value)} for value in state]
