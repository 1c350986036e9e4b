"""A causal spatiotemporal autoencoder that works on whole patches.

The first frame is repeated so that it fills a patch of its own (as Cosmos-Tokenizer does, arXiv 2501.03575, section
4.1); every patch of `stride` pixels is projected to `width` channels, and causal residual blocks mix the patches at
latent resolution. A linear path beside the network can start at the principal components of the data, so that training
starts where the best linear autoencoder ends.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.autoencoders.blocks import Places, alone, placed
from dit_video.autoencoders.linear import LinearAutoencoder
from dit_video.autoencoders.patches import from_patches, to_patches
from dit_video.autoencoders.posterior import Normalizer, Posterior, Vae
from dit_video.core.errors import UserError
from dit_video.nn import CausalConv, Linear, Memory, RmsNorm
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class PatchVaeConfig:
    """A causal VAE on patches.

    Raises:
      UserError: a size below 1.
    """

    stride: Grid = Grid(4, 8, 8)
    channels: int = 16
    width: int = 96
    blocks: int = 3
    """residual blocks in the encoder, and as many in the decoder"""
    preactivated: bool = False
    """Whether blocks are convolutions alone, each after its activation (arXiv 1603.05027), and what the network adds to
    its linear path starts small. Steps are then a fifth cheaper, and each gains more: the choice for training in
    minutes from principal components."""
    start_std: float = 0.05
    """Standard deviation of the latents' noise at the start: what the decoder can't see through doesn't get better. In
    the units of all latents' root mean square, of which the finest have less than a tenth."""
    bfloat16: bool = False
    """whether convolutions are bfloat16, with products summed in float32; parameters, the features that they add to,
    norms, linear maps and latents stay float32"""

    def __post_init__(self):
        if min(*self.stride, self.channels, self.width) < 1 or self.blocks < 0:
            raise UserError(
                f"stride {tuple(self.stride)}, channels {self.channels} and width {self.width} must be at least 1, and "
                f"blocks {self.blocks} not negative"
            )
        if not 0.0025 <= self.start_std <= 2.7:
            raise UserError(
                f"start_std {self.start_std} is outside of the posterior's standard deviations, 0.0025 to 2.7"
            )

    @property
    def dtype(self) -> jnp.dtype:
        """What convolutions are computed in."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)

    @property
    def last_layer(self) -> str:
        return "decoder_out/kernel"

    def make(self, rngs: nnx.Rngs) -> "PatchVae":
        return PatchVae(self, rngs=rngs)


class PatchVae(Vae):
    """Pixels in [-1, 1] to normalised latents and back."""

    def __init__(self, config: PatchVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, channels, values = config.width, config.channels, config.stride.volume * 3
        self.linear = _LinearPath(values, channels, rngs=rngs)
        self.normalizer = Normalizer(channels)
        self.encoder_in = Linear(values, width, rngs=rngs)
        block = _PreactivatedBlock if config.preactivated else _Block
        self.gains = _PREACTIVATED_GAINS if config.preactivated else _Gains()
        self.encoder = nnx.List([block(width, dtype=config.dtype, rngs=rngs) for _ in range(config.blocks)])
        self.encoder_out = Linear(width, 2 * channels, init="zero", rngs=rngs)
        self.decoder_in = Linear(channels, width, rngs=rngs)
        self.decoder = nnx.List([block(width, dtype=config.dtype, rngs=rngs) for _ in range(config.blocks)])
        self.decoder_out = Linear(width, values, init="zero", rngs=rngs)

    def posterior(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Int[Array, "B h w"] | Bool[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Posterior:
        """The distribution of latents, before normalisation. See `encode` for the arguments."""
        places = placed(pixels, self.config.stride, inside, memory)
        patches = to_patches(pixels, self.config.stride, begins=memory is None or memory.begins)
        x = self.encoder_in(patches)
        for block in self.encoder:
            x = block(x, memory, places)
        mean, log_variance = jnp.split(self.gains.latents * self.encoder_out(x), 2, axis=-1)
        start = 2 * math.log(self.config.start_std)
        return Posterior(self.linear.encode(patches) + mean, jnp.clip(log_variance + start, -12.0, 2.0))

    def reconstruct(
        self, latents: Float[Array, "B t h w c"], memory: Memory | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Pixels from latents that are not normalised."""
        x = self.decoder_in(latents)
        for block in self.decoder:
            x = block(x, memory)
        patches = self.linear.decode(latents) + self.gains.patches * self.decoder_out(x)
        return from_patches(patches, self.config.stride, begins=memory is None or memory.begins)


class _Gains(NamedTuple):
    """What the network's outputs are multiplied by before they are added to the linear path's."""

    latents: float = 1.0
    patches: float = 1.0


# What the principal components leave is a tenth of the pixels: a step of Adam or Muon should change as little.
_PREACTIVATED_GAINS = _Gains(latents=0.3, patches=0.1)


class _LinearPath(nnx.Module):
    """An affine map from patches to latents and one back; see `start_from_linear`."""

    def __init__(self, values: int, channels: int, *, rngs: nnx.Rngs):
        self.down, self.up = Linear(values, channels, rngs=rngs), Linear(channels, values, rngs=rngs)

    def encode(self, patches: Float[Array, "B t h w p"]) -> Float[Array, "B t h w c"]:
        return self.down(patches)

    def decode(self, latents: Float[Array, "B t h w c"]) -> Float[Array, "B t h w p"]:
        return self.up(latents)


def start_from_linear(params: dict[str, Any], linear: LinearAutoencoder) -> dict[str, Any]:
    """Parameters of a `PatchVae` whose linear path is `linear`, scaled so that latents have about unit variance.

    With the other weights as initialised (the network's output is zero) the autoencoder then equals `linear`.
    """
    scale = linear.scale
    return params | {
        "linear": {
            "down": {"kernel": linear.basis / scale, "bias": -linear.mean @ linear.basis / scale},
            "up": {"kernel": linear.basis.T * scale, "bias": linear.mean},
        }
    }


class _Block(nnx.Module):
    """Space, then time: two causal convolutions, each residual."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm_space, self.norm_time = RmsNorm(width), RmsNorm(width)
        self.space = CausalConv(width, width, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.mix = Linear(width, width, init="zero", rngs=rngs)
        self.time = CausalConv(width, width, (3, 1, 1), dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, init="zero", rngs=rngs)

    def __call__(
        self, x: Float[Array, "B t h w D"], memory: Memory | None = None, places: Places | None = None
    ) -> Float[Array, "B t h w D"]:
        x = x + self.mix(jax.nn.silu(self.space(alone(self.norm_space(x), places))))
        return x + self.out(jax.nn.silu(self.time(self.norm_time(x), memory)))


class _PreactivatedBlock(nnx.Module):
    """Space, then time: two activations, each followed by a causal convolution, each residual."""

    gain = 0.3
    """of a convolution, so that a fresh stack of blocks is close to the identity"""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = RmsNorm(width)
        self.space = CausalConv(width, width, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.time = CausalConv(width, width, (3, 1, 1), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B t h w D"], memory: Memory | None = None, places: Places | None = None
    ) -> Float[Array, "B t h w D"]:
        x = x + self.gain * self.space(alone(jax.nn.silu(self.norm(x)), places))
        return x + self.gain * self.time(jax.nn.silu(x), memory)
