"""Loss of a vector-quantized autoencoder, with the updates of its codebook."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.rng import key
from dit_video.training.losses.autoencoder import AutoencoderLoss, Decoded, Figures
from dit_video.training.losses.codebook import CodebookLearning
from dit_video.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class VqLoss(AutoencoderLoss):
    """Reconstruction loss plus the distance of the latents from their codes (arXiv 1711.00937, eq. 3).

    The objective's `kl` is not used.
    """

    learning: CodebookLearning = field(default_factory=CodebookLearning)
    """Update rule of the codebook. The codebook loss has weight 1 if the codes are learned by gradient."""

    def decode(self, params, pixels: Float[Array, "B T H W 3"], step: Array) -> Decoded:
        """Encode, quantize and decode clips."""
        model = nnx.merge(self.graph, self.held(params))
        quantized = model.quantized(pixels)
        cost = self.learning.commitment * quantized.commitment
        if self.learning.decay is None:
            cost = cost + quantized.attraction
        return Decoded(
            model.reconstruct(quantized.vectors),
            cost,
            {"commitment": quantized.commitment.mean()},
            seen=jax.lax.stop_gradient((quantized.latents, quantized.indices)),
        )

    def start(self, params: dict[str, Any], *, fresh: bool = True) -> dict[str, Any]:
        """Return the initial state of the codebook update."""
        return {"codebook": self._followed.start(params["codebook"]["codes"], fresh=fresh)}

    def after(self, state: TrainState, seen: Any) -> tuple[TrainState, Figures]:
        """Return the state with the codebook updated by the latents `seen`, and metrics of its use."""
        latents, indices = seen
        # The gradient update has already incremented the step counter; the noise is that of the step itself.
        random_key = jax.random.fold_in(key(self.seed, "codebook"), state.step - 1)
        moments = state.extra["codebook"]
        update = self._followed.follow(state.params["codebook"]["codes"], moments, latents, indices, random_key)
        # Codes that are moving averages need no second average. A restarted code is not ema_codes with its old value.
        is_replaced = update.restarted[:, None] if self._followed.decay is None else True
        ema_codes = jnp.where(is_replaced, update.codes, state.ema["codebook"]["codes"])
        return (
            replace(
                state,
                params=state.params | {"codebook": {"codes": update.codes}},
                ema=state.ema | {"codebook": {"codes": ema_codes}},
                extra=state.extra | {"codebook": update.moments},
            ),
            update.figures,
        )

    @property
    def _followed(self) -> CodebookLearning:
        """Return the codebook update; codes that are not trained do not change, but their use is still measured."""
        if self.optimizer is None or self.optimizer.trains("codebook/codes"):
            return self.learning
        return replace(self.learning, decay=None, restart_after=None)
