"""The loss of an autoencoder, and its training step."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree, UInt8

from dit_video.core.rng import key
from dit_video.models.autoencoders import AutoencoderObjective, DecodedClips, LatentLoss, LearnedArrays
from dit_video.models.autoencoders.latent_loss import ScalarMetrics
from dit_video.training.optim.optimizer import OptimizerConfig, freeze
from dit_video.training.state import TrainState
from dit_video.training.step import GradientStep, LossDetails, LossOutput


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """The comparison of decoded clips with the original ones, plus the loss of the latents."""

    graph: nnx.GraphDef
    objective: AutoencoderObjective
    latents: LatentLoss
    """Loss of the latents, which also encodes and decodes the clips; from `AutoencoderConfig.make_loss`."""
    seed: int
    perceptual_net: nnx.GraphDef | None = None
    """Graph of the LPIPS network, whose parameters are an argument of each call; None if LPIPS is not used."""
    optimizer: OptimizerConfig | None = None
    """Optimizer whose untrained parameters get no gradients; None if all parameters are trained."""

    def __call__(
        self, params, clips: UInt8[Array, "B T H W 3"], step: Array, perceptual_params: Any = None
    ) -> LossOutput:
        """Return the mean loss over the clips, its terms as metrics, and the auxiliary output of `decode`.

        Args:
          params: Parameters of the autoencoder.
          clips: Batch of clips.
          step: Training step, from which random numbers are derived.
          perceptual_params: Parameters of LPIPS if the objective uses it.
        """
        pixels = self.to_pixels(clips)
        decoded = self.decode(params, pixels, step)
        value, metrics = self.compare(decoded.pixels, pixels, perceptual_params)
        metrics = decoded.metrics | metrics
        details = LossDetails(metrics, auxiliary=decoded.auxiliary)
        return LossOutput((value + decoded.bottleneck).mean(), details)

    @staticmethod
    def to_pixels(clips: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
        """Map uint8 values 0..255 to [-1, 1]."""
        return clips.astype(jnp.float32) / 127.5 - 1

    def decode(self, params, pixels: Float[Array, "B T H W 3"], step: Array) -> DecodedClips:
        """Encode and decode clips, with gradients stopped at parameters that are not trained."""
        model = nnx.merge(self.graph, params if self.optimizer is None else freeze(self.optimizer, params))
        return self.latents.decode(model, pixels, jax.random.fold_in(key(self.seed, "latents"), step))

    def compare(
        self, decoded: Float[Array, "B T H W 3"], pixels: Float[Array, "B T H W 3"], perceptual_params: Any = None
    ) -> tuple[Float[Array, " B"], ScalarMetrics]:
        """Return the objective of each clip, and the means of its terms as metrics."""
        perceptual_distance = None if self.perceptual_net is None else nnx.merge(self.perceptual_net, perceptual_params)
        value, terms = self.objective.compare(decoded, pixels, perceptual_distance)
        mse = jnp.square(decoded - pixels).mean(axis=(1, 2, 3, 4)).mean()
        term_means = {name: term.mean() for name, term in terms.items() if name != "squared"}
        return value, {"mse": mse, "psnr": -10 * jnp.log10(mse / 4), **term_means}


@dataclass(frozen=True, kw_only=True)
class AutoencoderStep(GradientStep):
    """A step of an autoencoder: along the gradient, then what the loss of the latents updates without gradients."""

    loss: AutoencoderLoss

    def init(self, params: dict[str, Any], *, is_fresh: bool = True) -> TrainState:
        return replace(super().init(params), extra=self.loss.latents.init_extra(params, is_fresh=is_fresh))

    def update_extra(self, state: TrainState, auxiliary: PyTree) -> tuple[TrainState, ScalarMetrics]:
        # The gradient update has already incremented the step counter; the noise is the step's own.
        random_key = jax.random.fold_in(key(self.loss.seed, "codebook"), state.step - 1)
        arrays = LearnedArrays(state.params, state.ema, state.extra)
        arrays, metrics = self.loss.latents.update(arrays, auxiliary, random_key)
        return replace(state, **arrays._asdict()), metrics
