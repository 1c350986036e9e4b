"""Statistics of sets of features that need all of them: kernel distance, precision and recall, inception score.

Where a clip has several examples, such as its frames, `clips` holds the number of each example's clip in rising order.
Examples of a clip are alike, so that they are drawn together, and are not compared with each other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.special import log_softmax

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.evaluation.feature_moments import check_channels

_BLOCK = 1024
"""Number of examples whose distances to all others are computed at once."""


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
      first: features of one set.
      second: features of the other.
      subsets: number of random subsets of both sets.
      subset_size: clips of each; at most all of the smaller set.
      seed: seed of the subsets.
      clips: number of each example's clip in both sets; each example is a clip by default.

    Raises:
      UserError: fewer than two clips in a set, or other numbers of features.
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

    The manifold of a set is the union of balls around its examples, which reach to their `neighbours`-th nearest other
    clip.

    Args:
      real: features of clips of the data.
      generated: features of samples.
      neighbours: number of neighbours.
      clips: number of each example's clip in both sets; each example is a clip by default.

    Raises:
      UserError: no more clips than neighbours, or other numbers of features.
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


def find_nearest(
    points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m _"]
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the distance from each point to the nearest centre, and its number.

    Raises:
      UserError: other numbers of features.
    """
    check_channels(points.shape[1], centres.shape[1])
    return _find_smallest(_square_distances(block, centres) for block in _split(points))


def find_nearest_other(
    points: Float[np.ndarray, "n d"], clips: Int[np.ndarray, " n"] | None = None
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the distance from each point to the nearest one of another clip, infinite without any, and its number.

    Args:
      points: the points.
      clips: number of each point's clip; each point is a clip by default.
    """
    return _find_smallest(_square_other_distances(points, _number_clips(points, clips)))


def compute_inception_score(
    logits: Float[np.ndarray, "n c"], *, splits: int = 10, clips: Int[np.ndarray, " n"] | None = None
) -> tuple[float, float]:
    r"""Return the inception score and its standard deviation over splits (arXiv 1606.03498).

    It is $\exp E_x KL(p(y|x) \Vert p(y))$, with the mean over a split as $p(y)$.

    Args:
      logits: logits of each example.
      splits: number of parts, each of whole clips.
      clips: number of each example's clip; each example is a clip by default.

    Raises:
      UserError: fewer clips than splits.
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
    """Return True for the points in a ball of a centre; `clips` are those of the centres."""
    starts = np.unique(clips, return_index=True)[1]
    blocks = (np.minimum.reduceat(block, starts, axis=1) for block in _square_other_distances(centres, clips))
    radii = np.concatenate([np.partition(block, neighbours - 1, axis=1)[:, neighbours - 1] for block in blocks])
    return np.concatenate([(_square_distances(block, centres) <= radii).any(axis=1) for block in _split(points)])


def _find_smallest(
    blocks: Iterator[Float64[np.ndarray, "_ m"]],
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the root of the smallest value of each row of blocks of rows, and its column."""
    numbers, squares = zip(*((block.argmin(axis=1), block.min(axis=1)) for block in blocks), strict=True)
    return np.sqrt(np.concatenate(squares)), np.concatenate(numbers)


def _square_other_distances(
    points: Float[np.ndarray, "n d"], clips: Int[np.ndarray, " n"]
) -> Iterator[Float64[np.ndarray, "_ n"]]:
    """Yield squared distances of blocks of points from all points, which are infinite within a clip."""
    for start, block in zip(range(0, len(points), _BLOCK), _split(points), strict=True):
        apart = _are_apart(clips[start : start + len(block)], clips)
        yield np.where(apart, _square_distances(block, points), np.inf)


def _split(features: Float[np.ndarray, "n d"]) -> list[Float[np.ndarray, "_ d"]]:
    return [features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK)]


def _square_distances(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.maximum(squares, 0)
