"""How much a pattern's attention costs: the pairs of tokens that it allows."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from dit_video.nn.attention.masks import Pattern


@functools.lru_cache(maxsize=65_536)
def pair_count(pattern: Pattern, grid: tuple[int, int, int]) -> int:
    """How many (query, key) pairs see each other in a clip of (t, h, w) tokens: the ones of its dense mask.

    Keys are counted by their values along the pattern's axes, and the counts summed up along each; a query's box then
    holds a sum of 2^A of these sums. So it takes time and memory linear in the tokens, not in their pairs.
    """
    indices = jnp.asarray(np.indices(grid, np.int32).reshape(3, 1, -1).transpose(1, 2, 0))
    axes = pattern.axes(indices)
    if not axes:
        return int(np.prod(grid, dtype=np.int64)) ** 2
    values = jnp.stack(axes, axis=-1)
    at = np.asarray(values, np.int64)[0]
    first, size = at.min(axis=0), np.ptp(at, axis=0) + 1
    counts = np.zeros(size + 1, np.int64)  # of values below, along each axis
    np.add.at(counts, tuple((at - first + 1).T), 1)
    for axis in range(counts.ndim):
        counts = counts.cumsum(axis=axis)
    total = 0
    for low, high in pattern.boxes(values):
        begin = np.clip(np.asarray(low, np.int64)[0] - first, 0, size)
        end = np.maximum(np.clip(np.asarray(high, np.int64)[0] - first + 1, 0, size), begin)
        for corner in itertools.product((False, True), repeat=counts.ndim):
            places = np.where(corner, end, begin)
            total += (-1) ** (counts.ndim - sum(corner)) * int(counts[tuple(places.T)].sum())
    return total
