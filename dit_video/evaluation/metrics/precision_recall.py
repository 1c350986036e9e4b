"""Precision and recall of the features of samples: how many are realistic, and how much of the data they cover."""

from collections.abc import Mapping
from dataclasses import dataclass

from dit_video.evaluation.feature_sets import compute_overlap
from dit_video.evaluation.metrics.feature_sets import FeatureRows, SetMetric
from dit_video.evaluation.metrics.intervals import compute_wilson_interval
from dit_video.evaluation.metrics.metric import MetricDescription, MetricValue


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall(SetMetric):
    """Precision and recall within manifolds of nearest neighbours (arXiv 1904.06991)."""

    neighbours: int = 3
    """Number of neighbours up to which the ball around an example reaches."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of both."""
        explanations = {
            "precision": "share of the samples within the manifold of the data (arXiv 1904.06991)",
            "recall": "share of the clips of the data within the manifold of the samples (arXiv 1904.06991)",
        }
        return {
            name: MetricDescription(label=name, unit="%", decimals=1, is_higher_better=True, explanation=explanation)
            for name, explanation in explanations.items()
        }

    def compute(self, state: FeatureRows) -> Mapping[str, MetricValue]:
        """Return both, with Wilson's intervals, in which the manifolds are fixed; None for too few clips.

        Of frames, the intervals are those of as many independent answers as there are clips.
        """
        joined, counts = state.joined, (len(state.samples), len(state.real_clips))
        if joined is None or min(counts) <= self.neighbours:
            return {name: MetricValue(value=None, count=counts[0]) for name in self.describe()}
        own, others = joined.numbers
        overlap = compute_overlap(joined.real_clips, joined.samples, neighbours=self.neighbours, clips=(others, own))
        values = {}
        for name, share, count in (
            ("precision", overlap.precision, counts[0]),
            ("recall", overlap.recall, counts[1]),
        ):
            interval = compute_wilson_interval(round(share * count), count)
            note = self.features.open().identity
            values[name] = MetricValue(value=share, interval=interval, count=count, note=note)
        return values
