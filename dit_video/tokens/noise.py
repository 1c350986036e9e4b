"""Noise for packed rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dit_video.tokens.packing import PackedBatch, compute_segment_offsets


def sample_packed_noise(batch: PackedBatch, keys: Key[Array, "B G"]) -> Float[Array, "B N p"]:
    """Sample standard normal noise, which depends on an example's key and its tokens' order, but not on its row."""
    width = batch.tokens.shape[-1]
    offsets = compute_segment_offsets(batch.segments)

    def sample_token(row_keys, segment, offset):
        return jax.random.normal(jax.random.fold_in(row_keys[jnp.maximum(segment - 1, 0)], offset), (width,))

    return jax.vmap(jax.vmap(sample_token, in_axes=(None, 0, 0)))(keys, batch.segments, offsets)
