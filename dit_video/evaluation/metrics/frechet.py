"""Fréchet distance of the features of samples and of clips of the data: FVD, FID, and that of any feature function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction
from dit_video.evaluation.feature_moments import FeatureMoments, measure_frechet_distance
from dit_video.evaluation.metrics.feature_sets import describe_size, extract_sets
from dit_video.evaluation.metrics.metric import Metric, MetricBatch, MetricDescription, MetricValue


class MomentPair(NamedTuple):
    """Moments of both sets; None before the first batch of a set."""

    samples: FeatureMoments | None = None
    real_clips: FeatureMoments | None = None


@dataclass(frozen=True, kw_only=True)
class FrechetMetric(Metric[MomentPair]):
    """Fréchet distance (arXiv 1706.08500, eq. 6); its memory does not grow with the number of clips."""

    needs = ("samples", "real_clips")
    features: FeatureFunction
    """Function whose values are compared."""
    name: str
    """Name of the value, such as fvd."""
    label: str
    """Name in reports, such as FVD."""
    seed: int = 0
    """Seed of the resampling that gives the interval."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of the distance, that of halves of both sets and the extrapolated one."""
        explanation = "distance of the samples' features from those of clips of the data (arXiv 1706.08500)"
        distance = MetricDescription(label=self.label, decimals=2, is_higher_better=False, explanation=explanation)
        half = MetricDescription(
            label=f"{self.label} of halves",
            decimals=2,
            is_higher_better=False,
            is_headline=False,
            explanation="mean of both halves of the sets; the difference shows what the number of clips adds",
        )
        limit = MetricDescription(
            label=f"{self.label} of infinitely many clips",
            decimals=2,
            is_higher_better=False,
            is_headline=False,
            explanation="extrapolated in the reciprocal of the number of clips (arXiv 1911.07023)",
        )
        return {self.name: distance, f"{self.name}_half": half, f"{self.name}_limit": limit}

    def init(self) -> MomentPair:
        """Return the state without examples."""
        return MomentPair()

    def update(self, state: MomentPair, batch: MetricBatch) -> MomentPair:
        """Return the state with the clips of a batch."""
        return MomentPair(
            *(
                _add_clips(moments, clips)
                for moments, clips in zip(state, extract_sets(self.features, batch), strict=True)
            )
        )

    def merge(self, first: MomentPair, second: MomentPair) -> MomentPair:
        """Return the moments of the examples of both states."""
        pairs = zip(first, second, strict=True)
        return MomentPair(*(a.merge(b) if a is not None and b is not None else a or b for a, b in pairs))

    def compute(self, state: MomentPair) -> Mapping[str, MetricValue]:
        """Return the distance; None with fewer than two clips in each group of a set."""
        samples, real_clips = state
        names = tuple(self.describe())
        counts = [0 if each is None else each.clip_count for each in state]
        if samples is None or real_clips is None or min(counts) < 2 * len(samples.counts):
            note = "" if 0 in counts else f"{min(counts)} clips are too few for a distance of halves of the sets"
            return {name: MetricValue(value=None, count=counts[0], note=note) for name in names}
        distance = measure_frechet_distance(samples, real_clips, seed=self.seed)
        size = describe_size(min(samples.size, real_clips.size), samples.channels)
        note = "; ".join(filter(None, (f"{counts[1]} clips of the data", self.features.open().identity, size)))
        value = MetricValue(value=distance.value, interval=distance.interval, count=counts[0], note=note)
        others = [MetricValue(value=each, count=counts[0]) for each in (distance.half, distance.limit)]
        return dict(zip(names, (value, *others), strict=True))


def _add_clips(moments: FeatureMoments | None, clips: Sequence[Float32[np.ndarray, "_ d"]]) -> FeatureMoments | None:
    """Return the moments with the rows of further clips."""
    if not clips:
        return moments
    rows = np.concatenate(clips)
    return (moments or FeatureMoments.zeros(rows.shape[1])).add(rows, [len(each) for each in clips])
