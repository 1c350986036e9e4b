"""Latents as the nearest vectors of a codebook (VQ-VAE, arXiv 1711.00937).

    k(z) = argmin_k |z - e_k|^2,        q(z) = e_k(z)

Gradients pass a quantised latent as if it were the latent itself (the straight-through estimator). How a codebook is
learned lies in `dit_video.training.losses.codebook`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray

_CHUNK = 1024
"""Codes that all latents are compared with at once."""
_SHORTEST = 1e-12
"""A vector's length is taken to be at least this when it is divided by."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """A codebook by its size.

    Raises:
      UserError: no codes, or codes of no width.
    """

    codes: int = 8192
    width: int = 4
    """values of a code, which are the channels of the latents"""
    spherical: bool = False
    """whether latents and codes are brought to length 1, so that the nearest is the one of the largest cosine: with
    codes of 8 to 32 values nearly all of a large codebook is used (ViT-VQGAN, arXiv 2110.04627, section 3.2)"""

    def __post_init__(self):
        if self.codes < 1 or self.width < 1:
            raise UserError(f"a codebook of {self.codes} codes of {self.width} values; give it at least 1 of each")


class Quantized(NamedTuple):
    """Latents, and what a codebook makes of them."""

    latents: Float[Array, "B t h w c"]
    """as they were compared with the codes: of length 1 where the codebook is spherical"""
    vectors: Float[Array, "B t h w c"]
    """the nearest codes, through which gradients pass to the latents"""
    indices: Int[Array, "B t h w"]
    commitment: Float[Array, " B"]
    """mean squared distance, whose gradient draws the latents to the codes"""
    attraction: Float[Array, " B"]
    """the same distance, whose gradient draws the codes to the latents"""


class Codebook(nnx.Module):
    """Vectors that stand for latents."""

    def __init__(self, config: CodebookConfig, *, rngs: nnx.Rngs):
        self.config = config
        # About as far from zero as the latents of a fresh encoder, so that more than a few codes are nearest to some.
        self.codes = nnx.Param(jax.random.normal(rngs.params(), (config.codes, config.width), jnp.float32))

    def __call__(self, latents: Float[Array, "B t h w c"]) -> Quantized:
        """Latents to the nearest codes."""
        latents = self.comparable(latents.astype(jnp.float32))
        indices = self.nearest(latents)
        chosen = self._vectors()[indices]
        axes = (1, 2, 3, 4)
        return Quantized(
            latents=latents,
            vectors=latents + jax.lax.stop_gradient(chosen - latents),
            indices=indices,
            commitment=jnp.square(latents - jax.lax.stop_gradient(chosen)).mean(axis=axes),
            attraction=jnp.square(jax.lax.stop_gradient(latents) - chosen).mean(axis=axes),
        )

    def nearest(self, latents: Float[Array, "B t h w c"]) -> Int[Array, "B t h w"]:
        """The indices of the codes nearest to latents."""
        latents, codes = self.comparable(latents), self._vectors()
        return nearest(jax.lax.stop_gradient(latents), jax.lax.stop_gradient(codes))

    def look_up(self, indices: Int[AnyArray, "B t h w"]) -> Float[Array, "B t h w c"]:
        """The codes of indices. Inside `jax.jit`, where values are not known, an index out of range gives NaN.

        Raises:
          UserError: indices out of range.
        """
        last = self.config.codes - 1
        if not isinstance(indices, jax.core.Tracer) and indices.size:
            low, high = int(np.min(indices)), int(np.max(indices))
            if low < 0 or high > last:
                raise UserError(
                    f"a codebook of {self.config.codes} codes has the indices 0 to {last}, {low if low < 0 else high} "
                    "was given; use the codebook that the indices were made with"
                )
        # NumPy's negative indices, which count from the end, are out of range here.
        found = jnp.where(indices < 0, self.config.codes, indices)
        return jnp.take(self._vectors(), found, axis=0, mode="fill", fill_value=jnp.nan)

    def _vectors(self) -> Float[Array, "n c"]:
        return self.comparable(jnp.asarray(self.codes[...]))

    def comparable(self, vectors: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """Vectors as they are compared."""
        if not self.config.spherical:
            return vectors
        # Not the length's own gradient, which is NaN at zero.
        squared = jnp.square(vectors).sum(axis=-1, keepdims=True)
        return vectors * jax.lax.rsqrt(jnp.maximum(squared, _SHORTEST**2))


def nearest(
    latents: Float[Array, "*batch c"], codes: Float[Array, "n c"], *, chunk: int = _CHUNK
) -> Int[Array, "*batch"]:
    """The index of the nearest code, the first of equals.

    As `|z - e|^2 = |z|^2 - 2 z e + |e|^2`, whose first term is the same for all codes, it takes a matrix product.
    Memory is that of `chunk` distances for every latent.
    """
    flat = latents.reshape(-1, latents.shape[-1])

    def distances(some: Float[Array, "m c"]) -> Float[Array, "N m"]:
        # In full precision: in bfloat16, which is a TPU's default for products, other codes would be the nearest.
        products = jnp.matmul(flat, some.T, precision=jax.lax.Precision.HIGHEST)
        return 0.5 * jnp.square(some).sum(axis=-1) - products

    def closer(best: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        start, some = part
        found = distances(some)
        least = found.min(axis=-1)
        better = least < best[0]
        index = jnp.where(better, start + found.argmin(axis=-1).astype(jnp.int32), best[1])
        return (jnp.where(better, least, best[0]), index), None

    whole = len(codes) // chunk * chunk
    best = jnp.full(len(flat), jnp.inf), jnp.zeros(len(flat), jnp.int32)
    if whole:
        starts = jnp.arange(0, whole, chunk, dtype=jnp.int32)
        best, _ = jax.lax.scan(closer, best, (starts, codes[:whole].reshape(-1, chunk, codes.shape[-1])))
    if whole < len(codes):
        best, _ = closer(best, (jnp.asarray(whole, jnp.int32), codes[whole:]))
    return best[1].reshape(latents.shape[:-1])
