"""Count of the query-key pairs that a pattern allows, which is the cost of its attention."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from dit_video.nn.attention.masks import Pattern


@functools.lru_cache(maxsize=65_536)
def count_pairs(pattern: Pattern, grid: tuple[int, int, int]) -> int:
    """Count the visible (query, key) pairs in a clip of (t, h, w) tokens, which are the ones of its dense mask.

    Keys are counted by their values along the pattern's A axes, and the counts accumulated along each axis; the number
    of keys in a query's box is then a signed sum of 2^A entries. Time and memory are linear in the tokens.
    """
    indices = jnp.asarray(np.indices(grid, np.int32).reshape(3, 1, -1).transpose(1, 2, 0))
    axes = pattern.compute_axes(indices)
    if not axes:
        return int(np.prod(grid, dtype=np.int64)) ** 2
    values = jnp.stack(axes, axis=-1)
    keys = np.asarray(values, np.int64)[0]
    first, size = keys.min(axis=0), np.ptp(keys, axis=0) + 1
    counts = np.zeros(size + 1, np.int64)  # keys whose values are smaller along every axis, after the loop
    np.add.at(counts, tuple((keys - first + 1).T), 1)
    for axis in range(counts.ndim):
        counts = counts.cumsum(axis=axis)
    total = 0
    for low, high in pattern.compute_boxes(values):
        begin = np.clip(np.asarray(low, np.int64)[0] - first, 0, size)
        end = np.maximum(np.clip(np.asarray(high, np.int64)[0] - first + 1, 0, size), begin)
        # Inclusion-exclusion over the corners of every query's box.
        for corner in itertools.product((False, True), repeat=counts.ndim):
            indices_of_corner = np.where(corner, end, begin)
            total += (-1) ** (counts.ndim - sum(corner)) * int(counts[tuple(indices_of_corner.T)].sum())
    return total
