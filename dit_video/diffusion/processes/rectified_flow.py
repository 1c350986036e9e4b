"""Rectified flow with an optional shift towards noise."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from dit_video.core.errors import UserError
from dit_video.core.typing import SameArray
from dit_video.diffusion.processes.process import Estimate, FlowCoordinates, Process, Times, Values
from dit_video.diffusion.shift import ClipSize, ExponentialShift, LinearShift


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Process):
    r"""Straight paths between data and noise (arXiv 2209.03003; 2210.02747).

    $x_t = (1 - t)\,x_0 + t\,\epsilon$ for time $t$ from 0 (data) to 1 (noise). The velocity is
    $v = dx_t/dt = \epsilon - x_0$, so that $x_0 = x_t - t\,v$ and $\epsilon = x_t + (1 - t)\,v$.

    The `shift` $s$ moves times towards noise, $t' = s t / (1 + (s - 1) t)$ (arXiv 2403.03206, eq. 23), both in training
    and in sampling.

    Raises:
      UserError: If the shift is not positive.
    """

    shift: float = 1.0
    size_shift: LinearShift | ExponentialShift | None = None
    """Factor of the shift that depends on the size of a clip; each clip then has times of its own."""

    def __post_init__(self):
        if not self.shift > 0:
            raise UserError(f"shift={self.shift} is invalid: it must be positive. Use 1 for unshifted times.")

    def shift_time(self, time: Float[SameArray, "*shape"], size: ClipSize | None = None) -> Float[SameArray, "*shape"]:
        """Return $t'$ of the class docstring.

        Raises:
          UserError: If the shift depends on the size and none is passed.
        """
        shift: Any = self.shift
        if self.size_shift is not None:
            if size is None:
                raise UserError("size=None is invalid: the shift depends on a clip's size. Use specialize(size).")
            shift = shift * self.size_shift(size)
        return shift * time / (1 + (shift - 1) * time)

    def specialize(self, size: ClipSize) -> "RectifiedFlow":
        if self.size_shift is None:
            return self
        return RectifiedFlow(shift=float(self.shift * self.size_shift(size)))

    def alpha(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return 1 - time

    def sigma(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return time

    def ratio_to_time(self, ratio: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        return ratio / (1 + ratio)

    def velocity(self, estimate: Estimate, time: Times) -> Values:
        return estimate.noise - estimate.data

    def flow_coordinates(self, time: Times) -> FlowCoordinates:
        """Return the flow itself: dividing by alpha, as other processes do, would divide by 0 at pure noise."""
        return FlowCoordinates(jnp.ones_like(time), time)

    def flow_slope(self, estimate: Estimate) -> Values:
        return estimate.noise - estimate.data
