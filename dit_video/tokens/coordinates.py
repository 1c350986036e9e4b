"""Where a token lies: real-valued (t, h, w)."""

import numpy as np
from jaxtyping import Float32

from dit_video.tokens.patchify import Grid


def coordinates(grid: Grid, *, step: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Float32[np.ndarray, "n 3"]:
    """Where every token of a grid lies, in the order of `patchify`, from 0.

    Args:
      grid: patches along each axis.
      step: the distance of two neighbours: 1 counts patches; `(frames of a patch / fps, 1, 1)` gives time in seconds,
        by which clips of several frame rates can be told apart (see `Rotary3d.scale`).
    """
    axes = np.meshgrid(*(np.arange(count, dtype=np.float32) for count in grid), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes], axis=-1) * np.asarray(step, np.float32)
