"""Memorisation: samples that are nearer to a clip of the data than clips of the data are to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from dit_video.evaluation.metrics.feature_sets import FeatureRows, SetMetric
from dit_video.evaluation.metrics.intervals import compute_wilson_interval
from dit_video.evaluation.metrics.metric import MetricDescription, MetricValue

_QUANTILE = 0.05
_MIN_CLIPS = 20
"""Number of clips of the data for which the quantile has a meaning."""


@dataclass(frozen=True, kw_only=True)
class Memorisation(SetMetric):
    """Share of samples that are nearer to a clip of the data than 95 % of these are to their nearest other one.

    New samples of the data's distribution give 5 %, copies of its clips 100 %. The clips of the data should be those of
    the training. By a function of single frames a clip's distance is the mean of its frames' distances.
    """

    name: str = "memorised"
    """Name of the value."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the share."""
        explanation = "samples nearer to a clip of the data than 95 % of these are to another; 5 % for new samples"
        return {
            self.name: MetricDescription(
                label="memorised", unit="%", decimals=1, is_higher_better=False, explanation=explanation
            )
        }

    def compute(self, state: FeatureRows) -> Mapping[str, MetricValue]:
        """Return the share, with Wilson's interval, in which the data are fixed; None with fewer than 20 clips."""
        count = len(state.samples)
        answers = self._find_memorised(state)
        if not len(answers):
            return {self.name: MetricValue(value=None, count=count)}
        near = int(answers.sum(axis=0))
        interval = compute_wilson_interval(near, count)
        note = self.features.open().identity
        return {self.name: MetricValue(value=near / count, interval=interval, count=count, note=note)}

    def list_examples(self, state: FeatureRows) -> Sequence[Mapping[str, float | bool]]:
        """Return for every sample whether it is memorised."""
        return [{self.name: bool(each)} for each in self._find_memorised(state)]

    def list_nearest(self, state: FeatureRows) -> Sequence[int]:
        """Return the number of the nearest clip of the data of every sample."""
        return () if state.nearest is None or len(state.real_clips) < _MIN_CLIPS else state.nearest.numbers.tolist()

    def _find_memorised(self, state: FeatureRows) -> Bool[np.ndarray, " n"]:
        """Return the answer for each sample; none with too few clips of the data."""
        nearest = state.nearest
        if nearest is None or len(state.real_clips) < _MIN_CLIPS:
            return np.zeros(0, bool)
        return nearest.samples < np.quantile(nearest.real_clips, _QUANTILE)
