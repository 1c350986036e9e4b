"""The shift of rectified flow towards noise, as a function of a clip's size.

The more values show the same content, the more noise is needed to hide it (arXiv 2301.11093; 2403.03206, section
5.3.2).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Array, Num

from dit_video.core.errors import UserError

Number = int | float | Num[Array, "*shape"]


class ClipSize(NamedTuple):
    """The size of one clip or, as arrays, of several."""

    frames: Number
    """Number of latent frames."""
    frame_tokens: Number
    """Number of tokens of a latent frame."""


class SizeShift(ABC):
    """A factor of the shift that depends on a clip's size."""

    @abstractmethod
    def __call__(self, size: ClipSize) -> Number:
        """Return the factor for clips of a size."""


@dataclass(frozen=True, kw_only=True)
class LinearShift(SizeShift):
    """A factor linear in the tokens of a frame, times a power of the number of frames: Open-Sora's (arXiv 2503.09642).

    With `per="clip"` it is linear in the whole clip's tokens: `time_shift_type="linear"` of diffusers.

    Raises:
      UserError: If `tokens` are not positive and rising, `shifts` fall, or the shift is not positive at every size.
    """

    tokens: tuple[int, int] = (256, 4096)
    """Numbers of tokens of two frames."""
    shifts: tuple[float, float] = (1.0, 3.0)
    """Factors for single frames of these sizes."""
    exponent: float = 0.5
    """Exponent of the number of frames, for `per="frame"`."""
    per: Literal["frame", "clip"] = "frame"
    """Unit whose tokens are counted: the frame or the clip."""

    def __post_init__(self):
        _check_tokens(self.tokens)
        is_positive = min(self.shifts) > 0 and _interpolate(1, self.tokens, self.shifts) > 0
        if not is_positive or self.shifts[0] > self.shifts[1]:
            raise UserError(
                f"shifts={self.shifts}, tokens={self.tokens} is invalid: shifts must rise and be positive at 1 token "
                "too. Use shifts that rise more slowly."
            )

    def __call__(self, size: ClipSize) -> Number:
        if self.per == "clip":
            return _interpolate(size.frames * size.frame_tokens, self.tokens, self.shifts)
        return _interpolate(size.frame_tokens, self.tokens, self.shifts) * size.frames**self.exponent


@dataclass(frozen=True, kw_only=True)
class ExponentialShift(SizeShift):
    r"""A factor $e^\mu$ with $\mu$ linear in the whole clip's tokens: LTX-Video's (arXiv 2501.00103).

    Flux uses 0.5 for 256 and 1.15 for 4096 tokens.

    Raises:
      UserError: If `tokens` are not positive and rising.
    """

    tokens: tuple[int, int] = (1024, 4096)
    """Numbers of tokens of two clips."""
    mu: tuple[float, float] = (0.95, 2.05)
    """Logarithms of their shifts."""

    def __post_init__(self):
        _check_tokens(self.tokens)

    def __call__(self, size: ClipSize) -> Number:
        return math.e ** _interpolate(size.frames * size.frame_tokens, self.tokens, self.mu)


def _check_tokens(tokens: tuple[int, int]) -> None:
    if not 0 < tokens[0] < tokens[1]:
        raise UserError(f"tokens={tokens} is invalid: use two positive numbers of tokens, the smaller first.")


def _interpolate(x: Number, points: tuple[int, int], values: tuple[float, float]) -> Number:
    """Return the value at `x` of the line through two points."""
    return values[0] + (values[1] - values[0]) / (points[1] - points[0]) * (x - points[0])
