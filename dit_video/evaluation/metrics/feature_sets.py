"""States of metrics that compare the features of all samples with those of all clips of the data."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction
from dit_video.evaluation.feature_moments import check_finite
from dit_video.evaluation.metrics.metric import Metric, MetricBatch


class FeatureRows(NamedTuple):
    """Batches of features of both sets."""

    samples: tuple[Float32[np.ndarray, "_ d"], ...] = ()
    real_clips: tuple[Float32[np.ndarray, "_ d"], ...] = ()

    def join(self) -> tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "m d"]] | None:
        """Return the features of each set; None if one is empty."""
        if not self.samples or not self.real_clips:
            return None
        return np.concatenate(self.samples), np.concatenate(self.real_clips)


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
        return self.merge(state, FeatureRows(_wrap(samples), _wrap(real_clips)))

    def merge(self, first: FeatureRows, second: FeatureRows) -> FeatureRows:
        """Return the features of both states."""
        return FeatureRows(first.samples + second.samples, first.real_clips + second.real_clips)


def extract_sets(
    features: FeatureFunction, batch: MetricBatch
) -> tuple[Float32[np.ndarray, "n d"] | None, Float32[np.ndarray, "m d"] | None]:
    """Return the features of the samples and of the clips of the data in a batch; None where it has none.

    Raises:
      UserError: features that are not finite.
    """
    samples = batch.extract(features, "samples") if batch.samples else None
    real_clips = batch.extract(features, "real_clips") if batch.real_clips else None
    for rows in (samples, real_clips):
        if rows is not None:
            check_finite(rows)
    return samples, real_clips


def describe_size(examples: int, channels: int) -> str:
    """Return a warning if a set has no more examples than features; empty for a larger one."""
    if examples > channels:
        return ""
    return f"only {examples} examples for {channels} features, so that the value depends much on their number"


def _wrap(rows: Float32[np.ndarray, "n d"] | None) -> tuple[Float32[np.ndarray, "n d"], ...]:
    return () if rows is None else (rows,)
