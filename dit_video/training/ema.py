"""The exponential moving average of parameters, which is what is sampled from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree


def update_ema(ema: PyTree, params: PyTree, step: Int[Array, ""], *, decay: float) -> PyTree:
    """`d ema + (1 - d) params` with `d = min(decay, (1 + step) / (10 + step))`, so that early steps count less.

    Computed so that the average of what does not move does not move either, not by a bit.
    """
    warm = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda mean, value: mean + (1 - warm) * (value.astype(jnp.float32) - mean), ema, params)
