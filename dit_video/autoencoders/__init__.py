"""Autoencoders of clips: models, losses, quantisation, streaming, tiling and packing on canvases."""

from dit_video.autoencoders.adversarial import R1, Adversarial, LeCam
from dit_video.autoencoders.canvas import Canvas, Place, arrange, covers, occupied, padding
from dit_video.autoencoders.image_blocks import ImageLevels
from dit_video.autoencoders.image_vae import ImageVae, ImageVaeConfig
from dit_video.autoencoders.inflate import InflatedConfig, inflate
from dit_video.autoencoders.interface import Autoencoder, AutoencoderConfig, clip_grid, latent_grid
from dit_video.autoencoders.linear import LinearAutoencoder, fit_linear
from dit_video.autoencoders.objective import AutoencoderObjective
from dit_video.autoencoders.patch_vae import PatchVae, PatchVaeConfig, from_patches, start_from_linear, to_patches
from dit_video.autoencoders.posterior import Normalizer, Posterior
from dit_video.autoencoders.quantizer import Codebook, CodebookConfig, Quantized
from dit_video.autoencoders.streaming import TilingError, decode_stream, encode_stream, tiling_error
from dit_video.autoencoders.tiling import Tiles
from dit_video.autoencoders.vae import CausalVae, CausalVaeConfig
from dit_video.autoencoders.vq import VqAutoencoder, VqConfig

__all__ = [
    "R1",
    "Adversarial",
    "Autoencoder",
    "AutoencoderConfig",
    "AutoencoderObjective",
    "Canvas",
    "CausalVae",
    "CausalVaeConfig",
    "Codebook",
    "CodebookConfig",
    "ImageLevels",
    "ImageVae",
    "ImageVaeConfig",
    "InflatedConfig",
    "LeCam",
    "LinearAutoencoder",
    "Normalizer",
    "PatchVae",
    "PatchVaeConfig",
    "Place",
    "Posterior",
    "Quantized",
    "Tiles",
    "TilingError",
    "VqAutoencoder",
    "VqConfig",
    "arrange",
    "clip_grid",
    "covers",
    "decode_stream",
    "encode_stream",
    "fit_linear",
    "from_patches",
    "inflate",
    "latent_grid",
    "occupied",
    "padding",
    "start_from_linear",
    "tiling_error",
    "to_patches",
]
