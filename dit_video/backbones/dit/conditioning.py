"""What a denoiser is told besides the noisy tokens, and by which way."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError

TIME_SCALE = 1000.0
"""Diffusion time runs over [0, 1]; sinusoidal embeddings are made for steps of about one."""


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """Each block attends to the context's tokens, ungated (PixArt, arXiv 2310.00426)."""

    pooled: bool = True
    """whether the context's mean modulates the blocks too, beside the time"""


@dataclass(frozen=True, kw_only=True)
class JointAttention:
    """Context and video tokens attend to all of both, each kind with weights of its own (MMDiT, arXiv 2403.03206)."""

    pooled: bool = True
    """whether the context's mean modulates the blocks too, beside the time"""


@dataclass(frozen=True, kw_only=True)
class PooledContext:
    """The context's mean modulates the blocks, and nothing else is seen of it (DiT, arXiv 2212.09748)."""

    pooled: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NoContext:
    """None: for class labels alone, or unconditional models."""

    pooled: ClassVar[bool] = False


Context = CrossAttention | JointAttention | PooledContext | NoContext


@dataclass(frozen=True, kw_only=True)
class ClassLabels:
    """A learned vector for each class modulates the blocks; one more, the last, stands for no class.

    Raises:
      UserError: no class.
    """

    classes: int

    def __post_init__(self):
        if self.classes < 1:
            raise UserError(f"class labels need 1 class or more, not {self.classes}")


@dataclass(frozen=True, kw_only=True)
class TimeEmbedding:
    """Which sines and cosines a denoiser sees of the diffusion time (0 = data, 1 = noise).

    Raises:
      UserError: a scale or a period that is not positive.
    """

    scale: float = TIME_SCALE
    """what the time is multiplied by"""
    period: float = 10_000.0
    """of the slowest one, about"""
    reversed: bool = False
    """whether the denoiser's own time runs from noise to data (SiT): it is told `1 - time`, and what it predicts, a
    velocity along its time, is negated"""

    def __post_init__(self):
        if not (self.scale > 0 and self.period > 0):
            raise UserError(f"a time embedding has a positive scale and period, not {self.scale} and {self.period}")

    def told(self, time: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """What sines and cosines are taken of."""
        return self.scale * (1 - time if self.reversed else time)


class Given(NamedTuple):
    """What a denoiser may be given besides its text, each None where its config doesn't ask for it."""

    token_time: Float[Array, "B N"] | None = None
    """a diffusion time for every token: 0 for what is known, such as a first frame"""
    latents: Float[Array, "B N g"] | None = None
    """clean latents and mask channels, patchified as the noisy tokens are"""
    labels: Int[Array, "B G"] | None = None
    """a class for each segment; the number of classes stands for none"""
    image: Float[Array, "B I F"] | None = None
    """an image encoder's tokens"""
    image_segments: Int[Array, "B I"] | None = None

    def check(self, *wanted: str) -> None:
        """Raises UserError where these are not what is given, and all that is given."""
        for name, value in self._asdict().items():
            if (value is not None) != (name in wanted):
                lacks = "needs" if name in wanted else "does not take"
                raise UserError(f"this denoiser {lacks} {name}; its config says what it is given")
