"""Captions that are dropped in training, so that one model is conditional and unconditional (arXiv 2207.12598)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dit_video.tokens import to_tokens


def drop_captions(
    text: Int[Array, "B S"], segments: Int[Array, "B S"], drop: Bool[Array, "B G"], *, end: int
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """Replace the captions of the dropped segments by the empty caption: the token `end` alone.

    The first token of a dropped caption becomes `end`, its others become padding.
    """
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    first = segments != before
    dropped = to_tokens(drop, segments) & (segments > 0)
    text = jnp.where(dropped, jnp.where(first, end, 0), text)
    return text, jnp.where(dropped & ~first, 0, segments)
