"""Loss of a vector-quantized autoencoder, with the updates of its codebook."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.rng import key
from dit_video.training.losses.autoencoder import AutoencoderLoss, DecodedClips, ScalarMetrics
from dit_video.training.state import TrainState
from dit_video.training.step import GradientStep


class CodebookUpdate(NamedTuple):
    """Result of one codebook update."""

    codes: Float[Array, "n c"]
    restarted: Bool[Array, " n"]
    """True for codes that were restarted."""
    moments: dict[str, Array]
    """State of the update, for the next step."""
    metrics: dict[str, Float[Array, ""]]


@dataclass(frozen=True, kw_only=True)
class CodebookLearning:
    """Configuration of the codebook update.

    Raises:
      UserError: If a value is out of range.
    """

    decay: float | None = 0.99
    """Decay of the moving averages that are the codes; None learns the codes by gradient."""
    smoothing: float = 1e-5
    """Constant `s` of the Laplace smoothing."""
    restart_after: int | None = 100
    """Number of steps without use after which a code is restarted; None disables restarts."""
    commitment: float = 0.25
    """Weight of the commitment loss, the mean squared distance that pulls the latents to their codes."""

    def __post_init__(self):
        if self.decay is not None and not 0 <= self.decay < 1:
            raise UserError(f"decay={self.decay} is invalid: it must lie in [0, 1). Use None to learn by gradient.")
        check_at_least(0, commitment=self.commitment)
        check_at_least(1, restart_after=self.restart_after)
        if not self.smoothing > 0:
            raise UserError(f"smoothing={self.smoothing} is invalid: it must be positive.")

    def init_moments(self, codes: Float[Array, "n c"], *, fresh: bool = True) -> dict[str, Array]:
        """Return the initial state of the update.

        Codes of a fresh codebook count as long unused, so that those that the first batch does not use are restarted
        from its latents. Codes of a trained codebook count as just used.
        """
        moments = {"ages": jnp.full(len(codes), (self.restart_after or 0) if fresh else 0, jnp.int32)}
        if self.decay is not None:
            moments |= {"counts": jnp.ones(len(codes), jnp.float32), "sums": jnp.array(codes, jnp.float32)}
        return moments

    def update(
        self,
        codes: Float[Array, "n c"],
        moments: dict[str, Array],
        latents: Float[Array, "B t h w c"],
        indices: Int[Array, "B t h w"],
        random_key: Key[Array, ""],
    ) -> CodebookUpdate:
        """Return the codebook updated by a batch of latents.

        The metrics are `usage`, the share of the codes that the batch used; `usage_recent`, the share that the last
        `restart_after` steps used; `perplexity`, `exp(-sum p log p)` of the shares `p` of the batch's latents, which is
        the effective number of codes; `restarts`, the number of restarted codes.

        Args:
          codes: Codes after the gradient update, which changes them only if `decay` is None.
          moments: State from `init_moments` or from the previous step.
          latents: Latents before quantization.
          indices: Index of the code nearest to each latent.
          random_key: Random key for the choice of the latents that replace unused codes.
        """
        flat_latents, flat_indices = latents.reshape(-1, latents.shape[-1]), indices.reshape(-1)
        counts = jnp.zeros(len(codes), jnp.float32).at[flat_indices].add(1.0)
        moments = dict(moments)
        if self.decay is not None:
            sums = jnp.zeros_like(codes).at[flat_indices].add(flat_latents)
            codes, averages = self._update_averages(self.decay, counts, sums, moments)
            moments |= averages
        ages = jnp.where(counts > 0, 0, moments["ages"] + 1)
        share = counts / counts.sum()
        entropy = -jnp.where(counts > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0).sum()
        metrics = {"usage": (counts > 0).mean(dtype=jnp.float32), "perplexity": jnp.exp(entropy)}
        dead = jnp.zeros(len(codes), bool)
        if self.restart_after is not None:
            dead = ages >= self.restart_after
            metrics |= {"usage_recent": 1 - dead.mean(dtype=jnp.float32), "restarts": dead.sum(dtype=jnp.float32)}
            # Each dead code gets a different latent if the batch has enough of them.
            count = len(flat_latents)
            sources = jax.random.choice(random_key, count, (len(codes),), replace=count < len(codes))
            codes = jnp.where(dead[:, None], flat_latents[sources], codes)
            ages = jnp.where(dead, 0, ages)
            if self.decay is not None:
                moments["counts"] = jnp.where(dead, 1.0, moments["counts"])
                moments["sums"] = jnp.where(dead[:, None], codes, moments["sums"])
        return CodebookUpdate(codes, dead, moments | {"ages": ages}, metrics)

    def _update_averages(
        self, decay: float, batch_counts: Float[Array, " n"], batch_sums: Float[Array, "n c"], moments: dict[str, Array]
    ) -> tuple[Float[Array, "n c"], dict[str, Array]]:
        """Return the codes and the moving averages that they are computed from."""
        counts = decay * moments["counts"] + (1 - decay) * batch_counts
        sums = decay * moments["sums"] + (1 - decay) * batch_sums
        total = counts.sum()
        smoothed = (counts + self.smoothing) / (total + len(counts) * self.smoothing) * total
        return sums / smoothed[:, None], {"counts": counts, "sums": sums}


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
        # The gradient update has already incremented the step counter; the noise is the step's own.
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
