"""Autoencoders with quantised latents: VQ-VAE, VQGAN (arXiv 1711.00937, 2012.09841) and MoVQ (arXiv 2209.09002).

    pixels -> encoder -> linear -> nearest code -> linear -> decoder -> pixels

Encoder and decoder come from a VAE of clips or images; in MoVQ the codes also modulate the decoder's norms. Denoisers
see the latents before quantisation; decoding quantises them first, so a denoiser need not hit a code exactly, or takes
them as they are, as in Kandinsky.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.models.autoencoders.codebook import Codebook, CodebookConfig, CodebookLoss, QuantizedLatents
from dit_video.models.autoencoders.config import AutoencoderConfig
from dit_video.models.autoencoders.image_vae import ImageLevels, ImageVaeConfig, ImageVaeDecoder, ImageVaeEncoder
from dit_video.models.autoencoders.interface import Latents, Normalizer, Pixels, SegmentIds
from dit_video.models.autoencoders.objective import AutoencoderObjective
from dit_video.models.autoencoders.vae import (
    BlockInputs,
    CausalVaeConfig,
    CausalVaeDecoder,
    CausalVaeEncoder,
    NormFactory,
    make_encoder_inputs,
    make_position_norm,
)
from dit_video.nn import ConvCache, Linear
from dit_video.tokens import Grid


class SpatialNorm(nnx.Module):
    """A norm with scale and shift computed from the latents; initialised as the norm alone."""

    def __init__(self, norm: nnx.Module, width: int, channels: int, *, rngs: nnx.Rngs):
        """Create the norm: `norm` is over `width` channels, the latents have `channels`."""
        self.norm = norm
        self.scale = Linear(channels, width, init="zero", rngs=rngs)
        self.scale.bias = nnx.Param(jnp.ones((width,), jnp.float32))
        self.shift = Linear(channels, width, init="zero", rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W D"], inputs: BlockInputs) -> Float[Array, "B T H W D"]:
        assert inputs.latents is not None
        x = self.norm(x, inputs)
        # The maps act on single positions, so they are computed at the latents' resolution, which is the coarsest.
        maps = (part(inputs.latents) for part in (self.scale, self.shift))
        scale, shift = (_upsample_latents(each, x.shape, inputs.is_first) for each in maps)
        return (x * scale + shift).astype(x.dtype)


def _upsample_latents(
    latents: Float[Array, "B t h w D"], shape: tuple[int, ...], is_first: bool
) -> Float[Array, "B T H W D"]:
    """Repeat each latent over all positions that it stands for."""
    frames, rows, columns = latents.shape[1:4]
    # A clip's first latent frame is a single frame at every resolution.
    repeats = (shape[1] - 1) // max(1, frames - 1) if is_first else shape[1] // frames
    if repeats > 1:
        latents = jnp.repeat(latents, repeats, axis=1)[:, repeats - 1 if is_first else 0 :]
    for axis, factor in ((2, shape[2] // rows), (3, shape[3] // columns)):
        latents = jnp.repeat(latents, factor, axis=axis) if factor > 1 else latents
    return latents


@dataclass(frozen=True, kw_only=True)
class VqConfig(AutoencoderConfig):
    """Configuration of a vector-quantised autoencoder.

    Raises:
      UserError: If the network has a variance, or lacks the linear maps around the codebook.
    """

    network: CausalVaeConfig | ImageVaeConfig = field(default_factory=CausalVaeConfig)
    """Configuration of encoder and decoder; linear maps go from its `channels` to the codes' width and back."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """Configuration of the codebook."""
    modulated: bool = False
    """True lets the codes modulate the decoder's norms (MoVQ)."""
    quantized_decoding: bool = True
    """True decodes the codes nearest to latents, as in training; False latents as they are, as Kandinsky's pipelines do
    (`force_not_quantize` of diffusers)."""

    def __post_init__(self):
        network = self.network
        if network.std is not None:
            raise UserError(f"network.std={network.std} is invalid: codes have no variance. Use None")
        if isinstance(network, ImageVaeConfig) and not (network.use_quant_conv and network.use_post_quant_conv):
            raise UserError(f"network={network} is invalid: codes need both linear maps. Use True for both")

    @classmethod
    def kandinsky(cls) -> "VqConfig":
        """Return the MoVQ of Kandinsky 2: 8×8 pixels to one of 16,384 codes of 4 values, 68 M parameters."""
        network = ImageVaeConfig(channels=4, levels=ImageLevels(widths=(128, 256, 256, 512), attention=(3,)))
        codebook = CodebookConfig(codes=16384, width=4)
        return cls(network=network, codebook=codebook, modulated=True, quantized_decoding=False)

    @property
    def stride(self) -> Grid:
        """Return the pixels per latent along (t, h, w)."""
        return self.network.stride

    @property
    def channels(self) -> int:
        """Return the channels of the latents, which are the codes' width."""
        return self.codebook.width

    @property
    def last_layer(self) -> str:
        return self.network.last_layer

    def make(self, rngs: nnx.Rngs) -> "VqAutoencoder":
        return VqAutoencoder(self, rngs=rngs)

    def make_loss(
        self, objective: AutoencoderObjective, is_trained: Callable[[str], bool] = lambda path: True
    ) -> CodebookLoss:
        """Return the loss of the codebook."""
        return CodebookLoss(learning=objective.codebook, is_trained=is_trained("codebook/codes"))


class VqAutoencoder(nnx.Module):
    """An autoencoder from pixels in [-1, 1] to normalised latents, or to indices of codes, and back."""

    def __init__(self, config: VqConfig, *, rngs: nnx.Rngs):
        self.config = config
        network, width = config.network, config.codebook.width
        self.encoder: ImageVaeEncoder | CausalVaeEncoder
        self.decoder: ImageVaeDecoder | CausalVaeDecoder
        match network:
            case ImageVaeConfig(levels=levels):
                self.encoder = ImageVaeEncoder(levels, network.channels, rngs=rngs)
                self.decoder = ImageVaeDecoder(levels, network.channels, self._make_norms(levels.make_norm), rngs=rngs)
            case CausalVaeConfig():
                self.encoder = CausalVaeEncoder(network, network.channels, rngs=rngs)
                self.decoder = CausalVaeDecoder(network, self._make_norms(make_position_norm), rngs=rngs)
        self.to_codes = Linear(network.channels, width, rngs=rngs)
        self.codebook = Codebook(config.codebook, rngs=rngs)
        self.from_codes = Linear(width, network.channels, rngs=rngs)
        self.normalizer = Normalizer(width)

    def compute_latents(
        self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None
    ) -> Latents:
        """Return latents before quantisation and normalisation. See `encode` for the arguments."""
        features = self.encoder(pixels, make_encoder_inputs(pixels, self.config.stride, segment_ids, cache))
        return self.codebook.normalize(self.to_codes(features.astype(jnp.float32)))

    def quantize(self, pixels: Pixels) -> QuantizedLatents:
        """Return the quantised latents of clips, with the straight-through gradient, and their losses, for training."""
        return self.codebook(self.compute_latents(pixels))

    def reconstruct(self, codes: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels from codes, or from latents that are neither normalised nor quantised."""
        return self.decoder(self.from_codes(codes), BlockInputs(latents=codes, cache=cache)).astype(jnp.float32)

    def encode(self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None) -> Latents:
        """Return normalised latents that are not quantised. See `Vae.encode` for the arguments."""
        return self.normalizer.normalize(self.compute_latents(pixels, segment_ids, cache))

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels, approximately in [-1, 1], of normalised latents of a clip or chunk, or of their codes."""
        latents = self.normalizer.denormalize(latents)
        if not self.config.quantized_decoding:
            return self.reconstruct(latents, cache)
        return self.decode_indices(self.codebook.find_nearest(latents), cache)

    def encode_indices(
        self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None
    ) -> Int[Array, "B t h w"]:
        """Return the index of the nearest code of each latent. See `encode` for the arguments."""
        return self.codebook.find_nearest(self.compute_latents(pixels, segment_ids, cache))

    def decode_indices(self, indices: Int[AnyArray, "B t h w"], cache: ConvCache | None = None) -> Pixels:
        """Return pixels, approximately in [-1, 1], of codes. Inside `jax.jit` an index out of range gives NaN.

        Raises:
          UserError: If an index is out of range.
        """
        return self.reconstruct(self.codebook.look_up(indices), cache)

    def _make_norms(self, norm: NormFactory) -> NormFactory:
        """Return the decoder's norms: `norm`, modulated by the codes if the config says so."""
        if not self.config.modulated:
            return norm
        return lambda width, rngs: SpatialNorm(norm(width, rngs), width, self.config.channels, rngs=rngs)
