"""Autoencoders with quantised latents: VQ-VAE, VQGAN (arXiv 1711.00937, 2012.09841) and MoVQ (arXiv 2209.09002).

    pixels -> encoder -> linear -> nearest code -> linear -> decoder -> pixels

Encoder and decoder are those of a VAE of clips or images; in MoVQ the codes also modulate the decoder's norms.
Denoisers see the latents before quantisation; decoding quantises them first, so a denoiser need not hit a code exactly.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dit_video.autoencoders.blocks import placed
from dit_video.autoencoders.image_blocks import (
    Beside,
    FrameNorm,
    ImageDecoder,
    ImageEncoder,
    ImageLevels,
    MakeNorm,
    frame_norms,
)
from dit_video.autoencoders.image_vae import ImageVaeConfig
from dit_video.autoencoders.modulation import Guide, SpatialNorm
from dit_video.autoencoders.posterior import Normalizer
from dit_video.autoencoders.quantizer import Codebook, CodebookConfig, Quantized
from dit_video.autoencoders.vae import CausalVaeConfig, Decoder, Encoder
from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.nn import Linear, Memory
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
        if isinstance(network, ImageVaeConfig) and not (network.moments and network.latents):
            raise UserError(
                f"network.use_quant_conv={network.moments}, network.use_post_quant_conv={network.latents} is invalid: "
                "the codebook needs a linear map before and after it. Use True for both"
            )

    @classmethod
    def kandinsky(cls) -> "VqConfig":
        """Return the MoVQ of Kandinsky 2: 8×8 pixels to one of 16,384 codes of 4 values, 68 M parameters."""
        levels = ImageLevels(widths=(128, 256, 256, 512), attention=(3,))
        return cls(
            network=ImageVaeConfig(channels=4, levels=levels),
            codebook=CodebookConfig(codes=16384, width=4),
            modulated=True,
        )

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
        self.encoder: ImageEncoder | Encoder
        self.decoder: ImageDecoder | Decoder
        match network:
            case ImageVaeConfig(levels=levels):
                norms = _modulated_norms(levels, width) if config.modulated else frame_norms(levels)
                self.encoder = ImageEncoder(levels, network.channels, rngs=rngs)
                self.decoder = ImageDecoder(levels, network.channels, norms, rngs=rngs)
            case CausalVaeConfig():
                self.encoder = Encoder(network, network.channels, rngs=rngs)
                self.decoder = Decoder(network, guided=width if config.modulated else None, rngs=rngs)
        self.to_codes = Linear(network.channels, width, rngs=rngs)
        self.codebook = Codebook(config.codebook, rngs=rngs)
        self.from_codes = Linear(width, network.channels, rngs=rngs)
        self.normalizer = Normalizer(width)

    def latents(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Array, "B t h w c"]:
        """Return latents before quantisation and normalisation. See `encode` for the arguments."""
        segments = placed(pixels, self.config.stride, inside, memory)
        if isinstance(self.encoder, ImageEncoder):
            features = self.encoder(pixels, segments)
        else:
            features = self.encoder(pixels, memory, segments)
        return self.codebook.comparable(self.to_codes(features.astype(jnp.float32)))

    def quantized(self, pixels: Float[Array, "B T H W 3"]) -> Quantized:
        """Return the quantised latents of clips, with the straight-through gradient, and their losses, for training."""
        return self.codebook(self.latents(pixels))

    def reconstruct(self, codes: Float[Array, "B t h w c"], memory: Memory | None = None) -> Float[Array, "B T H W 3"]:
        """Return pixels from codes, or from latents that are neither normalised nor quantised."""
        x = self.from_codes(codes)
        if isinstance(self.decoder, ImageDecoder):
            return self.decoder(x, Beside(latents=codes, memory=memory)).astype(jnp.float32)
        guide = Guide(codes, memory is None or memory.begins) if self.config.modulated else None
        return self.decoder(x, memory, guide).astype(jnp.float32)

    def encode(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Array, "B t h w c"]:
        """Return normalised latents that are not quantised; arguments as in `dit_video.autoencoders.posterior.Vae`."""
        return self.normalizer.normalize(self.latents(pixels, inside, memory))

    def decode(self, latents: Float[Array, "B t h w c"], memory: Memory | None = None) -> Float[Array, "B T H W 3"]:
        """Return pixels, approximately in [-1, 1], of the codes nearest to normalised latents of a clip or chunk."""
        return self.decode_indices(self.codebook.nearest(self.normalizer.restore(latents)), memory)

    def encode_indices(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Int[Array, "B t h w"]:
        """Return the index of the nearest code of each latent. See `encode` for the arguments."""
        return self.codebook.nearest(self.latents(pixels, inside, memory))

    def decode_indices(
        self, indices: Int[AnyArray, "B t h w"], memory: Memory | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Return pixels, approximately in [-1, 1], of codes. Inside `jax.jit` an index out of range gives NaN.

        Raises:
          UserError: indices out of range.
        """
        return self.reconstruct(self.codebook.look_up(indices), memory)


class _FrameSpatialNorm(SpatialNorm):
    """A group norm over each frame, modulated by the frame's latents."""

    def __call__(self, x: Float[Array, "B t h w D"], beside: Beside) -> Float[Array, "B t h w D"]:  # type: ignore[override]
        assert beside.latents is not None
        return self.modulated(self.norm(x, beside), Guide(beside.latents))


def _modulated_norms(levels: ImageLevels, channels: int) -> MakeNorm:
    """Return a factory of an image decoder's norms, modulated by latents of `channels` channels."""
    return lambda width, rngs: _FrameSpatialNorm(FrameNorm(width, levels.groups), width, channels, rngs=rngs)
