"""Inception score of samples: of frames by Inception-v3, of clips by C3D."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from dit_video.evaluation.feature_functions.feature_function import FeatureFunction
from dit_video.evaluation.feature_moments import check_finite
from dit_video.evaluation.feature_sets import compute_inception_score
from dit_video.evaluation.metrics.feature_sets import join_clips
from dit_video.evaluation.metrics.metric import Metric, MetricBatch, MetricDescription, MetricValue

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
    """Number of parts, of whole samples, whose scores are averaged."""

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
