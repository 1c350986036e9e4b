"""Sinusoidal embedding of scalars."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Real


def sinusoidal_embedding(
    values: Real[Array, "*batch"], width: int, *, max_period: float = 10_000.0
) -> Float[Array, "*batch {width}"]:
    """Return `[cos(x f), sin(x f)]` with frequencies from 1 down towards `1 / max_period`.

    `width` must be even (arXiv 1706.03762, section 3.5).
    """
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = values.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
