"""Means and covariances of features, and the Fréchet distance of two of them (arXiv 1706.08500, eq. 6)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator

_MAX_GROUPS, _MIN_GROUPS = 32, 8
_GROUP_VALUES = 2**24
"""Products of features that all groups have together, at most, before there are fewer groups: 128 MiB."""
_RESAMPLINGS = 40
"""Number of resamplings of groups, whose standard deviation is then known within a tenth."""


class FeatureMoments(NamedTuple):
    """Sums of features and of their products in float64, which examples of any number are added to.

    Examples are in groups by the running number of their clip, so that a distance has an interval without keeping all
    features. All frames of a clip are in one group: they are alike, so that groups that share clips differ too little.
    """

    clips: Int[np.ndarray, " g"]
    """Number of clips of each group."""
    counts: Int[np.ndarray, " g"]
    """Number of examples of each group."""
    total: Float64[np.ndarray, "g d"]
    """Sum of each feature."""
    products: Float64[np.ndarray, "g d d"]
    """Sum of the products of each pair of features."""

    @classmethod
    def zeros(cls, channels: int) -> "FeatureMoments":
        """Return the moments of no examples, of 8 to 32 groups."""
        groups = int(np.clip(_GROUP_VALUES // channels**2, _MIN_GROUPS, _MAX_GROUPS))
        shape = (groups, channels)
        empty = np.zeros(groups, np.int64)
        return cls(empty, empty, np.zeros(shape), np.zeros((*shape, channels)))

    def add(
        self, features: Float[np.ndarray, "n d"], lengths: Sequence[int] | Int[np.ndarray, " c"] | None = None
    ) -> "FeatureMoments":
        """Return the moments with further examples.

        Args:
          features: the examples, clip after clip.
          lengths: number of examples of each clip; one by default.

        Raises:
          UserError: features that are not finite.
        """
        check_finite(features)
        values = features.astype(np.float64)
        clips, counts, total, products = (each.copy() for each in self)
        clip_groups = (self.clip_count + np.arange(len(values) if lengths is None else len(lengths))) % len(counts)
        np.add.at(clips, clip_groups, 1)
        groups = clip_groups if lengths is None else np.repeat(clip_groups, lengths)
        for group in np.unique(groups):
            part = values[groups == group]
            counts[group] += len(part)
            total[group] += part.sum(axis=0)
            products[group] += part.T @ part
        return FeatureMoments(clips, counts, total, products)

    def merge(self, other: "FeatureMoments") -> "FeatureMoments":
        """Return the moments of the examples of both."""
        return FeatureMoments(*(first + second for first, second in zip(self, other, strict=True)))

    def select(self, groups: Int[np.ndarray, " n"]) -> "FeatureMoments":
        """Return the moments of some groups, perhaps repeated."""
        return FeatureMoments(*(each[groups] for each in self))

    @property
    def clip_count(self) -> int:
        """Return the number of clips."""
        return int(self.clips.sum(axis=0))

    @property
    def size(self) -> int:
        """Return the number of examples."""
        return int(self.counts.sum(axis=0))

    @property
    def channels(self) -> int:
        """Return the number of features."""
        return self.total.shape[1]

    def compute(self) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, "d d"]]:
        """Return the mean and the unbiased covariance.

        Raises:
          UserError: fewer than two examples.
        """
        size = self.size
        if size < 2:
            raise UserError(f"a covariance of {size} examples is invalid: it needs at least two. Use more clips")
        mean = self.total.sum(axis=0) / size
        covariance = (self.products.sum(axis=0) - size * np.outer(mean, mean)) / (size - 1)
        return mean, covariance


class FrechetDistance(NamedTuple):
    """A Fréchet distance, and what it depends on the number of examples."""

    value: float
    """Distance of all examples."""
    half: float
    """Mean distance of both halves of the examples, which is larger: the estimate falls with their number."""
    limit: float
    """Distance of infinitely many examples, extrapolated in the reciprocal of their number (arXiv 1911.07023)."""
    interval: tuple[float, float]
    """95 % interval of the value: normal, with the standard deviation of resampled groups (bootstrap)."""


def compute_frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    r"""Return $|\mu_1-\mu_2|^2 + \mathrm{tr}(\Sigma_1+\Sigma_2-2(\Sigma_1\Sigma_2)^{1/2})$.

    Raises:
      UserError: other numbers of features, or fewer than two examples.
    """
    check_channels(first.channels, second.channels)
    (mean, covariance), (other_mean, other_covariance) = first.compute(), second.compute()
    spread = np.trace(covariance) + np.trace(other_covariance)
    return float(
        np.square(mean - other_mean).sum(axis=0) + spread - 2 * compute_root_trace(covariance, other_covariance)
    )


def check_channels(first: int, second: int) -> None:
    """Check that two sets have features of the same number.

    Raises:
      UserError: they have not.
    """
    if first != second:
        rule = f"one set has {first} features, the other {second}"
        raise UserError(f"a comparison is invalid: {rule}. Use features of the same network")


def check_finite(clips: Sequence[Float[np.ndarray, "*rows d"]] | Float[np.ndarray, "n d"]) -> None:
    """Check that all features of each clip are finite.

    Raises:
      UserError: they are not.
    """
    if bad := sum(not np.isfinite(features).all() for features in clips):
        raise UserError(f"features of {bad} of {len(clips)} clips are not finite. Look at these clips first")


def measure_frechet_distance(first: FeatureMoments, second: FeatureMoments, *, seed: int = 0) -> FrechetDistance:
    """Return the Fréchet distance of two sets with its interval, that of halves of the sets, and its limit.

    Args:
      first: moments of one set.
      second: moments of the other.
      seed: seed of the resampling.

    Raises:
      UserError: as `compute_frechet_distance`, also for halves of the sets.
    """
    value = compute_frechet_distance(first, second)
    groups = np.arange(len(first.counts))
    halves = [compute_frechet_distance(first.select(part), second.select(part)) for part in (groups[::2], groups[1::2])]
    half = float(np.mean(halves))
    generator = make_generator(seed, "groups of features")
    distances = [
        compute_frechet_distance(*(each.select(generator.choice(groups, len(groups))) for each in (first, second)))
        for _ in range(_RESAMPLINGS)
    ]
    reach = 1.96 * float(np.std(distances, ddof=1))
    return FrechetDistance(value, half, 2 * value - half, (value - reach, value + reach))


def compute_root_trace(first: Float64[np.ndarray, "d d"], second: Float64[np.ndarray, "d d"]) -> float:
    r"""Return $\mathrm{tr}((AB)^{1/2})$ of two covariances.

    $AB$ has the eigenvalues of the symmetric $A^{1/2} B A^{1/2}$, whose decomposition stays accurate where that of $AB$
    does not: for covariances of fewer examples than features.
    """
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ second @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    return float(np.sqrt(np.maximum(eigenvalues, 0)).sum(axis=0))
