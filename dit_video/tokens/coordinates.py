"""Where a token lies: real-valued (t, h, w)."""

import numpy as np
from jaxtyping import Float32

from dit_video.tokens.patchify import Grid


def coordinates(grid: Grid) -> Float32[np.ndarray, "n 3"]:
    """The (t, h, w) index of every token of a grid, in the order of `patchify`: patches along each axis from 0."""
    axes = np.meshgrid(*(np.arange(count, dtype=np.float32) for count in grid), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes], axis=-1)
