"""Memorisation: samples that are nearer to a clip of the data than clips of the data are to each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from dit_video.evaluation.feature_sets import find_nearest
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
    the training. Functions of single frames, which have several rows for a clip, count frames.
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
        count = sum(map(len, state.samples))
        compared = self._compare(state)
        if compared is None:
            return {self.name: MetricValue(value=None, count=count)}
        near = int(compared[0].sum(axis=0))
        interval = compute_wilson_interval(near, count)
        note = self.features.open().identity
        return {self.name: MetricValue(value=near / count, interval=interval, count=count, note=note)}

    def list_examples(self, state: FeatureRows) -> Sequence[Mapping[str, float | bool]]:
        """Return for every sample whether it is memorised."""
        compared = self._compare(state)
        return () if compared is None else [{self.name: bool(each)} for each in compared[0]]

    def list_nearest(self, state: FeatureRows) -> Sequence[int]:
        """Return the number of the nearest clip of the data of every sample."""
        compared = self._compare(state)
        return () if compared is None else compared[1].tolist()

    def _compare(self, state: FeatureRows) -> tuple[Bool[np.ndarray, " n"], Int[np.ndarray, " n"]] | None:
        joined = state.join()
        if joined is None or len(joined[1]) < _MIN_CLIPS:
            return None
        samples, real_clips = joined
        distances, numbers = find_nearest(samples, real_clips)
        threshold = np.quantile(find_nearest(real_clips)[0], _QUANTILE)
        return distances < threshold, numbers
