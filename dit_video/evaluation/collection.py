"""Metrics that are computed together, and their results."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dit_video.core.registry import get_class_name
from dit_video.evaluation.metrics.metric import Metric, MetricBatch, MetricDescription, MetricInput, MetricValue


class MetricResult(NamedTuple):
    """A value of a metric, with its description."""

    metric: str
    """Class of the metric: `module:class`."""
    description: MetricDescription
    estimate: MetricValue


def list_results(results: Mapping[str, MetricResult]) -> list[dict[str, Any]]:
    """Return the entries of `results` in `metrics.json`."""
    return [
        {"name": name, "metric": each.metric, **vars(each.estimate), **vars(each.description)}
        for name, each in results.items()
    ]


class MetricCollection:
    """Metrics with their states; each gets the data that it needs, and no metric knows of the others."""

    def __init__(self, metrics: Sequence[Metric]):
        self.metrics = tuple(metrics)
        self.states: list[Any] = [metric.init() for metric in self.metrics]
        """State of each metric."""

    @property
    def needs(self) -> frozenset[MetricInput]:
        """Return the data that any of the metrics needs."""
        return frozenset(need for metric in self.metrics for need in metric.needs)

    def update(self, batch: MetricBatch) -> None:
        """Update every metric that needs data of the batch."""
        for index, metric in enumerate(self.metrics):
            if any(getattr(batch, need) for need in metric.needs if need != "pipeline"):
                self.states[index] = metric.update(self.states[index], batch.select(metric.needs))

    def merge(self, states: Sequence[Any]) -> None:
        """Add the examples of further states of the same metrics, which come after this collection's own."""
        merged = zip(self.metrics, self.states, states, strict=True)
        self.states = [metric.merge(own, other) for metric, own, other in merged]

    def compute(self) -> dict[str, MetricResult]:
        """Return the results by name."""
        results: dict[str, MetricResult] = {}
        for metric, state in zip(self.metrics, self.states, strict=True):
            name, estimates = get_class_name(type(metric)), metric.compute(state)
            results |= {key: MetricResult(name, each, estimates[key]) for key, each in metric.describe().items()}
        return results

    def list_nearest(self) -> Sequence[int]:
        """Return the number of each sample's nearest data clip, from the first metric that knows it."""
        lists = (metric.list_nearest(state) for metric, state in zip(self.metrics, self.states, strict=True))
        return next(filter(None, lists), ())

    def list_examples(self, names: Sequence[str], needs: Collection[MetricInput]) -> dict[str, dict[str, Any]]:
        """Return each named example's values by the metrics whose examples are of this kind.

        Data clips are the examples of metrics that need nothing else but the pipeline.
        """
        values: dict[str, dict[str, Any]] = {name: {} for name in names}
        for metric, state in zip(self.metrics, self.states, strict=True):
            rows: Sequence[Mapping[str, Any]] = metric.list_examples(state)
            own: set[MetricInput] = {*metric.needs} - {"pipeline"}
            if (own - {"real_clips"} or own) <= {*needs} and rows:
                for name, row in zip(names, rows, strict=True):
                    values[name] |= row
        return values
