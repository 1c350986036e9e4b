"""Noise of packed rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dit_video.tokens.packing import Rows, positions


def packed_noise(rows: Rows, keys: Key[Array, "B G"]) -> Float[Array, "B N p"]:
    """Standard normal noise; an example's depends on its key and its own tokens' order, not on the row around it."""
    width = rows.tokens.shape[-1]
    index = positions(rows.segments)

    def token(row_keys, segment, at):
        return jax.random.normal(jax.random.fold_in(row_keys[jnp.maximum(segment - 1, 0)], at), (width,))

    return jax.vmap(lambda row_keys, ids, at: jax.vmap(lambda i, a: token(row_keys, i, a))(ids, at))(
        keys, rows.segments, index
    )
