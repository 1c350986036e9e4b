"""Caption dropout in training, so that one model is conditional and unconditional (arXiv 2207.12598)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from dit_video.core.typing import AnyArray
from dit_video.tokens import compute_segment_offsets, expand_to_tokens


def drop_captions(
    text: Shaped[AnyArray, "B S *E"],
    segments: Int[AnyArray, "B S"],
    drop: Bool[Array, "B G"],
    *,
    empty: Shaped[AnyArray, "s *E"],
) -> tuple[Shaped[Array, "B S *E"], Int[Array, "B S"]]:
    """Replace the captions of the dropped segments by the empty caption `empty`: tokens, or embeddings of width `E`.

    The first tokens of a dropped caption become those of the empty one, the others become padding: exactly the input of
    the unconditional branch of guidance. A caption has at least as many tokens as the empty one.
    """
    is_dropped = expand_to_tokens(drop, segments) & (segments > 0)
    index = compute_segment_offsets(segments)
    is_kept = index < len(empty)
    replacement = jnp.asarray(empty, text.dtype)[jnp.minimum(index, len(empty) - 1)]
    shape = (*segments.shape, *(1,) * (text.ndim - 2))
    shortened = jnp.where(is_kept.reshape(shape), replacement, 0)
    return jnp.where(is_dropped.reshape(shape), shortened, text), jnp.where(is_dropped & ~is_kept, 0, segments)
