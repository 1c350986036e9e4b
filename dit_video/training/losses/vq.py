"""Loss of a vector-quantized autoencoder, with the updates of its codebook."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.rng import key
from dit_video.training.losses.autoencoder import AutoencoderLoss, DecodedClips, ScalarMetrics
from dit_video.training.losses.codebook import CodebookLearning
from dit_video.training.state import TrainState
from dit_video.training.step import GradientStep


@dataclass(frozen=True, kw_only=True)
class VqLoss(AutoencoderLoss):
    """Reconstruction loss plus the distance of the latents from their codes (arXiv 1711.00937, eq. 3).

    The objective's `kl` is not used.
    """

    learning: CodebookLearning = field(default_factory=CodebookLearning)
    """Update rule of the codebook. The codebook loss has weight 1 if the codes are learned by gradient."""

    def decode(self, params, pixels: Float[Array, "B T H W 3"], step: Array) -> DecodedClips:
        """Encode, quantize and decode clips."""
        model = nnx.merge(self.graph, self.freeze_untrained(params))
        quantized = model.quantize(pixels)
        cost = self.learning.commitment * quantized.commitment_loss
        if self.learning.decay is None:
            cost = cost + quantized.codebook_loss
        return DecodedClips(
            model.reconstruct(quantized.vectors),
            cost,
            {"commitment": quantized.commitment_loss.mean()},
            auxiliary=jax.lax.stop_gradient((quantized.latents, quantized.indices)),
        )

    @property
    def effective_learning(self) -> CodebookLearning:
        """Return the codebook update; codes that are not trained do not change, but their use is still measured."""
        if self.optimizer is None or self.optimizer.is_trained("codebook/codes"):
            return self.learning
        return replace(self.learning, decay=None, restart_after=None)


@dataclass(frozen=True, kw_only=True)
class VqStep(GradientStep):
    """A step of a vector-quantized autoencoder: the codebook learns from the batch's latents, too."""

    loss: VqLoss

    def init(self, params: dict[str, Any], *, is_fresh: bool = True) -> TrainState:
        moments = self.loss.effective_learning.init_moments(params["codebook"]["codes"], fresh=is_fresh)
        return replace(super().init(params), extra={"codebook": moments})

    def update_extra(self, state: TrainState, auxiliary: Any) -> tuple[TrainState, ScalarMetrics]:
        """Return the state with the codebook updated by the batch's latents and their codes, and metrics of its use."""
        (latents, indices), learning = auxiliary, self.loss.effective_learning
        # The gradient update has already incremented the step counter; the noise is that of the step itself.
        random_key = jax.random.fold_in(key(self.loss.seed, "codebook"), state.step - 1)
        codes, moments = state.params["codebook"]["codes"], state.extra["codebook"]
        update = learning.update(codes, moments, latents, indices, random_key)
        # Codes that are moving averages need no second average. A restarted code is not ema_codes with its old value.
        is_replaced = update.restarted[:, None] if learning.decay is None else True
        ema_codes = jnp.where(is_replaced, update.codes, state.ema["codebook"]["codes"])
        next_state = replace(
            state,
            params=state.params | {"codebook": {"codes": update.codes}},
            ema=state.ema | {"codebook": {"codes": ema_codes}},
            extra=state.extra | {"codebook": update.moments},
        )
        return next_state, update.metrics
