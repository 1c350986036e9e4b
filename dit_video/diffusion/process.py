"""From data to noise and back."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from dit_video.arrays import SameArray
from dit_video.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    r"""Straight paths between data and noise (arXiv 2209.03003; 2210.02747).

    $x_t = (1 - t)\,x_0 + t\,\epsilon$ for time $t$ from 0 (data) to 1 (noise); the model predicts the velocity
    $v = dx_t/dt = \epsilon - x_0$, so that $x_0 = x_t - t\,v$ and $\epsilon = x_t + (1 - t)\,v$.

    `shift` $s$ moves times towards noise, $t' = s t / (1 + (s - 1) t)$ (arXiv 2403.03206, eq. 23), in training and
    in sampling alike.

    Raises:
      UserError: a shift that is not positive.
    """

    shift: float = 1.0

    def __post_init__(self):
        if not self.shift > 0:
            raise UserError(f"shift {self.shift} must be positive; 1 leaves times as they are")

    def shifted(self, time: Float[SameArray, "*shape"]) -> Float[SameArray, "*shape"]:
        """$t'$ of the class docstring."""
        return self.shift * time / (1 + (self.shift - 1) * time)

    def alpha(self, time: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """How much of the data is in $x_t$."""
        return 1 - time

    def sigma(self, time: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """How much of the noise is in $x_t$."""
        return time

    def add_noise(
        self, data: Float[Array, "*shape"], noise: Float[Array, "*shape"], time: Float[Array, "*time"]
    ) -> Float[Array, "*shape"]:
        """$x_t$. `time` broadcasts against the data."""
        return self.alpha(time) * data + self.sigma(time) * noise

    def target(self, data: Float[Array, "*shape"], noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The velocity that the model is to predict."""
        return noise - data

    def to_data(
        self, noisy: Float[Array, "*shape"], velocity: Float[Array, "*shape"], time: Float[Array, "*time"]
    ) -> Float[Array, "*shape"]:
        """$x_0$ from a prediction."""
        return noisy - time * velocity

    def to_noise(
        self, noisy: Float[Array, "*shape"], velocity: Float[Array, "*shape"], time: Float[Array, "*time"]
    ) -> Float[Array, "*shape"]:
        r"""$\epsilon$ from a prediction."""
        return noisy + (1 - time) * velocity
