"""Captions that are dropped in training, so that one model is conditional and unconditional (arXiv 2207.12598)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dit_video.arrays import AnyArray
from dit_video.tokens import positions, to_tokens


def drop_captions(
    text: Int[AnyArray, "B S"], segments: Int[AnyArray, "B S"], drop: Bool[Array, "B G"], *, empty: tuple[int, ...]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Replace the captions of the dropped segments by the empty caption, whose tokens are `empty`.

    A dropped caption's first tokens become those of the empty one, its others become padding: exactly what the
    unconditional branch of guidance is given. A caption has at least as many tokens as the empty one.
    """
    dropped = to_tokens(drop, segments) & (segments > 0)
    index = positions(segments)
    kept = index < len(empty)
    replacement = jnp.where(kept, jnp.asarray(empty, text.dtype)[jnp.minimum(index, len(empty) - 1)], 0)
    return jnp.where(dropped, replacement, text), jnp.where(dropped & ~kept, 0, segments)
