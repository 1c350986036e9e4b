"""How far rectified flow is shifted towards noise for clips of each size.

The more values show the same thing, the more noise it takes to hide it (arXiv 2301.11093; 2403.03206, section 5.3.2).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Num

from dit_video.core.errors import UserError

Number = int | float | Num[Array, "*shape"]


class ClipSize(NamedTuple):
    """Of one clip or, as arrays, of several."""

    frames: Number
    """of the latents"""
    frame_tokens: Number
    """of one such frame"""


class SizeShift(ABC):
    """What a shift is multiplied by."""

    @abstractmethod
    def __call__(self, size: ClipSize) -> Number:
        """For clips of a size."""


@dataclass(frozen=True, kw_only=True)
class LinearShift(SizeShift):
    """Linear in the tokens of a frame, times a power of the number of frames: Open-Sora's (arXiv 2503.09642).

    Raises:
      UserError: sizes that do not rise, or a shift that is not positive at every size.
    """

    tokens: tuple[int, int] = (256, 4096)
    """of two frames"""
    shifts: tuple[float, float] = (1.0, 3.0)
    """of single frames of these sizes"""
    exponent: float = 0.5
    """of the number of frames"""

    def __post_init__(self):
        _check(self.tokens)
        if not (min(self.shifts) > 0 and _line(1, self.tokens, self.shifts) > 0 and self.shifts[0] <= self.shifts[1]):
            raise UserError(
                f"the shifts {self.shifts} of {self.tokens} tokens must rise and be positive at 1 token too; let them "
                "rise more slowly"
            )

    def __call__(self, size: ClipSize) -> Number:
        return _line(size.frame_tokens, self.tokens, self.shifts) * size.frames**self.exponent


@dataclass(frozen=True, kw_only=True)
class ExponentialShift(SizeShift):
    r"""$e^\mu$, with $\mu$ linear in the tokens of the whole clip: LTX-Video's (arXiv 2501.00103).

    Flux has .5 for 256 and 1.15 for 4096 tokens.

    Raises:
      UserError: sizes that do not rise.
    """

    tokens: tuple[int, int] = (1024, 4096)
    """of two clips"""
    mu: tuple[float, float] = (0.95, 2.05)
    """the logarithms of their shifts"""

    def __post_init__(self):
        _check(self.tokens)

    def __call__(self, size: ClipSize) -> Number:
        return math.e ** _line(size.frames * size.frame_tokens, self.tokens, self.mu)


def _check(tokens: tuple[int, int]) -> None:
    if not 0 < tokens[0] < tokens[1]:
        raise UserError(f"a shift is given for two numbers of tokens, the smaller first, not {tokens}")


def _line(at: Number, places: tuple[int, int], values: tuple[float, float]) -> Number:
    """Through two points."""
    return values[0] + (values[1] - values[0]) / (places[1] - places[0]) * (at - places[0])
