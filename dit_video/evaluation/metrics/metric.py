"""Interface of metrics: what an evaluation computes from samples, reconstructions or the model itself.

A metric is pure: a frozen dataclass whose methods are functions of its fields and their arguments. An evaluation starts
with `init`, hands batches to `update`, and reads the result with `compute`. `merge` combines the states of several
processes or runs, and the result covers all their examples.
"""

import abc
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Concatenate, Generic, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np
from jaxtyping import Float32
from scipy.special import stdtrit

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_functions import FeatureFunction
from dit_video.sampling.pipeline import Pipeline
from dit_video.video import Clip


def compute_wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's interval (1927) for a share; (0, 1) if the count is 0."""
    from scipy.stats import binomtest  # slow to import, and needed by few programs that import this module

    if count == 0:
        return 0.0, 1.0
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def compute_mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's t interval (1908) for a mean, exact for independent normal values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    reach = float(stdtrit(len(values) - 1, 0.975)) * deviation / len(values) ** 0.5
    return mean - reach, mean + reach


MetricState = TypeVar("MetricState")
Example = TypeVar("Example")
Derived = TypeVar("Derived")
Arguments = ParamSpec("Arguments")
MetricInput = Literal["samples", "prompts", "references", "scenes", "real_clips", "pairs", "baselines", "pipeline"]
"""Data that a metric reads: the field of `MetricBatch` with that name."""
PROMPT_NEEDS = frozenset[MetricInput](("samples", "prompts", "references", "scenes"))
"""Needs whose examples are the prompts of an evaluation."""
CLIP_NEEDS = frozenset[MetricInput](("pairs", "baselines"))
"""Needs whose examples are the held-out clips."""


class ClipReconstruction(NamedTuple):
    """A held-out clip and its reconstruction by the autoencoder."""

    name: str
    original: Clip
    decoded: Clip
    baseline: Clip | None = None
    """Reconstruction by the best linear autoencoder with as many latent values, fitted on the training clips."""


@dataclass(frozen=True, kw_only=True)
class MetricBatch:
    """Some examples of an evaluation: prompts or held-out clips, of any sizes.

    A metric gets the fields that it needs; all others are empty, and so are the fields of the other kind of examples.
    """

    samples: Sequence[Clip] = ()
    """Sample of each prompt, read from its file."""
    prompts: Sequence[str] = ()
    """Prompt of each sample."""
    references: Sequence[Clip] = ()
    """Data clip for each prompt, in the sample's size: the clip that it is the caption of, or a rendering of it."""
    scenes: Sequence[Any] = ()
    """True content of each reference, if the data are rendered."""
    real_clips: Sequence[Clip] = ()
    """Data clips that the set of all samples is compared with, in batches of their own."""
    pairs: Sequence[ClipReconstruction] = ()
    """Held-out clips, each with its reconstruction."""
    baselines: Sequence[Clip] = ()
    """Reconstruction of each held-out clip by a linear autoencoder; empty if there is none to compare with."""
    pipeline: Pipeline | None = None
    """Pipeline that is evaluated, whose denoiser a loss or likelihood calls."""

    _features: dict[Any, list[np.ndarray]] = field(default_factory=dict, repr=False)
    _derived: dict[Any, tuple[Clip, Any]] = field(default_factory=dict, repr=False)

    def select(self, needs: Collection[MetricInput]) -> "MetricBatch":
        """Return the batch with only these fields; selected batches share what they compute from clips."""
        values = {need: getattr(self, need) for need in needs}
        return MetricBatch(**values, _features=self._features, _derived=self._derived)

    def extract(
        self, features: FeatureFunction, name: Literal["samples", "references", "real_clips"]
    ) -> list[Float32[np.ndarray, "_ d"]]:
        """Return the features of each clip in a field, which metrics with the same function share.

        Each clip has one row, or one row per frame.

        Raises:
          MissingError: If the weights do not exist.
          UserError: If they belong to another network, or the network does not read clips of this length.
        """
        key = (features, name)
        if key not in self._features:
            self._features[key] = features.open().extract_by_clip(getattr(self, name))
        return self._features[key]

    def derive(
        self,
        function: Callable[Concatenate[Clip, Arguments], Derived],
        clip: Clip,
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Derived:
        """Return `function(clip, *args, **kwargs)`, which is computed once for all metrics of the batch.

        Args:
          function: A pure function of a clip, such as one that tracks its objects; no metric changes its result.
          clip: A clip of the batch, or the reference of one of its scenes.
          *args: Further arguments of the function; like the keyword arguments, they are hashable.
          **kwargs: Its keyword arguments.
        """
        key = (function, id(clip), args, frozenset(kwargs.items()))
        if key not in self._derived:
            self._derived[key] = clip, function(clip, *args, **kwargs)  # the clip stays, and its id with it
        return self._derived[key][1]


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A value of a metric, with its uncertainty.

    Raises:
      UserError: If the value is not finite.
    """

    value: float | None
    """Value, or None if no example determines it."""
    interval: tuple[float, float] | None = None
    """Bounds of the 95 % interval; None if the metric has none."""
    count: int
    """Number of examples."""
    note: str = ""
    """Remark that reports print beside the value."""

    def __post_init__(self):
        if self.value is not None and not math.isfinite(self.value):
            raise UserError(f"value={self.value} is invalid: a metric is a finite number. Use None, or a bound.")


@dataclass(frozen=True, kw_only=True)
class MetricDescription:
    """Presentation of one value of a metric."""

    label: str
    """Name in reports."""
    explanation: str = ""
    """Meaning of the value: data, limits and thresholds, source."""
    unit: str = ""
    """Unit, such as dB; a value with the unit % is a share, written in percent."""
    decimals: int = 3
    """Number of decimal places."""
    is_higher_better: bool | None = None
    """True if higher is better, False if lower is better, None if neither is."""
    is_headline: bool = True
    """True for a value that is printed and shown at the top of reports; all values are in their table."""

    def format_value(self, value: float | int, *, is_precise: bool = False) -> str:
        """Return a value with its unit, with one more decimal place if it is precise and not a share."""
        if self.unit == "%":
            return f"{value:.{self.decimals}%}"
        return f"{value:.{self.decimals + is_precise}f} {self.unit}".rstrip()

    def format_interval(self, estimate: MetricValue, *, is_precise: bool = False) -> str:
        """Return the bounds of the 95 % interval as `low to high`; empty without one."""
        return " to ".join(self.format_value(bound, is_precise=is_precise) for bound in estimate.interval or ())

    def format_estimate(self, estimate: MetricValue) -> str:
        """Return a value with its interval, if it has one; `none` without a value."""
        if estimate.value is None:
            return "none"
        value, interval = self.format_value(estimate.value), self.format_interval(estimate)
        return f"{value} ({interval})" if interval else value


class Metric(abc.ABC, Generic[MetricState]):
    """A metric of an evaluation; subclasses are frozen dataclasses, and registered if they are of other packages."""

    needs: ClassVar[tuple[MetricInput, ...]]
    """Data that the metric reads."""

    @abc.abstractmethod
    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of all values by name, in their order; names are unique in an evaluation."""

    @abc.abstractmethod
    def init(self) -> MetricState:
        """Return the state before the first batch."""

    @abc.abstractmethod
    def update(self, state: MetricState, batch: MetricBatch) -> MetricState:
        """Return the state after a batch, which holds what the metric needs."""

    @abc.abstractmethod
    def merge(self, first: MetricState, second: MetricState) -> MetricState:
        """Return the combined state for the examples of both."""

    @abc.abstractmethod
    def compute(self, state: MetricState) -> Mapping[str, MetricValue]:
        """Return the values that `describe` names; without examples their value is None."""

    def open_weights(self) -> tuple[str, ...]:
        """Read the weights that the metric needs, if any, and return their identities, which its values depend on.

        By default these are the weights of the feature functions in its fields.

        Raises:
          MissingError: If a weight file does not exist.
          UserError: If the file holds another network.
        """
        functions = [value for value in vars(self).values() if isinstance(value, FeatureFunction)]
        return tuple(each.open().identity for each in functions)

    def list_examples(self, state: MetricState) -> Sequence[Mapping[str, float | bool]]:
        """Return values of every example by the names of `describe`, shown beside its picture; none by default."""
        return ()

    def list_nearest(self, state: MetricState) -> Sequence[int]:
        """Return the number of the data clip that a page shows next to each sample; none by default."""
        return ()


class ExampleMetric(Metric[tuple[Example, ...]], Generic[Example]):
    """A metric whose state holds one measurement per example, in the order of the examples."""

    @abc.abstractmethod
    def measure(self, batch: MetricBatch) -> Sequence[Example]:
        """Return the measurement of every example."""

    def init(self) -> tuple[Example, ...]:
        """Return the state before the first batch."""
        return ()

    def update(self, state: tuple[Example, ...], batch: MetricBatch) -> tuple[Example, ...]:
        """Return the state with the measurements of a batch."""
        return (*state, *self.measure(batch))

    def merge(self, first: tuple[Example, ...], second: tuple[Example, ...]) -> tuple[Example, ...]:
        """Return the measurements of both states."""
        return (*first, *second)


class SingleValueMetric(ExampleMetric[Example | None], Generic[Example]):
    """A metric with one value, computed from one measurement per example: None for an example that does not count."""

    name: ClassVar[str]
    """Name of the value."""
    description: ClassVar[MetricDescription]
    """Description of the value."""

    @abc.abstractmethod
    def estimate(self, measurements: Sequence[Example]) -> MetricValue:
        """Return the value of the examples that count."""

    def make_note(self, state: tuple[Example | None, ...]) -> str:
        """Return a remark on the examples, shown beside the value; none by default."""
        return ""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the value."""
        return {self.name: self.description}

    def compute(self, state: tuple[Example | None, ...]) -> Mapping[str, MetricValue]:
        """Return the value, with the number of the examples that count."""
        value = self.estimate([each for each in state if each is not None])
        return {self.name: replace(value, note=self.make_note(state))}

    def list_examples(self, state: tuple[Example | None, ...]) -> Sequence[Mapping[str, Any]]:
        """Return the measurement of every example, and nothing for one that does not count."""
        return [{} if each is None else {self.name: each} for each in state]


class MeanMetric(SingleValueMetric[float]):
    """A metric with one number per example: their mean, with Student's 95 % interval (see `compute_mean_interval`)."""

    def estimate(self, measurements: Sequence[float]) -> MetricValue:
        """Return the mean."""
        return estimate_mean(measurements)

    def list_examples(self, state: tuple[float | None, ...]) -> Sequence[Mapping[str, float]]:
        """Return the number of every example, and nothing for one that does not count."""
        return [{} if number is None else {self.name: float(number)} for number in state]


class ShareMetric(SingleValueMetric[bool]):
    """A metric with one answer per example: the share of true ones, with Wilson's 95 % interval."""

    def estimate(self, measurements: Sequence[bool]) -> MetricValue:
        """Return the share."""
        return estimate_share(measurements)


def estimate_mean(numbers: Sequence[float], *, note: str = "") -> MetricValue:
    """Return the mean of numbers, None without any, with Student's 95 % interval."""
    mean = float(np.mean(numbers)) if numbers else None
    return MetricValue(value=mean, interval=compute_mean_interval(numbers), count=len(numbers), note=note)


def estimate_share(answers: Sequence[bool], *, note: str = "") -> MetricValue:
    """Return the share of true answers, None without any, with Wilson's 95 % interval."""
    right, count = int(sum(answers)), len(answers)
    share, interval = right / count if count else None, compute_wilson_interval(right, count)
    return MetricValue(value=share, interval=interval, count=count, note=note)
