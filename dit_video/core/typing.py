"""Type aliases for arrays.

Axes are named by one letter each in annotations and einsum strings: clips `T H W C`, latents `t h w c`, tokens `B N D`,
context `B S E`, heads `K` of width `d`, segments `G`, layers `L`.
"""

from typing import TypeVar

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array of NumPy (host) or JAX (device), for code that serves both."""
SameArray = TypeVar("SameArray", jax.Array, np.ndarray)
"""A type variable over both: a function returns the same kind of array, NumPy or JAX, that it receives."""
