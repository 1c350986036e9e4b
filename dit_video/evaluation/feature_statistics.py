"""Statistics of features: the Fréchet distance, kernel distance, precision and recall, and inception score.

The Fréchet distance (arXiv 1706.08500, eq. 6) needs only the features' moments, the others need all features. If a clip
has several examples, such as its frames, `clips` holds the number of each example's clip in rising order. Examples of a
clip are alike, so they are drawn together, and are not compared with each other.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.special import log_softmax

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator

_MAX_GROUPS, _MIN_GROUPS = 32, 8
_GROUP_VALUES = 2**24
"""Largest number of feature products over all groups (128 MiB); beyond it there are fewer groups."""
_RESAMPLINGS = 40
"""Number of resamplings of groups; it determines the standard deviation within a tenth."""
_BLOCK = 1024
"""Number of examples whose distances to all others are computed at once."""


class FeatureMoments(NamedTuple):
    """Sums of features and of their products in float64, to which any number of examples can be added.

    Examples are in groups by the running number of their clip, so that a distance has an interval without keeping all
    features. All frames of a clip are in one group: they are alike, so groups that shared clips would differ too
    little.
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
        """Return the moments of no examples, in 8 to 32 groups."""
        groups = int(np.clip(_GROUP_VALUES // channels**2, _MIN_GROUPS, _MAX_GROUPS))
        shape = (groups, channels)
        empty = np.zeros(groups, np.int64)
        return cls(empty, empty, np.zeros(shape), np.zeros((*shape, channels)))

    def add(
        self, features: Float[np.ndarray, "n d"], lengths: Sequence[int] | Int[np.ndarray, " c"] | None = None
    ) -> "FeatureMoments":
        """Return the moments with further examples.

        Args:
          features: The examples, clip after clip.
          lengths: Number of examples of each clip; one by default.

        Raises:
          UserError: If the features are not finite.
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
        """Return the moments of both sets of examples."""
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
          UserError: If there are fewer than two examples.
        """
        size = self.size
        if size < 2:
            raise UserError(f"a covariance of {size} examples is invalid: it needs at least two. Use more clips")
        mean = self.total.sum(axis=0) / size
        covariance = (self.products.sum(axis=0) - size * np.outer(mean, mean)) / (size - 1)
        return mean, covariance


class FrechetDistance(NamedTuple):
    """A Fréchet distance, and how it depends on the number of examples."""

    value: float
    """Distance of all examples."""
    half: float
    """Mean distance of the two halves of the examples, which is larger: the estimate falls with their number."""
    limit: float
    """Distance of infinitely many examples, extrapolated in the reciprocal of their number (arXiv 1911.07023)."""
    interval: tuple[float, float]
    """95 % interval of the value: normal, with the standard deviation of resampled groups (bootstrap)."""


class KernelDistance(NamedTuple):
    """A kernel distance, the mean over random subsets, with its standard deviation."""

    value: float
    std: float


class Overlap(NamedTuple):
    """Precision and recall of generated features (arXiv 1904.06991, eq. 1 and 2)."""

    precision: float
    """Share of generated examples that lie within the manifold of real ones."""
    recall: float
    """Share of real examples that lie within the manifold of generated ones."""


def measure_frechet_distance(first: FeatureMoments, second: FeatureMoments, *, seed: int = 0) -> FrechetDistance:
    """Return the Fréchet distance between two sets with its interval, the distance of their halves, and its limit.

    Args:
      first: Moments of one set.
      second: Moments of the other.
      seed: Seed of the resampling.

    Raises:
      UserError: If `compute_frechet_distance` raises it, also for halves of the sets.
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


def compute_frechet_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    r"""Return $|\mu_1-\mu_2|^2 + \mathrm{tr}(\Sigma_1+\Sigma_2-2(\Sigma_1\Sigma_2)^{1/2})$.

    Raises:
      UserError: If the numbers of features differ, or there are fewer than two examples.
    """
    check_channels(first.channels, second.channels)
    (mean, covariance), (other_mean, other_covariance) = first.compute(), second.compute()
    spread = np.trace(covariance) + np.trace(other_covariance)
    return float(
        np.square(mean - other_mean).sum(axis=0) + spread - 2 * compute_root_trace(covariance, other_covariance)
    )


def compute_kernel_distance(
    first: Float[np.ndarray, "n d"],
    second: Float[np.ndarray, "m _"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    clips: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]] | None = None,
) -> KernelDistance:
    """Return the kernel inception distance, the unbiased squared MMD with a cubic kernel (arXiv 1801.01401, section 4).

    The kernel is `(x y / d + 1)³`.

    Args:
      first: Features of one set.
      second: Features of the other.
      subsets: Number of random subsets of both sets.
      subset_size: Clips in each subset; at most all clips of the smaller set.
      seed: Seed of the subsets.
      clips: Number of each example's clip in both sets; each example is a clip by default.

    Raises:
      UserError: If a set has fewer than two clips, or the numbers of features differ.
    """
    sets = [(each, _number_clips(each, clips and clips[index])) for index, each in enumerate((first, second))]
    counts = [_count_clips(numbers) for _, numbers in sets]
    size = min(subset_size, *counts)
    if size < 2:
        raise UserError(f"a kernel distance of {size} clips is invalid: it needs at least two. Use more clips")
    check_channels(first.shape[1], second.shape[1])
    generator = make_generator(seed, "subsets of features")
    values = []
    for _ in range(subsets):
        drawn = []
        for (features, numbers), count in zip(sets, counts, strict=True):
            indices = np.flatnonzero(np.isin(numbers, generator.choice(count, size, replace=False)))
            drawn.append((features[indices].astype(np.float64), numbers[indices]))
        within = sum(_apply_kernel(each, each).mean(axis=(0, 1), where=_are_apart(own, own)) for each, own in drawn)
        values.append(within - 2 * _apply_kernel(drawn[0][0], drawn[1][0]).mean(axis=(0, 1)))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def compute_overlap(
    real: Float[np.ndarray, "n d"],
    generated: Float[np.ndarray, "m _"],
    *,
    neighbours: int = 3,
    clips: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]] | None = None,
) -> Overlap:
    """Return precision and recall.

    A set's manifold is the union of balls around its examples; each ball reaches to the `neighbours`-th nearest other
    clip.

    Args:
      real: Features of data clips.
      generated: Features of samples.
      neighbours: Number of neighbours.
      clips: Number of each example's clip in both sets; each example is a clip by default.

    Raises:
      UserError: If there are no more clips than neighbours, or the numbers of features differ.
    """
    numbers = [_number_clips(each, clips and clips[index]) for index, each in enumerate((real, generated))]
    count = min(map(_count_clips, numbers))
    if count <= neighbours:
        raise UserError(f"neighbours={neighbours} is invalid for {count} clips: use fewer, or more clips")
    check_channels(real.shape[1], generated.shape[1])
    return Overlap(
        precision=float(_find_covered(real, generated, neighbours, numbers[0]).mean(axis=0)),
        recall=float(_find_covered(generated, real, neighbours, numbers[1]).mean(axis=0)),
    )


def compute_inception_score(
    logits: Float[np.ndarray, "n c"], *, splits: int = 10, clips: Int[np.ndarray, " n"] | None = None
) -> tuple[float, float]:
    r"""Return the inception score and its standard deviation over splits (arXiv 1606.03498).

    It is $\exp E_x KL(p(y|x) \Vert p(y))$, with the mean over a split as $p(y)$.

    Args:
      logits: Logits of each example.
      splits: Number of parts, each made of whole clips.
      clips: Number of each example's clip; each example is a clip by default.

    Raises:
      UserError: If there are fewer clips than splits.
    """
    numbers = _number_clips(logits, clips)
    count = _count_clips(numbers)
    if count < splits:
        raise UserError(f"splits={splits} is invalid for {count} clips: use fewer, or more clips")
    log_probs = log_softmax(logits.astype(np.float64), axis=1)
    scores = []
    for chosen in np.array_split(np.arange(count), splits):
        part = log_probs[np.isin(numbers, chosen)]
        log_mean = np.log(np.exp(part).mean(axis=0))
        scores.append(np.exp((np.exp(part) * (part - log_mean)).sum(axis=1).mean(axis=0)))
    return float(np.mean(scores)), float(np.std(scores))


def check_channels(first: int, second: int) -> None:
    """Check that two sets have the same number of features.

    Raises:
      UserError: If the numbers differ.
    """
    if first != second:
        rule = f"one set has {first} features, the other {second}"
        raise UserError(f"a comparison is invalid: {rule}. Use features of the same network")


def check_finite(clips: Sequence[Float[np.ndarray, "*rows d"]] | Float[np.ndarray, "n d"]) -> None:
    """Check that all features of each clip are finite.

    Raises:
      UserError: If a feature is not finite.
    """
    if bad := sum(not np.isfinite(features).all() for features in clips):
        raise UserError(f"features of {bad} of {len(clips)} clips are not finite. Look at these clips first")


def compute_root_trace(first: Float64[np.ndarray, "d d"], second: Float64[np.ndarray, "d d"]) -> float:
    r"""Return $\mathrm{tr}((AB)^{1/2})$ of two covariances.

    $AB$ has the eigenvalues of the symmetric $A^{1/2} B A^{1/2}$. Its decomposition stays accurate when covariances
    come from fewer examples than features, while the decomposition of $AB$ does not.
    """
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ second @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    return float(np.sqrt(np.maximum(eigenvalues, 0)).sum(axis=0))


def find_nearest(
    points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m _"]
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the distance from each point to the nearest centre, and the centre's number.

    Raises:
      UserError: If the numbers of features differ.
    """
    check_channels(points.shape[1], centres.shape[1])
    return _find_smallest(_square_distances(block, centres) for block in _split(points))


def find_nearest_other(
    points: Float[np.ndarray, "n d"], clips: Int[np.ndarray, " n"] | None = None
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the distance from each point to the nearest one of another clip (infinite without any), and its number.

    Args:
      points: The points.
      clips: Number of each point's clip; each point is a clip by default.
    """
    return _find_smallest(_square_other_distances(points, _number_clips(points, clips)))


def _apply_kernel(x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _number_clips(features: Float[np.ndarray, "n d"], clips: Int[np.ndarray, " n"] | None) -> Int[np.ndarray, " n"]:
    return np.arange(len(features)) if clips is None else clips


def _count_clips(clips: Int[np.ndarray, " n"]) -> int:
    return int(clips.max(axis=0, initial=-1)) + 1


def _are_apart(first: Int[np.ndarray, " n"], second: Int[np.ndarray, " m"]) -> Bool[np.ndarray, "n m"]:
    """Return True for pairs of different clips."""
    return first[:, None] != second


def _find_covered(
    centres: Float[np.ndarray, "n d"],
    points: Float[np.ndarray, "m d"],
    neighbours: int,
    clips: Int[np.ndarray, " n"],
) -> Bool[np.ndarray, " m"]:
    """Return True for the points in a centre's ball; `clips` are the clips of the centres."""
    starts = np.unique(clips, return_index=True)[1]
    blocks = (np.minimum.reduceat(block, starts, axis=1) for block in _square_other_distances(centres, clips))
    radii = np.concatenate([np.partition(block, neighbours - 1, axis=1)[:, neighbours - 1] for block in blocks])
    return np.concatenate([(_square_distances(block, centres) <= radii).any(axis=1) for block in _split(points)])


def _find_smallest(
    blocks: Iterator[Float64[np.ndarray, "_ m"]],
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the root of each row's smallest value, and its column; the rows come in blocks."""
    numbers, squares = zip(*((block.argmin(axis=1), block.min(axis=1)) for block in blocks), strict=True)
    return np.sqrt(np.concatenate(squares)), np.concatenate(numbers)


def _square_other_distances(
    points: Float[np.ndarray, "n d"], clips: Int[np.ndarray, " n"]
) -> Iterator[Float64[np.ndarray, "_ n"]]:
    """Yield, block by block, squared distances from points to all points; distances within a clip are infinite."""
    for start, block in zip(range(0, len(points), _BLOCK), _split(points), strict=True):
        apart = _are_apart(clips[start : start + len(block)], clips)
        yield np.where(apart, _square_distances(block, points), np.inf)


def _split(features: Float[np.ndarray, "n d"]) -> list[Float[np.ndarray, "_ d"]]:
    return [features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK)]


def _square_distances(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.maximum(squares, 0)
