"""Real-valued positions (t, h, w) of tokens."""

import numpy as np
from jaxtyping import Float, Float32

from dit_video.core.grid import Grid


def compute_positions(
    grid: Grid, *, step: tuple[float, float, float] = (1.0, 1.0, 1.0), lead: float = 0.0
) -> Float32[np.ndarray, "n 3"]:
    """Return the positions of all tokens of a grid, from 0, in the order of `patchify`.

    Args:
      grid: number of patches along each axis.
      step: spacing of neighbouring patches: 1 counts patches; `(frames per patch / fps, 1, 1)` gives time in seconds,
        which distinguishes clips of different frame rates (see `Rotary3d.scale`).
      lead: fraction of a step in time by which all patches but the first begin earlier: with patches of n frames of
        which the first has one frame, (n - 1) / n gives the time of each patch's first frame.
    """
    axes = np.meshgrid(*(np.arange(count, dtype=np.float32) for count in grid), indexing="ij")
    positions = np.stack([axis.reshape(-1) for axis in axes], axis=-1)
    if lead:
        positions[:, 0] = np.maximum(positions[:, 0] - lead, 0)
    return positions * np.asarray(step, np.float32)


def infer_grid(positions: Float[np.ndarray, "n 3"]) -> Grid:
    """Return the token grid of a clip from its tokens' positions."""
    return Grid(*(len(np.unique(axis)) for axis in positions.T))
