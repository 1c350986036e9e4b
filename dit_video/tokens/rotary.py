"""Rotary positions from real-valued coordinates (arXiv 2104.09864, extended to three axes)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rotary3d:
    """How a head's width is divided among (t, h, w), and how fast its pairs of channels turn.

    Pair `j` of an axis that has `d_a` of the width turns by `scale_a * coordinate * theta_a^(-2j / d_a)`; so a product
    of a query and a key depends on the difference of their coordinates only.

    Clips longer or larger than those of the training: `scale` below 1 interpolates between the positions that were
    seen (arXiv 2306.15595), `stretch` above 1 slows the slow pairs and leaves the fast ones, which tell neighbours
    apart (NTK-aware, arXiv 2309.00071, section 3.1).

    Raises:
      UserError: a scale or stretch that isn't positive.
    """

    split: tuple[int, int, int]
    theta: float = 10_000.0
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """what coordinates are multiplied by: trained extent / new extent; where time counts in seconds, also how many
    steps a second is to be worth"""
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """new extent / trained extent: `theta_a = theta * stretch_a^(d_a / (d_a - 2))`, so that the slowest pair turns by
    as much over the new extent as over the old"""

    def __post_init__(self):
        if min(*self.scale, *self.stretch) <= 0:
            raise UserError(f"rotary scale {self.scale} and stretch {self.stretch} must be positive; 1 changes nothing")

    def check(self, head_width: int) -> None:
        """Raises UserError where the split does not divide this head width into even parts."""
        if sum(self.split) != head_width or any(part % 2 or part < 0 for part in self.split):
            raise UserError(
                f"rotary split {self.split} must be three even numbers that add up to the head width {head_width}"
            )

    @staticmethod
    def even(head_width: int, *, theta: float = 10_000.0) -> "Rotary3d":
        """Equal parts for h and w; t gets the rest, as in Wan (44, 42, 42 of 128)."""
        return Rotary3d(split=even_split(head_width), theta=theta)


def even_split(width: int) -> tuple[int, int, int]:
    """A width divided among (t, h, w): equal even parts for h and w; t gets the rest."""
    space = width // 6 * 2
    return width - 2 * space, space, space


def rotary_angles(coordinates: Float[Array, "*batch N 3"], rotary: Rotary3d) -> Float[Array, "*batch N half"]:
    """The angle of every pair of a head's channels, float32."""
    parts = []
    for axis, width in enumerate(rotary.split):
        theta = rotary.theta
        if width > 2:  # the only pair of an axis of two channels turns once per step, whatever theta is
            theta *= rotary.stretch[axis] ** (width / (width - 2))
        frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        at = coordinates[..., axis, None].astype(jnp.float32) * rotary.scale[axis]
        parts.append(at * frequencies)
    return jnp.concatenate(parts, axis=-1)


def rotate(x: Float[Array, "*batch N K d"], angles: Float[Array, "*batch N half"]) -> Float[Array, "*batch N K d"]:
    """Turn the pairs (j, j + d/2) of each head by their angles, in float32.

    Halves instead of neighbouring pairs: the same after a fixed permutation of channels, without strided access.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
