"""Metrics of distributions of features: Fréchet and kernel distances, scores, precision, recall, memorisation."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from dit_video.evaluation.feature_functions import FeatureFunction
from dit_video.evaluation.feature_statistics import (
    FeatureMoments,
    check_finite,
    compute_inception_score,
    compute_kernel_distance,
    compute_overlap,
    find_nearest,
    find_nearest_other,
    measure_frechet_distance,
)
from dit_video.evaluation.metrics.metric import (
    Metric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    compute_wilson_interval,
)


class JoinedRows(NamedTuple):
    """Features of both sets in one array each."""

    samples: Float32[np.ndarray, "n d"]
    real_clips: Float32[np.ndarray, "m d"]
    numbers: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]
    """Number of each row's clip, for both sets."""


class NearestClips(NamedTuple):
    """Distances from clips to the nearest rows of the data, each a mean over the clip's rows."""

    samples: Float64[np.ndarray, " s"]
    """Distance of each sample from the data."""
    numbers: Int64[np.ndarray, " s"]
    """Number of the data clip that has the row nearest to any of each sample's rows."""
    real_clips: Float64[np.ndarray, " r"]
    """Distance from each data clip to the others."""


@dataclass(frozen=True)
class FeatureRows:
    """Features of each clip of both sets: one row, or one for each of its frames."""

    samples: tuple[Float32[np.ndarray, "_ d"], ...] = ()
    real_clips: tuple[Float32[np.ndarray, "_ d"], ...] = ()

    @functools.cached_property
    def joined(self) -> JoinedRows | None:
        """Return the features of each set; None if one is empty."""
        if not self.samples or not self.real_clips:
            return None
        (samples, own), (real_clips, others) = join_clips(self.samples), join_clips(self.real_clips)
        return JoinedRows(samples, real_clips, (own, others))

    @functools.cached_property
    def nearest(self) -> NearestClips | None:
        """Return the nearest data clips, computed once; None if a set is empty."""
        joined = self.joined
        if joined is None:
            return None
        own, others = joined.numbers
        distances, rows = find_nearest(joined.samples, joined.real_clips)
        order = np.lexsort((distances, own))  # by sample, and the nearest row of each first
        closest = order[np.unique(own[order], return_index=True)[1]]
        return NearestClips(
            samples=_average_clips(distances, own),
            numbers=others[rows[closest]],
            real_clips=_average_clips(find_nearest_other(joined.real_clips, others)[0], others),
        )


@dataclass(frozen=True, kw_only=True)
class SetMetric(Metric[FeatureRows]):
    """Base of metrics that need the features of both sets at once."""

    needs = ("samples", "real_clips")
    features: FeatureFunction
    """Function whose values are compared."""

    def init(self) -> FeatureRows:
        """Return the state without features."""
        return FeatureRows()

    def update(self, state: FeatureRows, batch: MetricBatch) -> FeatureRows:
        """Return the state with the features of a batch."""
        samples, real_clips = extract_sets(self.features, batch)
        return self.merge(state, FeatureRows(tuple(samples), tuple(real_clips)))

    def merge(self, first: FeatureRows, second: FeatureRows) -> FeatureRows:
        """Return the features of both states."""
        return FeatureRows(first.samples + second.samples, first.real_clips + second.real_clips)


def join_clips(
    clips: Sequence[Float32[np.ndarray, "_ d"]],
) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
    """Return the rows of all clips, and the number of each row's clip."""
    return np.concatenate(clips), np.repeat(np.arange(len(clips)), [len(rows) for rows in clips])


def extract_sets(
    features: FeatureFunction, batch: MetricBatch
) -> tuple[Sequence[Float32[np.ndarray, "_ d"]], Sequence[Float32[np.ndarray, "_ d"]]]:
    """Return the features of each sample and each data clip in a batch.

    Raises:
      UserError: If the features are not finite.
    """
    samples = batch.extract(features, "samples") if batch.samples else []
    real_clips = batch.extract(features, "real_clips") if batch.real_clips else []
    for clips in (samples, real_clips):
        check_finite(clips)
    return samples, real_clips


def describe_size(examples: int, channels: int) -> str:
    """Return a warning if a set has no more examples than features; empty for a larger one."""
    if examples > channels:
        return ""
    return f"only {examples} examples for {channels} features, so that the value depends much on their number"


def _average_clips(values: Float64[np.ndarray, " n"], clips: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " c"]:
    return np.bincount(clips, weights=values) / np.bincount(clips)


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
        """Return the descriptions of the distance, the distance of halves of both sets, and the extrapolated one."""
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


_MIN_KERNEL_CLIPS = 4


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
    """Examples in a subset, which has at least two whole clips; at most half of the smaller set, so that subsets
    differ."""

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
        if joined is None or smaller < _MIN_KERNEL_CLIPS:
            return {self.name: MetricValue(value=None, count=count)}
        longest = max(map(len, state.samples + state.real_clips))
        size = min(max(2, self.subset_size // longest), smaller // 2)
        distance = compute_kernel_distance(
            joined.samples, joined.real_clips, subsets=self.subsets, subset_size=size, clips=joined.numbers
        )
        # The deviation of subsets with a share of the clips, scaled to all clips.
        share = size / smaller
        reach = 1.96 * distance.std * np.sqrt(share / (1 - share))
        note = f"{len(state.real_clips)} clips of the data; {self.features.open().identity}"
        interval = (distance.value - float(reach), distance.value + float(reach))
        return {self.name: MetricValue(value=distance.value, interval=interval, count=count, note=note)}


LogitRows = tuple[Float32[np.ndarray, "_ c"], ...]
"""Logits of each sample: one row, or one for each of its frames."""


@dataclass(frozen=True, kw_only=True)
class InceptionScore(Metric[LogitRows]):
    """Inception score: high if each sample is of a clear class, and the classes are many (arXiv 1606.03498)."""

    needs = ("samples",)
    logits: FeatureFunction
    """Logits of a classifier."""
    name: str = "inception_score"
    """Name of the value."""
    label: str = "Inception score"
    """Name in reports."""
    splits: int = 10
    """Number of parts, made of whole samples, whose scores are averaged."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the score."""
        explanation = f"mean over {self.splits} parts of the samples (arXiv 1606.03498)"
        return {
            self.name: MetricDescription(label=self.label, decimals=2, is_higher_better=True, explanation=explanation)
        }

    def init(self) -> LogitRows:
        """Return the state without samples."""
        return ()

    def update(self, state: LogitRows, batch: MetricBatch) -> LogitRows:
        """Return the state with the logits of a batch."""
        clips = batch.extract(self.logits, "samples")
        check_finite(clips)
        return (*state, *clips)

    def merge(self, first: LogitRows, second: LogitRows) -> LogitRows:
        """Return the logits of both states."""
        return first + second

    def compute(self, state: LogitRows) -> Mapping[str, MetricValue]:
        """Return the score, with a normal interval from the deviation of the parts; None for fewer samples than parts.

        The score of few samples is too low: parts should have several thousand.
        """
        count = len(state)
        if count < self.splits:
            return {self.name: MetricValue(value=None, count=count)}
        logits, clips = join_clips(state)
        score, std = compute_inception_score(logits, splits=self.splits, clips=clips)
        reach = 1.96 * std / np.sqrt(self.splits)
        note = self.logits.open().identity
        interval = (score - float(reach), score + float(reach))
        return {self.name: MetricValue(value=score, interval=interval, count=count, note=note)}


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall(SetMetric):
    """Precision and recall within manifolds of nearest neighbours (arXiv 1904.06991)."""

    neighbours: int = 3
    """Rank of the neighbour that the ball around an example reaches to."""

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

        For frames, the intervals count as many independent answers as there are clips.
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


_QUANTILE = 0.05
_MIN_MEMORISATION_CLIPS = 20
"""Smallest number of data clips for which the quantile is meaningful."""


@dataclass(frozen=True, kw_only=True)
class Memorisation(SetMetric):
    """Share of samples that are nearer to a data clip than 95 % of data clips are to their nearest other one.

    New samples of the data's distribution give 5 %, copies of its clips 100 %. The data clips should be the training
    clips. With a function of single frames, a clip's distance is the mean of its frames' distances.
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
        """Return the number of every sample's nearest data clip."""
        return (
            ()
            if state.nearest is None or len(state.real_clips) < _MIN_MEMORISATION_CLIPS
            else state.nearest.numbers.tolist()
        )

    def _find_memorised(self, state: FeatureRows) -> Bool[np.ndarray, " n"]:
        """Return the answer for each sample; none with too few data clips."""
        nearest = state.nearest
        if nearest is None or len(state.real_clips) < _MIN_MEMORISATION_CLIPS:
            return np.zeros(0, bool)
        return nearest.samples < np.quantile(nearest.real_clips, _QUANTILE)
