"""Statistics of sets of features that need all of them: kernel distance, precision and recall, inception score."""

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
) -> KernelDistance:
    """Return the kernel inception distance, the unbiased squared MMD with a cubic kernel (arXiv 1801.01401, section 4).

    The kernel is `(x y / d + 1)³`.

    Args:
      first: features of one set.
      second: features of the other.
      subsets: number of random subsets of both sets.
      subset_size: examples of each; at most all of the smaller set.
      seed: seed of the subsets.

    Raises:
      UserError: fewer than two examples in a set, or other numbers of features.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise UserError(f"a kernel distance of {size} examples is invalid: it needs at least two. Use more clips")
    check_channels(first.shape[1], second.shape[1])
    generator = make_generator(seed, "subsets of features")
    values = []
    for _ in range(subsets):
        x, y = (each[generator.choice(len(each), size, replace=False)].astype(np.float64) for each in (first, second))
        within = sum(_sum_off_diagonal(_apply_kernel(each, each)) for each in (x, y)) / (size * (size - 1))
        values.append(within - 2 * _apply_kernel(x, y).mean(axis=(0, 1)))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def compute_overlap(
    real: Float[np.ndarray, "n d"], generated: Float[np.ndarray, "m _"], *, neighbours: int = 3
) -> Overlap:
    """Return precision and recall.

    The manifold of a set is the union of balls around its examples, which reach to their `neighbours`-th nearest one.

    Raises:
      UserError: no more examples than neighbours, or other numbers of features.
    """
    count = min(len(real), len(generated))
    if count <= neighbours:
        raise UserError(f"neighbours={neighbours} is invalid for {count} examples: use fewer, or more clips")
    check_channels(real.shape[1], generated.shape[1])
    return Overlap(
        precision=float(_find_covered(real, generated, neighbours).mean(axis=0)),
        recall=float(_find_covered(generated, real, neighbours).mean(axis=0)),
    )


def find_nearest(
    points: Float[np.ndarray, "n d"], centres: Float[np.ndarray, "m _"] | None = None
) -> tuple[Float64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the distance from each point to the nearest centre, and its number; to the nearest other point by default.

    Raises:
      UserError: other numbers of features.
    """
    others = points if centres is None else centres
    check_channels(points.shape[1], others.shape[1])
    distances, numbers = [], []
    for start, block in zip(range(0, len(points), _BLOCK), _split(points), strict=True):
        squares = _square_distances(block, others)
        if centres is None:
            squares[np.arange(len(block)), start + np.arange(len(block))] = np.inf
        numbers.append(squares.argmin(axis=1))
        distances.append(np.sqrt(squares.min(axis=1)))
    return np.concatenate(distances), np.concatenate(numbers)


def compute_inception_score(logits: Float[np.ndarray, "n c"], *, splits: int = 10) -> tuple[float, float]:
    r"""Return the inception score and its standard deviation over splits (arXiv 1606.03498).

    It is $\exp E_x KL(p(y|x) \Vert p(y))$, with the mean over a split as $p(y)$.

    Raises:
      UserError: fewer examples than splits.
    """
    if len(logits) < splits:
        raise UserError(f"splits={splits} is invalid for {len(logits)} examples: use fewer, or more clips")
    log_probs = log_softmax(logits.astype(np.float64), axis=1)
    scores = []
    for part in np.array_split(log_probs, splits):
        log_mean = np.log(np.exp(part).mean(axis=0))
        scores.append(np.exp((np.exp(part) * (part - log_mean)).sum(axis=1).mean(axis=0)))
    return float(np.mean(scores)), float(np.std(scores))


def _apply_kernel(x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _sum_off_diagonal(matrix: Float64[np.ndarray, "n n"]) -> float:
    return float(matrix.sum(axis=(0, 1)) - np.trace(matrix))


def _find_covered(
    centres: Float[np.ndarray, "n d"], points: Float[np.ndarray, "m d"], neighbours: int
) -> Bool[np.ndarray, " m"]:
    """Return True for the points in a ball of a centre."""
    radii = np.concatenate(
        [
            np.partition(_square_distances(block, centres), neighbours, axis=1)[:, neighbours]
            for block in _split(centres)
        ]
    )
    return np.concatenate([(_square_distances(block, centres) <= radii).any(axis=1) for block in _split(points)])


def _split(features: Float[np.ndarray, "n d"]) -> list[Float[np.ndarray, "_ d"]]:
    return [features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK)]


def _square_distances(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float64[np.ndarray, "n m"]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    return np.maximum(squares, 0)
