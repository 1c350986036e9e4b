"""A causal spatiotemporal autoencoder on patches.

Every patch of `stride` pixels is projected to `width` channels, and causal residual blocks mix the patches at latent
resolution. Finer levels of the decoder, if any, mix them across their borders. A linear path parallel to the network
begins with the principal components of the training clips, so that training starts where the best linear autoencoder
ends.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.models.autoencoders.config import AutoencoderConfig
from dit_video.models.autoencoders.interface import Latents, Normalizer, Pixels, Posterior, SegmentIds, Vae
from dit_video.models.autoencoders.patches import ClipStatistics, LinearAutoencoder, from_patches, to_patches
from dit_video.models.autoencoders.vae import BlockInputs, make_encoder_inputs
from dit_video.nn import CausalConv, ConvCache, Linear, RmsNorm
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class PatchVaeConfig(AutoencoderConfig):
    """Configuration of a causal VAE on patches.

    Raises:
      UserError: If a size is below 1, `init_std` is out of range, or the stride has no room for so many levels.
    """

    stride: Grid = Grid(4, 8, 8)
    """Pixels per latent along (t, h, w)."""
    channels: int = 16
    """Channels of the latents."""
    width: int = 96
    """Channels of the network."""
    blocks: int = 3
    """Residual blocks of the encoder, and of the decoder."""
    fine_widths: tuple[int, ...] = ()
    """Channels of further levels of the decoder, each with one block and twice the resolution of the level before, as
    far as the stride allows. Their convolutions cross the borders of patches, which then show less: best where regions
    or frames are completed."""
    preactivated: bool = False
    """True uses blocks of convolutions alone, each after its activation (arXiv 1603.05027), and scales the network's
    outputs down before they are added to the linear path's. Steps are a fifth cheaper and each gains more: best for
    training within minutes from principal components."""
    init_std: float = 0.05
    """Initial standard deviation of the noise on the latents, relative to the root mean square of all latents; the
    finest latents have less than a tenth of that. A latent that noise hides is not learned, as the decoder cannot read
    it."""
    bfloat16: bool = False
    """True computes convolutions in bfloat16, with products summed in float32; parameters, residual features, norms,
    linear maps and latents stay float32."""

    def __post_init__(self):
        if min(*self.stride, self.channels, self.width, *self.fine_widths) < 1 or self.blocks < 0:
            raise UserError(f"{self} is invalid: use a stride, channels and a width of at least 1, and blocks >= 0")
        if not 0.0025 <= self.init_std <= 2.7:
            raise UserError(f"init_std={self.init_std} is invalid: outside of the posterior's range. Use 0.0025 to 2.7")
        *factors, _ = self.list_factors()
        if Grid(1, 1, 1) in factors:
            rule = f"a stride of {self.stride} has room for {factors.index(Grid(1, 1, 1))} finer levels"
            raise UserError(f"fine_widths={self.fine_widths} are invalid: {rule}. Use fewer, or a larger stride")

    @property
    def dtype(self) -> jnp.dtype:
        """Return the dtype of convolutions."""
        return jnp.dtype(jnp.bfloat16 if self.bfloat16 else jnp.float32)

    @property
    def last_layer(self) -> str:
        return "decoder_out/kernel"

    def make(self, rngs: nnx.Rngs) -> "PatchVae":
        return PatchVae(self, rngs=rngs)

    def list_factors(self) -> list[Grid]:
        """Return the factors of resolution between the levels of the decoder, and from the last one to pixels."""
        factors, rest = [], self.stride
        for _ in self.fine_widths:
            factors.append(Grid(*(2 if side % 2 == 0 else 1 for side in rest)))
            rest = Grid(*(side // factor for side, factor in zip(rest, factors[-1], strict=True)))
        return [*factors, rest]

    def init_from_clips(self, clips: ClipStatistics) -> dict[str, Any]:
        """Return the linear path that is the best linear autoencoder of the clips."""
        return make_linear_path(clips.fit_linear(stride=self.stride, channels=self.channels))


class PatchVae(Vae):
    """A VAE from pixels in [-1, 1] to normalised latents and back."""

    def __init__(self, config: PatchVaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, channels, values = config.width, config.channels, config.stride.volume * 3
        self.linear = _LinearPath(values, channels, rngs=rngs)
        self.normalizer = Normalizer(channels)
        self.encoder_in = Linear(values, width, rngs=rngs)
        block = _PreactivatedBlock if config.preactivated else _Block
        self.latent_gain, self.patch_gain = block.latent_gain, block.patch_gain
        self.encoder = nnx.List([block(width, dtype=config.dtype, rngs=rngs) for _ in range(config.blocks)])
        self.encoder_out = Linear(width, 2 * channels, init="zero", rngs=rngs)
        self.decoder_in = Linear(channels, width, rngs=rngs)
        self.decoder = nnx.List([block(width, dtype=config.dtype, rngs=rngs) for _ in range(config.blocks)])
        *factors, last_factor = config.list_factors()
        widths = (width, *config.fine_widths)
        levels = zip(factors, itertools.pairwise(widths), strict=True)
        self.upsample = nnx.List([Linear(coarse, each.volume * fine, rngs=rngs) for each, (coarse, fine) in levels])
        self.fine = nnx.List([block(fine, dtype=config.dtype, rngs=rngs) for fine in config.fine_widths])
        self.decoder_out = Linear(widths[-1], last_factor.volume * 3, init="zero", rngs=rngs)

    def posterior(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Posterior:
        """Return the distribution of latents before normalisation. See `encode` for the arguments."""
        inputs = make_encoder_inputs(pixels, self.config.stride, segment_ids, cache)
        patches = to_patches(pixels, self.config.stride, is_first=inputs.is_first)
        x = self.encoder_in(patches)
        for block in self.encoder:
            x = block(x, inputs)
        mean, log_variance = jnp.split(self.latent_gain * self.encoder_out(x), 2, axis=-1)
        init_log_variance = 2 * math.log(self.config.init_std)
        return Posterior(self.linear.down(patches) + mean, jnp.clip(log_variance + init_log_variance, -12.0, 2.0))

    def reconstruct(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels from latents that are not normalised."""
        x, inputs = self.decoder_in(latents), BlockInputs(cache=cache)
        for block in self.decoder:
            x = block(x, inputs)
        *factors, last_factor = self.config.list_factors()
        for factor, upsample, block in zip(factors, self.upsample, self.fine, strict=True):
            x = block(from_patches(upsample(x), factor, is_first=inputs.is_first), inputs)
        linear = from_patches(self.linear.up(latents), self.config.stride, is_first=inputs.is_first)
        return linear + self.patch_gain * from_patches(self.decoder_out(x), last_factor, is_first=inputs.is_first)


class _LinearPath(nnx.Module):
    """An affine map from patches to latents and one back; see `make_linear_path`."""

    def __init__(self, values: int, channels: int, *, rngs: nnx.Rngs):
        self.down, self.up = Linear(values, channels, rngs=rngs), Linear(channels, values, rngs=rngs)


def make_linear_path(linear: LinearAutoencoder) -> dict[str, Any]:
    """Return the parameters of a `PatchVae`'s linear path that is `linear`, scaled to latents of about unit variance.

    With the other parameters as initialised (the network's output is zero) the autoencoder equals `linear`.
    """
    scale = linear.scale
    return {
        "linear": {
            "down": {"kernel": linear.basis / scale, "bias": -linear.mean @ linear.basis / scale},
            "up": {"kernel": linear.basis.T * scale, "bias": linear.mean},
        }
    }


class _Block(nnx.Module):
    """Two residual branches: a convolution in space, then a causal one in time."""

    latent_gain, patch_gain = 1.0, 1.0
    """Factors of the network's outputs before they are added to the linear path's."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm_space, self.norm_time = RmsNorm(width), RmsNorm(width)
        self.space = CausalConv(width, width, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.mix = Linear(width, width, init="zero", rngs=rngs)
        self.time = CausalConv(width, width, (3, 1, 1), dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, init="zero", rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:
        x = x + self.mix(jax.nn.silu(self.space(inputs.mask_gaps(self.norm_space(x)))))
        return x + self.out(jax.nn.silu(self.time(self.norm_time(x), inputs.cache)))


class _PreactivatedBlock(nnx.Module):
    """Two residual branches: activation and convolution in space, then activation and causal convolution in time."""

    # The residual of principal components is a tenth of the pixels: a step of Adam or Muon should change as little.
    latent_gain, patch_gain = 0.3, 0.1
    gain = 0.3
    """Factor of each convolution, so that a new stack of blocks is close to the identity."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = RmsNorm(width)
        self.space = CausalConv(width, width, (1, 3, 3), dtype=dtype, rngs=rngs)
        self.time = CausalConv(width, width, (3, 1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w D"], inputs: BlockInputs) -> Float[Array, "B t h w D"]:
        x = x + self.gain * self.space(inputs.mask_gaps(jax.nn.silu(self.norm(x))))
        return x + self.gain * self.time(jax.nn.silu(x), inputs.cache)
