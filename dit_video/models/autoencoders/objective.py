"""The loss that an autoencoder is trained with, as a weighted sum."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.autoencoders import losses
from dit_video.models.autoencoders.adversarial import AdversarialConfig
from dit_video.models.autoencoders.interface import Pixels

PerceptualNet = Callable[[Pixels, Pixels], Float[Array, " B"]]
"""Distance between decoded and original clips measured by a network, such as LPIPS."""

_ERROR_LOSSES = {
    "squared": losses.squared_error,
    "logarithmic": losses.log_squared_error,
    "absolute": losses.absolute_error,
    "charbonnier": losses.charbonnier_loss,
    "pyramid": losses.pyramid_loss,
    "frequency": losses.frequency_loss,
    "temporal": losses.temporal_loss,
}


@dataclass(frozen=True, kw_only=True)
class AutoencoderObjective:
    """Weights of the terms of the loss; a term of weight 0 is not computed.

    The default is the absolute error with three terms that need no weights of another network: where errors are
    (`pyramid`: edges and areas count, not only single pixels), at which frequencies (`frequency`), and whether they
    flicker (`temporal`). See `dit_video.models.autoencoders.losses` for the equations.

    Raises:
      UserError: negative weights, no term that compares pixels, or LPIPS without its weights.
    """

    squared: float = 0.0
    """Weight of the squared error."""
    logarithmic: float = 0.0
    """Weight of the logarithm of each clip's squared error, which mean PSNR rewards."""
    absolute: float = 1.0
    """Weight of the absolute error."""
    charbonnier: float = 0.0
    """Weight of the Charbonnier loss."""
    pyramid: float = 0.5
    """Weight of the Laplacian pyramid loss."""
    frequency: float = 1.0
    """Weight of the focal frequency loss."""
    temporal: float = 0.5
    """Weight of the error of frame differences."""
    lpips: float = 0.0
    """Weight of LPIPS, the learned distance of arXiv 1801.03924; 0.5 is common."""
    lpips_weights: str | None = None
    """File of LPIPS' weights; `dit_video.weights.load_lpips` says how to make it."""
    kl: float = 1e-6
    """Weight of the latents' divergence from a standard normal, in nats per latent position."""
    adversarial: AdversarialConfig | None = None
    """Discriminator that the autoencoder is trained against, if any."""

    def __post_init__(self):
        parts = (*_ERROR_LOSSES, "lpips")
        check_at_least(0, **{name: getattr(self, name) for name in (*parts, "kl")})
        if not any(getattr(self, name) for name in parts):
            raise UserError(f"the autoencoder's loss compares no pixels; give one of {', '.join(parts)} a weight")
        if (self.lpips > 0) != (self.lpips_weights is not None):
            raise UserError(
                f"lpips={self.lpips}, lpips_weights={self.lpips_weights} is invalid: use both or neither; "
                "dit_video.weights.load_lpips says how to make the file"
            )

    @classmethod
    def pixels(cls, *, kl: float = 1e-4) -> "AutoencoderObjective":
        """Return the squared error plus a tenth of the absolute one: the fastest loss, and good for PSNR."""
        return cls(squared=1.0, absolute=0.1, pyramid=0.0, frequency=0.0, temporal=0.0, kl=kl)

    def compare(
        self, decoded: Pixels, original: Pixels, perceptual_net: PerceptualNet | None = None
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        """Return the weighted sum of the reconstruction terms, and the terms by name.

        Args:
          decoded: pixels, approximately in [-1, 1].
          original: pixels in [-1, 1].
          perceptual_net: LPIPS, required if it has a weight.
        """
        error = decoded - original
        parts = {name: measure(error) for name, measure in _ERROR_LOSSES.items() if getattr(self, name)}
        if self.lpips:
            if perceptual_net is None:
                raise ValueError(f"lpips={self.lpips} needs a network; pass perceptual_net")
            parts["lpips"] = perceptual_net(decoded, original)
        weighted = [getattr(self, name) * value for name, value in parts.items()]
        return functools.reduce(operator.add, weighted), parts
