"""Which diffusion times a model is trained at."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Integer

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.shift import ClipSize

_GOLDEN = 0.6180339887498949
_MARGIN = 1e-5
"""of the ends of the unit interval, where some times are infinitely far out and some targets infinitely large"""


def low_discrepancy(offset: Float[Array, ""], ranks: Integer[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Numbers in [0, 1) that cover it evenly over consecutive ranks: `frac(offset + rank * golden ratio)`.

    An example's number depends on its rank in the plan and not on its row, so it is the same on any mesh. Over a batch
    the variance of the loss is lower than with independent draws (arXiv 2107.00630 stratifies for the same reason).
    """
    # Reduced in integers: a float32 product of a large rank keeps no fraction.
    step = jnp.uint32(int(_GOLDEN * 2**32))
    return (offset + (ranks.astype(jnp.uint32) * step).astype(jnp.float32) / 2.0**32) % 1.0


class Times(ABC):
    """A distribution of times, and how a process shifts it."""

    @abstractmethod
    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The number below which a share `u` lies."""

    def __call__(
        self, process: Process, u: Float[Array, "*shape"], size: ClipSize | None = None
    ) -> Float[Array, "*shape"]:
        """Training times of clips from uniform numbers in [0, 1), shifted as the process shifts those of sampling."""
        return process.shifted(self.quantile(u), size)


@dataclass(frozen=True, kw_only=True)
class Uniform(Times):
    """Every time equally often, but the ends."""

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _inside(u)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(Times):
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
        return 1 / (1 + jnp.exp(-(self.mean + self.std * norm.ppf(_inside(u)))))


@dataclass(frozen=True, kw_only=True)
class Mode(Times):
    r"""Most often the middle, or for a negative scale both ends, but none never (arXiv 2403.03206, eq. 20).

    $t = u + s\,\big(u - \sin^2(\frac\pi2 u)\big)$, which is the paper's with $1 - u$ for $u$.

    Raises:
      UserError: a scale $s$ at which times would not rise with $u$.
    """

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"the scale {self.scale} of mode times lies between -1 and 1.75; 0 makes them uniform")

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        inside = _inside(u)
        return inside + self.scale * (inside - jnp.square(jnp.sin(math.pi / 2 * inside)))


@dataclass(frozen=True, kw_only=True)
class LogNormalSigma(Times):
    r"""$\sigma / \alpha$ is `exp(mean + std * normal)`, of any process and unshifted (arXiv 2206.00364, table 1).

    Raises:
      UserError: a standard deviation that is not positive.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if not self.std > 0:
            raise UserError(f"the standard deviation {self.std} of log-normal noise must be positive")

    def quantile(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Of the ratio of noise to data."""
        return jnp.exp(self.mean + self.std * norm.ppf(_inside(u)))

    def __call__(
        self, process: Process, u: Float[Array, "*shape"], size: ClipSize | None = None
    ) -> Float[Array, "*shape"]:
        return jnp.minimum(process.time_at(self.quantile(u)), 1.0)


def _inside(u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.clip(u, _MARGIN, 1 - _MARGIN)
