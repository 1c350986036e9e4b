"""Positions of tokens in space and time, and their rotary embedding."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid


def compute_positions(
    grid: Grid, *, step: tuple[float, float, float] = (1.0, 1.0, 1.0), lead: float = 0.0
) -> Float32[np.ndarray, "n 3"]:
    """Return the positions of all tokens of a grid, from 0, in the order of `patchify`.

    Args:
      grid: Number of patches along each axis.
      step: Spacing of neighbouring patches: 1 counts patches; `(frames per patch / fps, 1, 1)` gives time in seconds,
        which distinguishes clips of different frame rates (see `Rotary3d.scale`).
      lead: Fraction of a step in time by which all patches but the first begin earlier: if patches have n frames,
        except the first with one frame, (n - 1) / n gives the time of each patch's first frame.
    """
    axes = np.meshgrid(*(np.arange(count, dtype=np.float32) for count in grid), indexing="ij")
    positions = np.stack([axis.reshape(-1) for axis in axes], axis=-1)
    if lead:
        positions[:, 0] = np.maximum(positions[:, 0] - lead, 0)
    return positions * np.asarray(step, np.float32)


def infer_grid(positions: Float[np.ndarray, "n 3"]) -> Grid:
    """Return the token grid of a clip from its tokens' positions."""
    return Grid(*(len(np.unique(axis)) for axis in positions.T))


@dataclass(frozen=True, kw_only=True)
class Rotary3d:
    """Configuration of rotary embedding: the division of a head's width among (t, h, w), and the frequencies.

    Pair `j` of an axis with `d_a` channels is rotated by `scale_a * coordinate * theta_a^(-2j / d_a)`; so the product
    of a query and a key depends only on the difference between their positions.

    For clips longer or larger than those in training, `scale` below 1 interpolates between the trained positions
    (arXiv 2306.15595), and `stretch` above 1 slows the slow pairs but not the fast ones, which distinguish neighbours
    (NTK-aware, arXiv 2309.00071, section 3.1).

    Raises:
      UserError: If a scale or stretch is not positive.
    """

    split: tuple[int, int, int]
    """Channels of a head for each of (t, h, w)."""
    theta: float = 10_000.0
    """Base of the frequencies, which range from 1 down to about `1 / theta`."""
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Factor of the positions: trained extent / new extent; for time in seconds also the steps per second."""
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Ratio new extent / trained extent in `theta_a = theta * stretch_a^(d_a / (d_a - 2))`: the slowest pair then turns
    as far over the new extent as over the trained one."""

    def __post_init__(self):
        if min(*self.scale, *self.stretch) <= 0:
            raise UserError(f"rotary scale {self.scale} and stretch {self.stretch} must be positive; use 1 for none")

    def check(self, head_width: int) -> None:
        """Check that the split divides this head width.

        Raises:
          UserError: If the parts of the split are not even, or do not add up to the head width.
        """
        if sum(self.split) != head_width or any(part % 2 or part < 0 for part in self.split):
            raise UserError(f"rotary split {self.split} must be even and add up to the head width {head_width}")

    @staticmethod
    def even(head_width: int, *, theta: float = 10_000.0) -> "Rotary3d":
        """Return a config with equal parts for h and w, and the rest for t, as in Wan (44, 42, 42 of 128)."""
        return Rotary3d(split=split_evenly(head_width), theta=theta)


def split_evenly(width: int) -> tuple[int, int, int]:
    """Divide a width among (t, h, w): equal even parts for h and w, and the rest for t."""
    space = width // 6 * 2
    return width - 2 * space, space, space


def compute_rotary_angles(positions: Float[Array, "*batch N 3"], rotary: Rotary3d) -> Float[Array, "*batch N half"]:
    """Return the angle of every pair of a head's channels in float32."""
    parts = []
    for axis, width in enumerate(rotary.split):
        theta = rotary.theta
        if width > 2:  # the only pair of an axis with two channels has frequency 1, whatever theta is
            theta *= rotary.stretch[axis] ** (width / (width - 2))
        frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        scaled = positions[..., axis, None].astype(jnp.float32) * rotary.scale[axis]
        parts.append(scaled * frequencies)
    return jnp.concatenate(parts, axis=-1)


def rotate(x: Float[Array, "*batch N K d"], angles: Float[Array, "*batch N half"]) -> Float[Array, "*batch N K d"]:
    """Rotate the channel pairs (j, j + d/2) of each head by their angles, in float32.

    Pairing halves instead of neighbours is the same up to a fixed permutation of channels, and avoids strided access.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
