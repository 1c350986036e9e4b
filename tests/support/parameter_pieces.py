"""An array, and parameters that give it in pieces."""

import numpy as np

from dit_video.weights.parameter import Parameter

WHOLE = np.random.default_rng(0).normal(size=(5, 8, 16)).astype(np.float32)


def split_parameter(array: np.ndarray, *sizes: int) -> Parameter:
    """Return a parameter that is read in pieces of these numbers of rows, and the rest."""
    return Parameter(array.shape, array.dtype, lambda: iter(np.split(array, np.cumsum(sizes))))
