"""Autoencoders whose latents are codes: VQ-VAE and VQGAN (arXiv 1711.00937, 2012.09841), and MoVQ (arXiv 2209.09002).

    pixels -> encoder -> linear -> nearest code -> linear -> decoder -> pixels

The encoder and the decoder are those of a VAE, of clips or of images; in MoVQ the codes also modulate the decoder's
norms. Latents, as the rest of the system sees them, are what comes before the codebook; decoding takes the nearest
codes first, so a denoiser of such latents need not hit a code.
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
    """A vector-quantised autoencoder.

    Raises:
      UserError: a network with a variance, or without the linear maps beside the codebook.
    """

    network: CausalVaeConfig | ImageVaeConfig = field(default_factory=CausalVaeConfig)
    """whose encoder and decoder it has; its `channels` are what the linear maps beside the codebook go from and to"""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    modulated: bool = False
    """whether the codes modulate the decoder's norms (MoVQ)"""

    def __post_init__(self):
        network = self.network
        if network.std is not None:
            raise UserError(f"codes have no variance, the network was given std={network.std}; leave it out")
        if isinstance(network, ImageVaeConfig) and not (network.moments and network.latents):
            raise UserError("linear maps lie beside the codebook; leave moments=False and latents=False out")

    @classmethod
    def kandinsky(cls) -> "VqConfig":
        """The MoVQ of Kandinsky 2: 8×8 pixels to one of 16,384 codes of 4 values, 68 M parameters."""
        levels = ImageLevels(widths=(128, 256, 256, 512), attention=(3,))
        return cls(
            network=ImageVaeConfig(channels=4, levels=levels),
            codebook=CodebookConfig(codes=16384, width=4),
            modulated=True,
        )

    @property
    def stride(self) -> Grid:
        """Pixels for one latent along (t, h, w)."""
        return self.network.stride

    @property
    def channels(self) -> int:
        """Of the latents: the codes' width."""
        return self.codebook.width

    @property
    def last_layer(self) -> str:
        return self.network.last_layer

    def make(self, rngs: nnx.Rngs) -> "VqAutoencoder":
        return VqAutoencoder(self, rngs=rngs)


class VqAutoencoder(nnx.Module):
    """Pixels in [-1, 1] to normalised latents, or to the indices of codes, and back."""

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
        """Before the codebook and before normalisation. See `encode` for the arguments."""
        places = placed(pixels, self.config.stride, inside, memory)
        if isinstance(self.encoder, ImageEncoder):
            features = self.encoder(pixels, places)
        else:
            features = self.encoder(pixels, memory, places)
        return self.codebook.comparable(self.to_codes(features.astype(jnp.float32)))

    def quantized(self, pixels: Float[Array, "B T H W 3"]) -> Quantized:
        """What training takes: the codes of clips, through which gradients pass, and how far off they are."""
        return self.codebook(self.latents(pixels))

    def reconstruct(self, codes: Float[Array, "B t h w c"], memory: Memory | None = None) -> Float[Array, "B T H W 3"]:
        """Pixels from codes, or from latents that are neither normalised nor quantised."""
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
        """Normalised latents, not quantised. See `dit_video.autoencoders.posterior.Vae.encode` for the arguments."""
        return self.normalizer.normalize(self.latents(pixels, inside, memory))

    def decode(self, latents: Float[Array, "B t h w c"], memory: Memory | None = None) -> Float[Array, "B T H W 3"]:
        """Pixels, about in [-1, 1], of the codes nearest to normalised latents: of a clip, or of a chunk of one."""
        return self.decode_indices(self.codebook.nearest(self.normalizer.restore(latents)), memory)

    def encode_indices(
        self,
        pixels: Float[Array, "B T H W 3"],
        inside: Bool[Array, "B h w"] | Int[Array, "B h w"] | None = None,
        memory: Memory | None = None,
    ) -> Int[Array, "B t h w"]:
        """Which code stands for each latent. See `encode` for the arguments."""
        return self.codebook.nearest(self.latents(pixels, inside, memory))

    def decode_indices(
        self, indices: Int[AnyArray, "B t h w"], memory: Memory | None = None
    ) -> Float[Array, "B T H W 3"]:
        """Pixels, about in [-1, 1], of codes. Inside `jax.jit` an index out of range gives NaN.

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
    """Norms of an image decoder that latents of so many channels modulate."""
    return lambda width, rngs: _FrameSpatialNorm(FrameNorm(width, levels.groups), width, channels, rngs=rngs)
