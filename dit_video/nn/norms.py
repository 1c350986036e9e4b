"""Norms over the last axis, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def layer_norm(x: Float[Array, "*batch D"], *, eps: float = 1e-6) -> Float[Array, "*batch D"]:
    """Zero mean and unit variance, without learned scale: what adaptive modulation is applied to."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RmsNorm(nnx.Module):
    """`x / rms(x) * scale` (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned scale and shift."""

    def __init__(self, width: int, *, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        normal = layer_norm(x.astype(jnp.float32), eps=self.eps)
        return (normal * self.scale[...] + self.shift[...]).astype(x.dtype)
