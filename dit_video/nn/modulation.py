"""Adaptive layer norm: shift, scale and gate from a conditioning vector (adaLN-Zero, arXiv 2212.09748)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.nn.norms import layer_norm


def modulate(
    x: Float[Array, "*batch D"], shift: Float[Array, "*batch D"], scale: Float[Array, "*batch D"], *, eps: float = 1e-6
) -> Float[Array, "*batch D"]:
    """Return `layer_norm(x) * (1 + scale) + shift`, computed in float32; `eps` is that of the norm."""
    return (layer_norm(x.astype(jnp.float32), eps=eps) * (1 + scale) + shift).astype(x.dtype)


def make_modulation_table(entries: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    """Return a learned table of a block's shifts, scales and gates, which are added to those of the projected time."""
    return nnx.Param(jax.random.normal(rngs.params(), (entries, width), jnp.float32) / width**0.5)
