"""Autoencoders with quantised latents: VQ-VAE, VQGAN (arXiv 1711.00937, 2012.09841) and MoVQ (arXiv 2209.09002).

    pixels -> encoder -> linear -> nearest code -> linear -> decoder -> pixels

Encoder and decoder are those of a VAE of clips or images; in MoVQ the codes also modulate the decoder's norms.
Denoisers see the latents before quantisation; decoding quantises them first, so a denoiser need not hit a code exactly.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.models.autoencoders.blocks import BlockInputs, NormFactory, make_encoder_inputs
from dit_video.models.autoencoders.image_blocks import ImageLevels, ImageVaeDecoder, ImageVaeEncoder
from dit_video.models.autoencoders.image_vae import ImageVaeConfig
from dit_video.models.autoencoders.interface import Latents, Pixels, SegmentIds
from dit_video.models.autoencoders.modulation import SpatialNorm
from dit_video.models.autoencoders.posterior import Normalizer
from dit_video.models.autoencoders.quantizer import Codebook, CodebookConfig, QuantizedLatents
from dit_video.models.autoencoders.vae import CausalVaeConfig, CausalVaeDecoder, CausalVaeEncoder, make_position_norm
from dit_video.nn import ConvCache, Linear
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class VqConfig:
    """Configuration of a vector-quantised autoencoder.

    Raises:
      UserError: a network with a variance, or without the linear maps around the codebook.
    """

    network: CausalVaeConfig | ImageVaeConfig = field(default_factory=CausalVaeConfig)
    """Configuration of encoder and decoder; linear maps go from its `channels` to the codes' width and back."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """Configuration of the codebook."""
    modulated: bool = False
    """True lets the codes modulate the decoder's norms (MoVQ)."""

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
        return cls(network=network, codebook=CodebookConfig(codes=16384, width=4), modulated=True)

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
        """Return normalised latents that are not quantised; arguments as in `Vae` of the module `posterior`."""
        return self.normalizer.normalize(self.compute_latents(pixels, segment_ids, cache))

    def decode(self, latents: Latents, cache: ConvCache | None = None) -> Pixels:
        """Return pixels, approximately in [-1, 1], of the codes nearest to normalised latents of a clip or chunk."""
        return self.decode_indices(self.codebook.find_nearest(self.normalizer.denormalize(latents)), cache)

    def encode_indices(
        self, pixels: Pixels, segment_ids: SegmentIds = None, cache: ConvCache | None = None
    ) -> Int[Array, "B t h w"]:
        """Return the index of the nearest code of each latent. See `encode` for the arguments."""
        return self.codebook.find_nearest(self.compute_latents(pixels, segment_ids, cache))

    def decode_indices(self, indices: Int[AnyArray, "B t h w"], cache: ConvCache | None = None) -> Pixels:
        """Return pixels, approximately in [-1, 1], of codes. Inside `jax.jit` an index out of range gives NaN.

        Raises:
          UserError: indices out of range.
        """
        return self.reconstruct(self.codebook.look_up(indices), cache)

    def _make_norms(self, norm: NormFactory) -> NormFactory:
        """Return the decoder's norms: `norm`, modulated by the codes if the config says so."""
        if not self.config.modulated:
            return norm
        return lambda width, rngs: SpatialNorm(norm(width, rngs), width, self.config.channels, rngs=rngs)
