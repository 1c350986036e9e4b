"""Variety of samples of rendered shapes: the spread of the positions at which they start."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from dit_video.core import rng
from dit_video.evaluation.metrics.metric import MetricDescription, MetricValue
from dit_video.scenes.metrics.prompt_following import JudgedMetric, JudgedSample
from dit_video.scenes.shapes import DIRECTIONS, get_centroid_offset, sample_geometry

NAME = "start_spread"
_KEYS = tuple(f"{direction}_{axis}" for direction in (*DIRECTIONS, "image") for axis in ("vertical", "horizontal"))


@dataclass(frozen=True, kw_only=True)
class StartSpread(JudgedMetric):
    """Standard deviations of start positions relative to the data's, for each direction and axis, and the lowest.

    Images have the direction `image`. The data's is that of renderings of each sample's prompt at its size. Samples
    without a shape in their first frame are excluded from both; with fewer than two the value is None.
    """

    draws: int = 100
    """Number of renderings per sample."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of the lowest ratio and of all ratios."""
        lowest = MetricDescription(
            label="variety",
            unit="%",
            decimals=0,
            is_higher_better=True,
            explanation="spread of start positions relative to the data's: lowest of all directions and axes",
        )
        ratio = replace(lowest, explanation="spread of starts over the data's; bootstrap interval", is_headline=False)
        labels = {key: f"variety, {key.replace('_', ', ')}" for key in _KEYS}
        return {NAME: lowest} | {f"{NAME}_{key}": replace(ratio, label=label) for key, label in labels.items()}

    def compute(self, state: tuple[JudgedSample, ...]) -> Mapping[str, MetricValue]:
        """Return the ratios, each with the two deviations in fractions of the frame, and the lowest."""
        estimates: list[MetricValue] = []
        detected = [result for result in state if result.judgement.start is not None]
        for direction in (*DIRECTIONS, "image"):
            group = [result for result in detected if (result.description.direction or "image") == direction]
            starts = np.asarray([result.judgement.start for result in group]).reshape(-1, 2)
            drawn = [_draw_data_starts(result, index, self.draws) for index, result in enumerate(group)]
            estimates += map(_compare_deviations, starts.T, np.concatenate([np.zeros((0, 2)), *drawn]).T)
        lowest = min((each.value for each in estimates if each.value is not None), default=None)
        ratios = {f"{NAME}_{key}": estimate for key, estimate in zip(_KEYS, estimates, strict=True)}
        return {NAME: MetricValue(value=lowest, count=len(detected)), **ratios}


def _compare_deviations(starts: Float[np.ndarray, " n"], data: Float[np.ndarray, " m"]) -> MetricValue:
    """Return the ratio of standard deviations of samples and data."""
    if len(starts) < 2:
        return MetricValue(value=None, count=len(starts))
    deviation, expected = (float(values.std(ddof=1)) for values in (starts, data))
    indices = rng.make_generator(0, "bootstrap").integers(len(starts), size=(2000, len(starts)))  # Efron 1979
    low, high = np.quantile(starts[indices].std(axis=1, ddof=1) / expected, (0.025, 0.975), axis=0).tolist()
    note = f"samples {deviation:.3f}, data {expected:.3f} of the frame"
    return MetricValue(value=deviation / expected, interval=(low, high), count=len(starts), note=note)


def _draw_data_starts(result: JudgedSample, index: int, draws: int) -> Float[np.ndarray, "n 2"]:
    """Return first centroids, as fractions of the frame, of renderings of a sample's prompt at its size."""
    generator, size, starts = rng.make_generator(0, "start spread", index), result.size, []
    for _ in range(draws):
        geometry = sample_geometry(generator, result.description, height=size.h, width=size.w)
        below = get_centroid_offset(result.description.shape, geometry.radius)
        starts.append(((geometry.row + below) / size.h, geometry.column / size.w))
    return np.asarray(starts)
