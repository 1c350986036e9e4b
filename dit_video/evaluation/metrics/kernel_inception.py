"""Kernel distance of the features of samples and of clips of the data: KID."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dit_video.evaluation.feature_sets import compute_kernel_distance
from dit_video.evaluation.metrics.feature_sets import FeatureRows, SetMetric
from dit_video.evaluation.metrics.metric import MetricDescription, MetricValue

_MIN_CLIPS = 4


@dataclass(frozen=True, kw_only=True)
class KernelMetric(SetMetric):
    """Kernel distance, whose expectation does not depend on the number of clips (arXiv 1801.01401)."""

    name: str = "kid"
    """Name of the value."""
    label: str = "KID"
    """Name in reports."""
    subsets: int = 100
    """Number of random subsets."""
    subset_size: int = 1000
    """Examples of a subset of at least two whole clips; at most half of the smaller set, so that subsets differ."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the distance."""
        explanation = "squared maximum mean discrepancy with a cubic kernel (arXiv 1801.01401)"
        return {
            self.name: MetricDescription(label=self.label, decimals=4, is_higher_better=False, explanation=explanation)
        }

    def compute(self, state: FeatureRows) -> Mapping[str, MetricValue]:
        """Return the distance; None with fewer than four clips in a set."""
        joined, count = state.joined, len(state.samples)
        smaller = min(count, len(state.real_clips))
        if joined is None or smaller < _MIN_CLIPS:
            return {self.name: MetricValue(value=None, count=count)}
        longest = max(map(len, state.samples + state.real_clips))
        size = min(max(2, self.subset_size // longest), smaller // 2)
        distance = compute_kernel_distance(
            joined.samples, joined.real_clips, subsets=self.subsets, subset_size=size, clips=joined.numbers
        )
        # The deviation of subsets of a share of the clips, scaled to that of all clips.
        share = size / smaller
        reach = 1.96 * distance.std * np.sqrt(share / (1 - share))
        note = f"{len(state.real_clips)} clips of the data; {self.features.open().identity}"
        interval = (distance.value - float(reach), distance.value + float(reach))
        return {self.name: MetricValue(value=distance.value, interval=interval, count=count, note=note)}
