"""How a codebook is learned, and how codes that nothing uses come back.

Codes follow the latents that chose them, as moving averages over the steps (arXiv 1711.00937, appendix A.1):

    N_k <- g N_k + (1 - g) n_k,    m_k <- g m_k + (1 - g) sum of k's latents,    e_k = m_k / N'_k

with N' = (N + s) / (sum N + K s) sum N, Laplace-smoothed, so that no unused code is divided by zero; or by the gradient
of their distance. A code that has not been used for `restart_after` steps is put where a latent of the batch lies.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dit_video.core.errors import UserError


class Learned(NamedTuple):
    """A codebook after a step."""

    codes: Float[Array, "n c"]
    restarted: Bool[Array, " n"]
    """which of them were put elsewhere"""
    moments: dict[str, Array]
    """what is kept for the next step"""
    figures: dict[str, Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class CodebookLearning:
    """How a codebook follows the latents.

    Raises:
      UserError: values out of range.
    """

    decay: float | None = 0.99
    """of the moving averages that the codes are; None learns the codes by gradient"""
    smoothing: float = 1e-5
    restart_after: int | None = 100
    """steps that a code may go unused; None leaves it where it is"""
    commitment: float = 0.25
    """weight of the mean squared distance that draws the latents to the codes"""

    def __post_init__(self):
        if self.decay is not None and not 0 <= self.decay < 1:
            raise UserError(f"a codebook's decay {self.decay} must lie in [0, 1); None learns the codes by gradient")
        if not self.commitment >= 0:
            raise UserError(f"commitment {self.commitment} must not be negative")
        if not self.smoothing > 0:
            raise UserError(f"a codebook's smoothing {self.smoothing} must be positive")
        if self.restart_after is not None and self.restart_after < 1:
            raise UserError(f"restart_after={self.restart_after} must be at least 1 step; None restarts no code")

    def start(self, codes: Float[Array, "n c"], *, fresh: bool = True) -> dict[str, Array]:
        """What a new run keeps beside its codes.

        A fresh codebook starts as if it had gone unused for long: what the first batch does not use is put among its
        latents. One that was learned already stays where it is.
        """
        moments = {"ages": jnp.full(len(codes), (self.restart_after or 0) if fresh else 0, jnp.int32)}
        if self.decay is not None:
            moments |= {"counts": jnp.ones(len(codes), jnp.float32), "sums": jnp.array(codes, jnp.float32)}
        return moments

    def follow(
        self,
        codes: Float[Array, "n c"],
        moments: dict[str, Array],
        latents: Float[Array, "B t h w c"],
        indices: Int[Array, "B t h w"],
        random: Key[Array, ""],
    ) -> Learned:
        """The codebook after a step's batch, and how well it is used.

        The figures: `usage` is the share of the codes that the batch used, `usage_recent` of those that the last
        `restart_after` steps used; `perplexity` is `exp(-sum p log p)` of the batch's shares `p`, the number of
        codes that would be as diverse if all were used alike; `restarts` counts the codes that were put elsewhere.

        Args:
          codes: after the step's gradients, which change them where there is no `decay`.
          moments: of `start`, or of the step before.
          latents: as they were compared with the codes.
          indices: of the codes that they chose.
          random: which latents become codes.
        """
        flat, chosen = latents.reshape(-1, latents.shape[-1]), indices.reshape(-1)
        used = jnp.zeros(len(codes), jnp.float32).at[chosen].add(1.0)
        moments = dict(moments)
        if self.decay is not None:
            codes, averages = self._averaged(self.decay, used, jnp.zeros_like(codes).at[chosen].add(flat), moments)
            moments |= averages
        ages = jnp.where(used > 0, 0, moments["ages"] + 1)
        share = used / used.sum()
        entropy = -jnp.where(used > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0).sum()
        figures = {"usage": (used > 0).mean(dtype=jnp.float32), "perplexity": jnp.exp(entropy)}
        dead = jnp.zeros(len(codes), bool)
        if self.restart_after is not None:
            dead = ages >= self.restart_after
            figures |= {"usage_recent": 1 - dead.mean(dtype=jnp.float32), "restarts": dead.sum(dtype=jnp.float32)}
            # Each of the dead codes another latent, as far as the batch has as many.
            places = jax.random.choice(random, len(flat), (len(codes),), replace=len(flat) < len(codes))
            codes = jnp.where(dead[:, None], flat[places], codes)
            ages = jnp.where(dead, 0, ages)
            if self.decay is not None:
                moments["counts"] = jnp.where(dead, 1.0, moments["counts"])
                moments["sums"] = jnp.where(dead[:, None], codes, moments["sums"])
        return Learned(codes, dead, moments | {"ages": ages}, figures)

    def _averaged(
        self, decay: float, used: Float[Array, " n"], summed: Float[Array, "n c"], moments: dict[str, Array]
    ) -> tuple[Float[Array, "n c"], dict[str, Array]]:
        """The codes of the moved averages, and these."""
        counts = decay * moments["counts"] + (1 - decay) * used
        sums = decay * moments["sums"] + (1 - decay) * summed
        total = counts.sum()
        smoothed = (counts + self.smoothing) / (total + len(counts) * self.smoothing) * total
        return sums / smoothed[:, None], {"counts": counts, "sums": sums}
