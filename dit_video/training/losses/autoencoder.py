"""The loss of a variational autoencoder."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dit_video.autoencoders import AutoencoderObjective
from dit_video.core.rng import key
from dit_video.training.optim.optimizer import OptimizerConfig, hold_still

Figures = dict[str, Float[Array, ""]]


class Decoded(NamedTuple):
    """What an autoencoder makes of clips in training."""

    pixels: Float[Array, "B T H W 3"]
    bottleneck: Float[Array, " B"]
    """what the latents cost"""
    figures: Figures
    seen: Any = None
    """what a step takes note of beside the gradients"""


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """What reconstructions differ by, and the divergence of the latents from a standard normal."""

    graph: nnx.GraphDef
    objective: AutoencoderObjective
    seed: int
    judge: nnx.GraphDef | None = None
    """of LPIPS, whose parameters every call is given"""
    optimizer: OptimizerConfig | None = None
    """the loss is constant in the parameters that it does not train"""

    def __call__(
        self, params, clips: UInt8[Array, "B T H W 3"], step: Array, judge: Any = None
    ) -> tuple[Float[Array, ""], Figures]:
        """The mean over the clips, and its parts.

        Args:
          judge: the parameters of LPIPS, where the objective has it.
        """
        value, (figures, _) = self.observed(params, clips, step, judge)
        return value, figures

    def observed(
        self, params, clips: UInt8[Array, "B T H W 3"], step: Array, judge: Any = None
    ) -> tuple[Float[Array, ""], tuple[Figures, Any]]:
        """The same, and what a step takes note of."""
        pixels = self.pixels(clips)
        decoded = self.decode(params, pixels, step)
        value, figures = self.compare(decoded.pixels, pixels, judge)
        return (value + decoded.bottleneck).mean(), (decoded.figures | figures, decoded.seen)

    @staticmethod
    def pixels(clips: UInt8[Array, "B T H W 3"]) -> Float[Array, "B T H W 3"]:
        """0..255 to [-1, 1]."""
        return clips.astype(jnp.float32) / 127.5 - 1

    def decode(self, params, pixels: Float[Array, "B T H W 3"], step: Array) -> Decoded:
        """Clips through the latents, which are drawn from their posterior."""
        model = nnx.merge(self.graph, self.held(params))
        posterior = model.posterior(pixels)
        random = jax.random.fold_in(key(self.seed, "latents"), step)
        latents = posterior.sample(jax.random.normal(random, posterior.mean.shape))
        kl = posterior.kl()
        return Decoded(model.reconstruct(latents), self.objective.kl * kl, {"kl": kl.mean()})

    def held(self, params):
        """The parameters, constant where they are not trained."""
        return params if self.optimizer is None else hold_still(self.optimizer, params)

    def compare(
        self, decoded: Float[Array, "B T H W 3"], pixels: Float[Array, "B T H W 3"], judge: Any = None
    ) -> tuple[Float[Array, " B"], Figures]:
        """What the objective says of each clip, and the means of its parts."""
        distance = None if self.judge is None else nnx.merge(self.judge, judge)
        value, parts = self.objective.compare(decoded, pixels, distance)
        mse = jnp.square(decoded - pixels).mean(axis=(1, 2, 3, 4)).mean()
        named = {name: part.mean() for name, part in parts.items() if name != "squared"}
        return value, {"mse": mse, "psnr": -10 * jnp.log10(mse / 4), **named}
