"""Rotary positions from real-valued coordinates (arXiv 2104.09864, extended to three axes)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Rotary3d:
    """How a head's width is divided among (t, h, w), and the base of the frequencies.

    Pair `j` of an axis that has `d_a` of the width turns by `coordinate * theta^(-2j / d_a)`; so a product of a query
    and a key depends on the difference of their coordinates only.
    """

    split: tuple[int, int, int]
    theta: float = 10_000.0

    def check(self, head_width: int) -> None:
        """Raises UserError where the split does not divide this head width into even parts."""
        if sum(self.split) != head_width or any(part % 2 or part < 0 for part in self.split):
            raise UserError(
                f"rotary split {self.split} must be three even numbers that add up to the head width {head_width}"
            )

    @staticmethod
    def even(head_width: int, *, theta: float = 10_000.0) -> "Rotary3d":
        """Equal parts for h and w; t gets the rest, as in Wan (44, 42, 42 of 128)."""
        space = head_width // 6 * 2
        return Rotary3d(split=(head_width - 2 * space, space, space), theta=theta)


def rotary_angles(coordinates: Float[Array, "*batch N 3"], rotary: Rotary3d) -> Float[Array, "*batch N half"]:
    """The angle of every pair of a head's channels, float32."""
    parts = []
    for axis, width in enumerate(rotary.split):
        frequencies = rotary.theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        parts.append(coordinates[..., axis, None].astype(jnp.float32) * frequencies)
    return jnp.concatenate(parts, axis=-1)


def rotate(x: Float[Array, "*batch N K d"], angles: Float[Array, "*batch N half"]) -> Float[Array, "*batch N K d"]:
    """Turn the pairs (j, j + d/2) of each head by their angles, in float32.

    Halves instead of neighbouring pairs: the same after a fixed permutation of channels, without strided access.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
