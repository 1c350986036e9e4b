"""The loss of an autoencoder whose latents are codes, and how its codebook follows the latents."""

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
    """What reconstructions differ by, and how far the latents are from their codes (arXiv 1711.00937, eq. 3).

    The objective's `kl` has no meaning here.
    """

    learning: CodebookLearning = field(default_factory=CodebookLearning)
    """where its codes are learned by gradient, the distance that draws them to the latents has weight 1"""

    def decode(self, params, pixels: Float[Array, "B T H W 3"], step: Array) -> Decoded:
        """Clips through their codes."""
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
        """What is kept of the codebook from step to step."""
        return {"codebook": self._followed.start(params["codebook"]["codes"], fresh=fresh)}

    def after(self, state: TrainState, seen: Any) -> tuple[TrainState, Figures]:
        """The state with the codebook that follows the latents `seen`, and how well it is used."""
        latents, indices = seen
        # As in the step that made the state: its count is one more now.
        random = jax.random.fold_in(key(self.seed, "codebook"), state.step - 1)
        moments = state.extra["codebook"]
        learned = self._followed.follow(state.params["codebook"]["codes"], moments, latents, indices, random)
        # Codes that are averages need no average of their own, and that of two places of a code is no code.
        own = learned.restarted[:, None] if self._followed.decay is None else True
        averaged = jnp.where(own, learned.codes, state.ema["codebook"]["codes"])
        return (
            replace(
                state,
                params=state.params | {"codebook": {"codes": learned.codes}},
                ema=state.ema | {"codebook": {"codes": averaged}},
                extra=state.extra | {"codebook": learned.moments},
            ),
            learned.figures,
        )

    @property
    def _followed(self) -> CodebookLearning:
        """Codes that are not trained stay where they are, and how they are used is still told."""
        if self.optimizer is None or self.optimizer.trains("codebook/codes"):
            return self.learning
        return replace(self.learning, decay=None, restart_after=None)
