"""Configs of `Dit`'s conditioning: context, class labels and time embedding."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least

TIME_SCALE = 1000.0
"""Scale of the model time: diffusion time is in [0, 1], but sinusoidal embeddings are designed for steps of about 1."""


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Ungated cross-attention of each block to the context's tokens (PixArt, arXiv 2310.00426)."""

    pooled: bool = True
    """True if the context's mean modulates the blocks, in addition to the time."""


@dataclass(frozen=True, kw_only=True)
class JointAttention:
    """Joint attention among context and video tokens, each kind with its own weights (MMDiT, arXiv 2403.03206)."""

    pooled: bool = True
    """True if the context's mean modulates the blocks, in addition to the time."""


@dataclass(frozen=True, kw_only=True)
class PooledContext:
    """Context that is used only through its mean, which modulates the blocks (DiT, arXiv 2212.09748)."""

    pooled: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NoContext:
    """No context, for models with class labels alone and unconditional models."""

    pooled: ClassVar[bool] = False


ContextConfig = CrossAttention | JointAttention | PooledContext | NoContext


@dataclass(frozen=True, kw_only=True)
class ClassLabels:
    """Class labels, each a learned vector that modulates the blocks; one more, the last, stands for no class.

    Raises:
      UserError: If there is no class.
    """

    classes: int

    def __post_init__(self):
        check_at_least(1, classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class TimeEmbedding:
    """Configuration of the sinusoidal embedding of the diffusion time (0 = data, 1 = noise).

    Raises:
      UserError: If the scale or the period is not positive.
    """

    scale: float = TIME_SCALE
    """Factor from diffusion time to model time."""
    max_period: float = 10_000.0
    """Inverse of the lowest frequency, approximately."""
    reversed: bool = False
    """True if the model time runs from noise to data (SiT): the model receives `1 - time`, and its prediction, a
    velocity along its own time, is negated."""

    def __post_init__(self):
        if not (self.scale > 0 and self.max_period > 0):
            raise UserError(f"scale={self.scale}, max_period={self.max_period} of time is invalid; use positive values")

    def model_time(self, time: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Return the model time, from which sines and cosines are computed."""
        return self.scale * (1 - time if self.reversed else time)
