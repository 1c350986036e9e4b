"""States of metrics that compare the features of all samples with those of all clips of the data."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction
from dit_video.evaluation.feature_moments import check_finite
from dit_video.evaluation.feature_sets import find_nearest, find_nearest_other
from dit_video.evaluation.metrics.metric import Metric, MetricBatch


class JoinedRows(NamedTuple):
    """Features of both sets in one array each."""

    samples: Float32[np.ndarray, "n d"]
    real_clips: Float32[np.ndarray, "m d"]
    numbers: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]
    """Number of the clip that each row of both sets is of."""


class NearestClips(NamedTuple):
    """Distances of clips, each the mean over its rows, from the nearest rows of the data."""

    samples: Float64[np.ndarray, " s"]
    """Distance of each sample from the data."""
    numbers: Int64[np.ndarray, " s"]
    """Number of the clip of the data that has the row nearest to one of each sample."""
    real_clips: Float64[np.ndarray, " r"]
    """Distance of each clip of the data from the other ones."""


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
        """Return the nearest clips of the data, computed once; None if a set is empty."""
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
    """Return the rows of all clips, and the number of the clip that each is of."""
    return np.concatenate(clips), np.repeat(np.arange(len(clips)), [len(rows) for rows in clips])


def extract_sets(
    features: FeatureFunction, batch: MetricBatch
) -> tuple[Sequence[Float32[np.ndarray, "_ d"]], Sequence[Float32[np.ndarray, "_ d"]]]:
    """Return the features of each sample and of each clip of the data in a batch.

    Raises:
      UserError: features that are not finite.
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
