"""Codebooks: the quantisation of latents (arXiv 1711.00937), its loss, and how codes are learned."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.typing import AnyArray
from dit_video.models.autoencoders.interface import Pixels
from dit_video.models.autoencoders.latent_loss import DecodedClips, LatentLoss, LearnedArrays, ScalarMetrics

_CODES_PER_CHUNK = 1024
"""Number of codes compared with all latents at once."""
_MIN_LENGTH = 1e-12
"""Lower bound of a vector's length in divisions."""


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Configuration of a codebook.

    Raises:
      UserError: If there are no codes, or the codes have no width.
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
        # Unit variance like a new encoder's latents, so that more than a few codes are the nearest to some latent.
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
          UserError: If an index is out of range.
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
    """Return the index of the nearest code, the first one in a tie.

    Computed as `|z - e|^2 = |z|^2 - 2 z e + |e|^2`, a matrix product; the first term is the same for all codes and left
    out. It takes memory for `chunk` distances per latent.
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


class CodebookUpdate(NamedTuple):
    """Result of one codebook update."""

    codes: Float[Array, "n c"]
    restarted: Bool[Array, " n"]
    """True for codes that were restarted."""
    moments: dict[str, Array]
    """State of the update, for the next step."""
    metrics: dict[str, Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class CodebookLearning:
    """Configuration of the codebook update.

    Raises:
      UserError: If a value is out of range.
    """

    decay: float | None = 0.99
    """Decay of the moving averages that are the codes; None learns the codes by gradient."""
    smoothing: float = 1e-5
    """Constant `s` of the Laplace smoothing."""
    restart_after: int | None = 100
    """Number of steps without use after which a code is restarted; None disables restarts."""
    commitment: float = 0.25
    """Weight of the commitment loss, the mean squared distance that pulls the latents to their codes."""

    def __post_init__(self):
        if self.decay is not None and not 0 <= self.decay < 1:
            raise UserError(f"decay={self.decay} is invalid: it must lie in [0, 1). Use None to learn by gradient.")
        check_at_least(0, commitment=self.commitment)
        check_at_least(1, restart_after=self.restart_after)
        if not self.smoothing > 0:
            raise UserError(f"smoothing={self.smoothing} is invalid: it must be positive.")

    def init_moments(self, codes: Float[Array, "n c"], *, fresh: bool = True) -> dict[str, Array]:
        """Return the initial state of the update.

        Codes of a fresh codebook count as long unused, so that those that the first batch does not use are restarted
        from its latents. Codes of a trained codebook count as just used.
        """
        moments = {"ages": jnp.full(len(codes), (self.restart_after or 0) if fresh else 0, jnp.int32)}
        if self.decay is not None:
            moments |= {"counts": jnp.ones(len(codes), jnp.float32), "sums": jnp.array(codes, jnp.float32)}
        return moments

    def update(
        self,
        codes: Float[Array, "n c"],
        moments: dict[str, Array],
        latents: Float[Array, "B t h w c"],
        indices: Int[Array, "B t h w"],
        random_key: Key[Array, ""],
    ) -> CodebookUpdate:
        """Return the codebook updated by a batch of latents.

        The metrics are `usage`, the share of the codes that the batch used; `usage_recent`, the share that the last
        `restart_after` steps used; `perplexity`, `exp(-sum p log p)` of the shares `p` of the batch's latents, which is
        the effective number of codes; `restarts`, the number of restarted codes.

        Args:
          codes: Codes after the gradient update, which changes them only if `decay` is None.
          moments: State from `init_moments` or from the previous step.
          latents: Latents before quantization.
          indices: Index of the code nearest to each latent.
          random_key: Random key for the choice of the latents that replace unused codes.
        """
        flat_latents, flat_indices = latents.reshape(-1, latents.shape[-1]), indices.reshape(-1)
        counts = jnp.zeros(len(codes), jnp.float32).at[flat_indices].add(1.0)
        moments = dict(moments)
        if self.decay is not None:
            sums = jnp.zeros_like(codes).at[flat_indices].add(flat_latents)
            codes, averages = self._update_averages(self.decay, counts, sums, moments)
            moments |= averages
        ages = jnp.where(counts > 0, 0, moments["ages"] + 1)
        share = counts / counts.sum()
        entropy = -jnp.where(counts > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0).sum()
        metrics = {"usage": (counts > 0).mean(dtype=jnp.float32), "perplexity": jnp.exp(entropy)}
        dead = jnp.zeros(len(codes), bool)
        if self.restart_after is not None:
            dead = ages >= self.restart_after
            metrics |= {"usage_recent": 1 - dead.mean(dtype=jnp.float32), "restarts": dead.sum(dtype=jnp.float32)}
            # Each dead code gets a different latent if the batch has enough of them.
            count = len(flat_latents)
            sources = jax.random.choice(random_key, count, (len(codes),), replace=count < len(codes))
            codes = jnp.where(dead[:, None], flat_latents[sources], codes)
            ages = jnp.where(dead, 0, ages)
            if self.decay is not None:
                moments["counts"] = jnp.where(dead, 1.0, moments["counts"])
                moments["sums"] = jnp.where(dead[:, None], codes, moments["sums"])
        return CodebookUpdate(codes, dead, moments | {"ages": ages}, metrics)

    def _update_averages(
        self, decay: float, batch_counts: Float[Array, " n"], batch_sums: Float[Array, "n c"], moments: dict[str, Array]
    ) -> tuple[Float[Array, "n c"], dict[str, Array]]:
        """Return the codes and the moving averages that they are computed from."""
        counts = decay * moments["counts"] + (1 - decay) * batch_counts
        sums = decay * moments["sums"] + (1 - decay) * batch_sums
        total = counts.sum()
        smoothed = (counts + self.smoothing) / (total + len(counts) * self.smoothing) * total
        return sums / smoothed[:, None], {"counts": counts, "sums": sums}


@runtime_checkable
class QuantizedAutoencoder(Protocol):
    """An autoencoder whose latents are codes of a codebook, at `codebook/codes` of its parameters."""

    def quantize(self, pixels: Pixels) -> QuantizedLatents:
        """Return the quantised latents of clips, with the straight-through gradient, and their losses."""
        ...

    def reconstruct(self, codes: Float[Array, "B t h w c"]) -> Pixels:
        """Return the pixels of codes."""
        ...


@dataclass(frozen=True, kw_only=True)
class CodebookLoss(LatentLoss):
    """The distance of the latents from their codes (arXiv 1711.00937, eq. 3), and the codebook's own learning."""

    learning: CodebookLearning
    """Update rule of the codebook. The codebook loss has weight 1 if the codes are learned by gradient."""
    is_trained: bool = True
    """False for codes that stay as they are; their use is still measured."""

    @property
    def effective_learning(self) -> CodebookLearning:
        """Return the update rule, which leaves codes that are not trained as they are."""
        return self.learning if self.is_trained else replace(self.learning, decay=None, restart_after=None)

    def decode(self, model: QuantizedAutoencoder, pixels: Pixels, random_key: Key[Array, ""]) -> DecodedClips:
        quantized = model.quantize(pixels)
        cost = self.learning.commitment * quantized.commitment_loss
        if self.learning.decay is None:
            cost = cost + quantized.codebook_loss
        return DecodedClips(
            model.reconstruct(quantized.vectors),
            cost,
            {"commitment": quantized.commitment_loss.mean()},
            auxiliary=jax.lax.stop_gradient((quantized.latents, quantized.indices)),
        )

    def init_extra(self, params: dict[str, Any], *, is_fresh: bool) -> dict[str, Any]:
        return {"codebook": self.effective_learning.init_moments(params["codebook"]["codes"], fresh=is_fresh)}

    def update(
        self, arrays: LearnedArrays, auxiliary: PyTree, random_key: Key[Array, ""]
    ) -> tuple[LearnedArrays, ScalarMetrics]:
        """Update the codebook by the batch's latents and their codes, and return metrics of its use."""
        (latents, indices), learning = auxiliary, self.effective_learning
        params, ema, extra = arrays
        update = learning.update(params["codebook"]["codes"], extra["codebook"], latents, indices, random_key)
        # Codes that are moving averages need no second average. A restarted code is not averaged with its old value.
        is_replaced = update.restarted[:, None] if learning.decay is None else True
        ema_codes = jnp.where(is_replaced, update.codes, ema["codebook"]["codes"])
        learned = LearnedArrays(
            params=params | {"codebook": {"codes": update.codes}},
            ema=ema | {"codebook": {"codes": ema_codes}},
            extra=extra | {"codebook": update.moments},
        )
        return learned, update.metrics
