"""Keys and values of finished chunks of clips, which a causal transformer does not compute again."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.nn import AttentionInputs


class KvCache(NamedTuple):
    """Rotated keys and values of all layers, with room for `M` tokens in every row."""

    keys: Float[Array, "L B M K d"]
    values: Float[Array, "L B M K d"]
    segments: Int[Array, "B M"]
    """Segment of each token; 0 where there is room."""
    indices: Int[Array, "B M 3"]
    """Indices of each token on its clip's grid."""
    length: Int[Array, ""]
    """Number of tokens in use in each row."""


def apply_blocks_with_cache(
    backbone: Any, x: Float[Array, "B T D"], inputs: Any, cache: KvCache, *, length: int
) -> tuple[Float[Array, "B T D"], KvCache]:
    """Apply all blocks to a chunk whose tokens also see the cached ones.

    Args:
      backbone: A `BlockBackbone`.
      x, inputs: The chunk, as `embed_inputs` returned it.
      cache: Keys and values of the earlier chunks.
      length: Number of the chunk's tokens that are cached; extra tokens, which follow them, are not.

    Returns:
      The chunk's tokens, and the cache extended by the chunk; the cached values are NaN if the chunk does not fit.
    """
    segments, indices = inputs.attention_inputs.q_segments, inputs.attention_inputs.q_indices
    is_same = segments[:, :, None] == cache.segments[:, None]
    first_frame = jnp.where(is_same, cache.indices[:, None, :, 0] + 1, 0).max(axis=-1)
    # The chunk's frames follow the cached frames; tokens without a place in the clip have no frame.
    indices = indices.at[..., 0].add(jnp.where(indices[..., 0] >= 0, first_frame, 0))
    key_segments = jnp.concatenate([cache.segments, segments], axis=1)
    key_indices = jnp.concatenate([cache.indices, indices], axis=1)
    inputs = inputs._replace(attention_inputs=AttentionInputs(segments, key_segments, indices, key_indices))

    def attend_with_cache(block, x, inputs, attention, cached):
        own = []

        def attend(q, k, v, attention_inputs):
            own.append((k[:, :length], v[:, :length]))
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(cached, (k, v), strict=True))
            return attention(q, k, v, attention_inputs)

        return block(x, inputs, attend), own[0]

    x, chunk = backbone.apply_blocks(x, inputs, wrapper=attend_with_cache, values=(cache.keys, cache.values))
    has_room = cache.length + length <= cache.segments.shape[1]

    def write(cached: Array, new: Array, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), cache.length, axis)

    return x, KvCache(
        keys=write(cache.keys, chunk[0], 2),
        values=jnp.where(has_room, write(cache.values, chunk[1], 2), jnp.nan),
        segments=write(cache.segments, segments[:, :length], 1),
        indices=write(cache.indices, indices[:, :length], 1),
        length=cache.length + length,
    )
