"""What an autoencoder's training minimises, as a weighted sum."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from dit_video.autoencoders import losses
from dit_video.autoencoders.adversarial import Adversarial
from dit_video.core.errors import UserError

Judge = Callable[[Float[Array, "B T H W 3"], Float[Array, "B T H W 3"]], Float[Array, " B"]]
"""A distance between decoded and original clips that a network measures."""

_OF_ERROR = {
    "squared": losses.squared,
    "logarithmic": losses.logarithmic,
    "absolute": losses.absolute,
    "charbonnier": losses.charbonnier,
    "pyramid": losses.pyramid,
    "frequency": losses.frequency,
    "temporal": losses.temporal,
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderObjective:
    """Weights of the parts of the loss; a part of weight 0 isn't computed.

    By default the absolute error with three measures that need no weights of another network: where an error lies
    (`pyramid`: edges and areas count, not single pixels alone), in which frequencies (`frequency`), and whether it
    flickers (`temporal`). See `dit_video.autoencoders.losses` for the equations.

    Raises:
      UserError: negative weights, nothing that is compared, or LPIPS without its weights.
    """

    squared: float = 0.0
    logarithmic: float = 0.0
    """of the error's logarithm, clip by clip: what mean PSNR rewards"""
    absolute: float = 1.0
    charbonnier: float = 0.0
    pyramid: float = 0.5
    frequency: float = 1.0
    temporal: float = 0.5
    lpips: float = 0.0
    """of the learned distance of arXiv 1801.03924; 0.5 is usual"""
    lpips_weights: str | None = None
    """the file of its weights; see `dit_video.weights.load_lpips` for how it is made"""
    kl: float = 1e-6
    """of the latents' divergence from a standard normal, in nats a latent position"""
    adversarial: Adversarial | None = None
    """the discriminator that the autoencoder is trained against, if any"""

    def __post_init__(self):
        parts = (*_OF_ERROR, "lpips")
        for name in (*parts, "kl"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} {getattr(self, name)} must not be negative")
        if not any(getattr(self, name) for name in parts):
            raise UserError(f"an autoencoder's loss compares nothing; give one of {', '.join(parts)} a weight")
        if (self.lpips > 0) != (self.lpips_weights is not None):
            raise UserError(
                f"lpips={self.lpips} with lpips_weights={self.lpips_weights}; give both, or neither: the file is made "
                "as dit_video.weights.load_lpips says"
            )

    @classmethod
    def pixels(cls, *, kl: float = 1e-4) -> "AutoencoderObjective":
        """Squared error and a tenth of the absolute one: the quickest, and what PSNR rewards."""
        return cls(squared=1.0, absolute=0.1, pyramid=0.0, frequency=0.0, temporal=0.0, kl=kl)

    def compare(
        self, decoded: Float[Array, "B T H W 3"], original: Float[Array, "B T H W 3"], judge: Judge | None = None
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        """The weighted sum of what is compared, and its parts.

        Args:
          decoded: pixels in [-1, 1], or about.
          original: pixels in [-1, 1].
          judge: LPIPS, where it has a weight.
        """
        error = decoded - original
        parts = {name: measure(error) for name, measure in _OF_ERROR.items() if getattr(self, name)}
        if self.lpips:
            if judge is None:
                raise ValueError("lpips has a weight, and no judge is given")
            parts["lpips"] = judge(decoded, original)
        weighted = [getattr(self, name) * value for name, value in parts.items()]
        return functools.reduce(operator.add, weighted), parts
