"""Which diffusion times a model is trained at."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Integer

from dit_video.arrays import AnyArray
from dit_video.errors import UserError

_GOLDEN = 0.6180339887498949


def low_discrepancy(offset: Float[Array, ""], ranks: Integer[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Numbers in [0, 1) that cover it evenly over consecutive ranks: `frac(offset + rank * golden ratio)`.

    An example's number depends on its rank in the plan and not on its row, so it is the same on any mesh. Over a batch
    the variance of the loss is lower than with independent draws (arXiv 2107.00630 stratifies for the same reason).
    """
    # Reduced in integers: a float32 product of a large rank keeps no fraction.
    step = jnp.uint32(int(_GOLDEN * 2**32))
    return (offset + (ranks.astype(jnp.uint32) * step).astype(jnp.float32) / 2.0**32) % 1.0


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every time equally often."""

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The time below which a share `u` of the times lies."""
        return u


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """`sigmoid(mean + std * normal)`: more of the middle, where the prediction is hardest (arXiv 2403.03206, eq. 19).

    Raises:
      UserError: a standard deviation that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not self.std > 0:
            raise UserError(f"the standard deviation {self.std} of logit-normal times must be positive")

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The time below which a share `u` of the times lies."""
        clipped = jnp.clip(u, 1e-5, 1 - 1e-5)
        return 1 / (1 + jnp.exp(-(self.mean + self.std * norm.ppf(clipped))))


Times = Uniform | LogitNormal
