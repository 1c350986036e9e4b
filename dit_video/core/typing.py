"""Type aliases for arrays.

Axes are named by one letter each in annotations and einsum strings: clips `T H W C`, latents `t h w c`, tokens `B N D`,
context `B S E`, heads `K` of width `d`, segments `G`, layers `L`.
"""

from typing import TypeVar

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""NumPy on the host, JAX on the device: code that serves both takes this."""
SameArray = TypeVar("SameArray", jax.Array, np.ndarray)
"""Either of them, the same one wherever it stands in a signature: NumPy gives NumPy, JAX gives JAX."""
