"""Vector quantisation of latents: the nearest vectors of a codebook (VQ-VAE, arXiv 1711.00937).

    k(z) = argmin_k |z - e_k|^2,        q(z) = e_k(z)

Gradients pass through quantisation as if it were the identity (the straight-through estimator). The training of a
codebook is in `dit_video.training.losses.codebook`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.typing import AnyArray

_CODES_PER_CHUNK = 1024
"""Number of codes compared with all latents at once."""
_MIN_LENGTH = 1e-12
"""Lower bound of a vector's length in divisions."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Configuration of a codebook.

    Raises:
      UserError: no codes, or codes of no width.
    """

    codes: int = 8192
    """Number of codes."""
    width: int = 4
    """Values per code, which are the channels of the latents."""
    spherical: bool = False
    """True scales latents and codes to length 1, so that the nearest code has the largest cosine: with codes of 8 to 32
    values nearly all of a large codebook is used (ViT-VQGAN, arXiv 2110.04627, section 3.2)."""

    def __post_init__(self):
        check_at_least(1, codes=self.codes, width=self.width)


class QuantizedLatents(NamedTuple):
    """Latents with their nearest codes and the losses of both."""

    latents: Float[Array, "B t h w c"]
    """Latents as compared with the codes: of length 1 if the codebook is spherical."""
    vectors: Float[Array, "B t h w c"]
    """Nearest codes, with the straight-through gradient to the latents."""
    indices: Int[Array, "B t h w"]
    """Indices of the nearest codes."""
    commitment_loss: Float[Array, " B"]
    """Mean squared distance with a gradient that moves the latents to the codes."""
    codebook_loss: Float[Array, " B"]
    """Mean squared distance with a gradient that moves the codes to the latents."""


class Codebook(nnx.Module):
    """A codebook: vectors that replace latents."""

    def __init__(self, config: CodebookConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Unit variance as a new encoder's latents, so that more than a few codes are the nearest of some latent.
        self.codes = nnx.Param(jax.random.normal(rngs.params(), (config.codes, config.width), jnp.float32))

    def __call__(self, latents: Float[Array, "B t h w c"]) -> QuantizedLatents:
        """Return latents, their nearest codes and the losses."""
        latents = self.normalize(latents.astype(jnp.float32))
        indices = self.find_nearest(latents)
        chosen = self._get_vectors()[indices]
        axes = (1, 2, 3, 4)
        return QuantizedLatents(
            latents=latents,
            vectors=latents + jax.lax.stop_gradient(chosen - latents),
            indices=indices,
            commitment_loss=jnp.square(latents - jax.lax.stop_gradient(chosen)).mean(axis=axes),
            codebook_loss=jnp.square(jax.lax.stop_gradient(latents) - chosen).mean(axis=axes),
        )

    def find_nearest(self, latents: Float[Array, "B t h w c"]) -> Int[Array, "B t h w"]:
        """Return the indices of the nearest codes."""
        latents, codes = self.normalize(latents), self._get_vectors()
        return find_nearest_codes(jax.lax.stop_gradient(latents), jax.lax.stop_gradient(codes))

    def look_up(self, indices: Int[AnyArray, "B t h w"]) -> Float[Array, "B t h w c"]:
        """Return the codes of indices. Inside `jax.jit` values are unknown: an index out of range gives NaN.

        Raises:
          UserError: indices out of range.
        """
        last = self.config.codes - 1
        if not isinstance(indices, jax.core.Tracer) and indices.size:
            low, high = int(np.min(indices)), int(np.max(indices))
            if low < 0 or high > last:
                raise UserError(
                    f"code index {low if low < 0 else high} is out of range: this codebook has 0 to {last}. "
                    "Use the codebook that the indices were made with"
                )
        # `jnp.take` would count negative indices from the end; here they are out of range.
        filled_indices = jnp.where(indices < 0, self.config.codes, indices)
        return jnp.take(self._get_vectors(), filled_indices, axis=0, mode="fill", fill_value=jnp.nan)

    def _get_vectors(self) -> Float[Array, "n c"]:
        return self.normalize(jnp.asarray(self.codes[...]))

    def normalize(self, vectors: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """Return vectors as they are compared: of length 1 if the codebook is spherical."""
        if not self.config.spherical:
            return vectors
        # Bounded before the root: the gradient of the length itself is NaN at zero.
        squared = jnp.square(vectors).sum(axis=-1, keepdims=True)
        return vectors * jax.lax.rsqrt(jnp.maximum(squared, _MIN_LENGTH**2))


def find_nearest_codes(
    latents: Float[Array, "*batch c"], codes: Float[Array, "n c"], *, chunk: int = _CODES_PER_CHUNK
) -> Int[Array, "*batch"]:
    """Return the index of the nearest code, the first one of a tie.

    Computed as `|z - e|^2 = |z|^2 - 2 z e + |e|^2`, a matrix product; the first term is the same for all codes and
    left out. Memory is that of `chunk` distances per latent.
    """
    flat = latents.reshape(-1, latents.shape[-1])

    def update_best(best: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        start, subset = part
        # Full precision: with bfloat16, a TPU's default for products, other codes would be the nearest.
        products = jnp.matmul(flat, subset.T, precision=jax.lax.Precision.HIGHEST)
        values = 0.5 * jnp.square(subset).sum(axis=-1) - products
        least = values.min(axis=-1)
        better = least < best[0]
        index = jnp.where(better, start + values.argmin(axis=-1).astype(jnp.int32), best[1])
        return (jnp.where(better, least, best[0]), index), None

    # A scan needs chunks of one size; the codes after the last full chunk are compared separately.
    full = len(codes) // chunk * chunk
    best = jnp.full(len(flat), jnp.inf), jnp.zeros(len(flat), jnp.int32)
    if full:
        starts = jnp.arange(0, full, chunk, dtype=jnp.int32)
        best, _ = jax.lax.scan(update_best, best, (starts, codes[:full].reshape(-1, chunk, codes.shape[-1])))
    if full < len(codes):
        best, _ = update_best(best, (jnp.asarray(full, jnp.int32), codes[full:]))
    return best[1].reshape(latents.shape[:-1])
